"""`dalle1 emoji`, for launchers that take a script: see `dalle1/commands/emoji.py`."""

import os
import sys

# The checkout, in place of launch/, whose tokenize.py would hide Python's own module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from dalle1.commands.emoji import main

if __name__ == "__main__":
    sys.exit(main())
