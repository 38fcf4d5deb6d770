"""The ZeRO stage that really runs: the recipe's, or the nearest one that DeepSpeed gets right."""

from __future__ import annotations

from ds_train.config import RunConfig
from ds_train.config.batch import settled


def effective_stage(run: RunConfig) -> tuple[int, str | None]:
    """(stage, why it isn't the recipe's).

    DeepSpeed's stage 0 takes an Adam step with zero gradients at start-up in 16 bits and never scales an fp16 loss
    (unfused_optimizer.py:425), and clips a pipeline by each stage's own norm. Stage 1 gives the plain loop's losses.
    """
    asked = settled(run.parallel.zero_stage)
    if asked > 0:
        return asked, None
    if run.precision.dtype != "fp32":
        why = f"DeepSpeed's stage 0 is wrong with precision.dtype={run.precision.dtype}"
    elif settled(run.parallel.pipeline) > 1:
        why = "DeepSpeed's stage 0 clips a pipeline by each stage's own gradient norm"
    else:
        return 0, None
    return 1, f"parallel.zero_stage=0 runs as 1: {why}"
