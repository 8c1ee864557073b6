"""``python -m torch2ebm``."""

import sys

from torch2ebm.cli import main

if __name__ == "__main__":
    sys.exit(main())
