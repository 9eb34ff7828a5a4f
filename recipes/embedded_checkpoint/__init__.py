"""How the embedded checkpoint is made: ``python -m recipes.embedded_checkpoint --help``."""
