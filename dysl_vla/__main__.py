"""The command `dysl` as `python -m dysl_vla`, which is how `accelerate launch -m` starts it."""

import sys

from dysl_vla.cli import main

if __name__ == "__main__":
    sys.exit(main())
