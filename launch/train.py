"""Train a recipe: `deepspeed launch/train.py RECIPE [key=value ...]` starts this on every rank, and so does `srun`."""

from ds_train.engine.__main__ import main
from ds_train.engine.ranks import end

if __name__ == "__main__":
    end(main())
