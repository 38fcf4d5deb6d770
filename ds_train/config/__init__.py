"""The recipe: its schema, and `load` that reads one."""

from ds_train.config.load import dump, load, parse
from ds_train.config.run import RunConfig

__all__ = ["RunConfig", "dump", "load", "parse"]
