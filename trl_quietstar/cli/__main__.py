"""`python -m trl_quietstar.cli`, as `accelerate launch` starts it."""

import sys

from . import console


if __name__ == "__main__":
    sys.exit(console())
