"""`python -m dalle1 VERB ...`, as the command `dalle1`."""

import sys

from dalle1.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
