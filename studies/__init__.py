"""What agents, bounds and pictures come to, measured: ``python -m studies.NAME``."""
