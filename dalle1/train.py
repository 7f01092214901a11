"""`dalle1 train` for launchers that take a module: `deepspeed --module dalle1.train CONFIG`."""

import sys

from dalle1.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
