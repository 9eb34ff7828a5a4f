"""``python -m flowgym_gym`` is the command line of :mod:`flowgym_gym.cli`."""

import sys

from flowgym_gym.cli import main

if __name__ == "__main__":
    sys.exit(main())
