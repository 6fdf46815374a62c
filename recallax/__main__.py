"""Run the command line with `python -m recallax`."""

import sys

from recallax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
