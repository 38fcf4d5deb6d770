"""`python -m ds_train.engine RECIPE [key=value ...]`: train a recipe on this rank of a launch."""

from __future__ import annotations

import argparse

from ds_train.engine.ranks import end


def main() -> int:
    """Parse the command line and run this rank; returns the process's exit code."""
    parser = argparse.ArgumentParser(description="Train a ds_train recipe on DeepSpeed.")
    parser.add_argument("recipe", help="path of a YAML recipe, for example ds_configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to replace")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    arguments = parser.parse_args()
    from ds_train.engine.job import run_job

    return run_job(arguments.recipe, arguments.overrides)


if __name__ == "__main__":
    end(main())
