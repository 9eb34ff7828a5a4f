"""What is not collected: doctests of modules whose extra is not installed."""

from importlib.util import find_spec

if find_spec("ray") is None:
    collect_ignore_glob = ["flowgym_gym/agents/rllib/*"]
