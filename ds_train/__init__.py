"""ds_train: train any transformers model on DeepSpeed from one recipe."""

__version__ = "0.1.0"
