"""Run the command: `python -m ser` is `ser`, and `torchrun ... -m ser train` trains on several processes."""

import sys

from ser.cli import main

if __name__ == "__main__":  # processes that decode audio import this module again
    sys.exit(main())
