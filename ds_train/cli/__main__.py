"""`python -m ds_train.cli`: the command line without its script, as every rank of a launch calls it."""

from ds_train.cli import main

if __name__ == "__main__":
    main()
