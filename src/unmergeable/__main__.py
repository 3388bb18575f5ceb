"""``python -m unmergeable``, for where the ``unmergeable`` command is not on the path."""

import sys

from unmergeable.cli import main

if __name__ == "__main__":
    sys.exit(main())
