"""Train a recipe: `deepspeed launch/train.py RECIPE [key=value ...]` starts this on every rank, and so does `srun`."""

import sys

from ds_train.engine.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
