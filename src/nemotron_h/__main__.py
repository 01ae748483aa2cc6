"""`python -m nemotron_h`: the command line."""

import sys

from nemotron_h.cli import main

if __name__ == "__main__":
    sys.exit(main())
