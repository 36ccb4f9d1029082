"""`python -m layercut`: the command line."""

import sys

from layercut.cli import main

if __name__ == "__main__":
    sys.exit(main())
