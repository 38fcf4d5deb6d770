"""Prints what each tensor rank drops out in one step, with and without recomputation: `dropout_of_ranks.py RECIPE`."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch

from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import ranks
from ds_train.models.load import load_model_config
from ds_train.parallel.build import build_part
from ds_train.parallel.mesh import Mesh
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        run = load(sys.argv[1])
        plan = make_plan(run, Cluster(info.ranks, info.ranks, info.device))
        ranks.meet(info)
        prepared = ranks.on_main_first(info, lambda: prepare(run, progress=False))
        config = load_model_config(run, prepared_tokenizer(prepared))
        for recomputed in (False, True):
            model = run.model.model_copy(update={"activation_checkpointing": recomputed})
            part = build_part(run.model_copy(update={"model": model}), config, plan, Mesh(plan.layout, info.rank))
            dropped: dict[str, Any] = {"attn_dropout": [], "resid_dropout": []}

            def record(module: Any, _: Any, output: torch.Tensor, name: str = "", dropped: Any = dropped) -> None:
                dropped[name].append(hashlib.sha256((output == 0).numpy().tobytes()).hexdigest())

            for name, module in part.model.named_modules():
                kind = name.rpartition(".")[2]
                if kind in dropped:
                    module.register_forward_hook(lambda *given, kind=kind: record(*given, name=kind))
            torch.manual_seed(7)
            tokens_BT = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
            loss = part.loss.train_loss(part.model, {"input_ids": tokens_BT, "labels": tokens_BT})
            loss.backward()
            seen = {kind: found[:2] for kind, found in dropped.items()}
            gradient = float(part.model.transformer.h[0].ln_1.weight.grad.norm())
            print("RANK " + json.dumps([recomputed, info.rank, loss.item(), gradient, seen]), flush=True)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
