"""`python -m streamfisher` is the `streamfisher` command."""

import sys

from streamfisher.cli.front import main

if __name__ == "__main__":
    sys.exit(main())
