"""`dalle1 demo`, as a script for launchers: see `dalle1/commands/demo.py`."""

import os
import sys

# The checkout, in place of launch/, whose tokenize.py would hide Python's own module.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from dalle1.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
