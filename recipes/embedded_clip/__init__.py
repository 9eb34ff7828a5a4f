"""How the embedded CLIP was made; run ``python -m recipes.embedded_clip --help``."""
