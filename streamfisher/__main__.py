"""`python -m streamfisher` is the `streamfisher` command."""

import sys

from streamfisher.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
