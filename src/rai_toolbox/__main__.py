"""`python -m rai_toolbox` is the command `rai-toolbox`."""

from __future__ import annotations

import sys

from rai_toolbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
