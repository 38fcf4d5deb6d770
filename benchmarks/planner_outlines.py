"""How many families' parameters the planner knows exactly: its outlines against the models themselves, built on meta.

`python benchmarks/planner_outlines.py [--task causal-lm] [FAMILY ...]` (minutes for all).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any


def compare(arch: str, task: Any) -> str:
    """exact, different, not understood, or can't be built (by transformers, with its config class's defaults)."""
    import torch
    import transformers

    from ds_train.models.load import AUTO_CLASSES
    from ds_train.plan.outline import outline

    try:
        config = transformers.AutoConfig.for_model(arch)
        with torch.device("meta"):
            model: Any = AUTO_CLASSES[task].from_config(config)
        model.tie_weights()
    except Exception:  # each family has its own reasons
        return "can't be built"
    found = outline(arch, task, {})
    if found is None:
        return "not understood"
    # Tied pairs may be named by either of the two, so names aren't compared.
    real = Counter(tuple(parameter.shape) for parameter in model.parameters())
    return "exact" if Counter(parameter.shape for parameter in found.parameters) == real else "different"


def main() -> int:
    from ds_train.plan.transformers_keys import TASKS, architectures_with_head

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--task", choices=TASKS, default="causal-lm")
    arguments = parser.parse_args()
    results: dict[str, list[str]] = {}
    for arch in arguments.families or sorted(architectures_with_head(arguments.task)):
        results.setdefault(compare(arch, arguments.task), []).append(arch)
    for result, families in sorted(results.items(), key=lambda item: -len(item[1])):
        print(f"{result}: {len(families)}{'' if result == 'exact' else ' (' + ', '.join(families) + ')'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
