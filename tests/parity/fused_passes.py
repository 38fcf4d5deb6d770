"""One rank: `fused_passes.py RECIPE...` trains each recipe with the fused passes and with DeepSpeed's own.

The optimizer and its steps are the same, so all weights and states must be equal to the bit: after the steps, and after
values that were loaded, which the fused copy may not leave out.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from plain_loop import CLIP
from torch import Tensor

from ds_train.checkpoint import fragments
from ds_train.config import RunConfig, load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import job, ranks
from ds_train.engine.build import Assembly, assemble
from ds_train.engine.loop import train_steps
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
from ds_train.schedule.timeline import make_timeline

NORMS = "gradient norms"


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        job.quiet_libraries()
        for recipe in sys.argv[1:]:
            run = load(recipe)
            fused = trained(run, info, fused=True)
            with mock.patch("ds_train.engine.build.fuse_passes"):
                own = trained(run, info, fused=False)
            compare(run.name, fused, own)

    return ranks.run_to_exit_code(body)


def trained(run: RunConfig, info: ranks.RankInfo, fused: bool) -> dict[str, Tensor]:
    """What this rank holds after all steps, and what the model computes with after its fp32 weights were changed."""
    plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
    prepared = prepare(run, progress=False)
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    assert parts.kernel.fused, parts.kernel
    narrow = run.precision.dtype == "bf16" and (plan.zero_stage == 3 or run.parallel.pipeline > 1)
    assert bool(parts.engine.basic_optimizer.copies) == (fused and narrow), "who writes the 16-bit weights?"
    norms = [step.grad_norm for step in train_steps(run, plan, info, parts, make_timeline(run, 10**6))]
    assert max(norms) > CLIP, "nothing was clipped"
    found = held(parts)
    with torch.no_grad():
        for batch in fragments.fragments(parts.engine, parts.part):
            for fragment in batch:
                fragment.tensors[fragments.WEIGHT].add_(1.0)
    fragments._publish(parts.engine)
    found |= {f"loaded {name}": tensor for name, tensor in computed(parts).items()}
    parts.engine.destroy()
    return found | {NORMS: torch.tensor(norms, dtype=torch.float64)}


def held(parts: Assembly) -> dict[str, Tensor]:
    """Copies of the weights that the model computes with, of their fp32 values, and of the optimizer's states."""
    found = computed(parts)
    for batch in fragments.fragments(parts.engine, parts.part):
        for fragment in batch:
            for kind, values in fragment.tensors.items():
                found[f"{fragment.name} {kind} {fragment.start}"] = values.clone()
    return found


def computed(parts: Assembly) -> dict[str, Tensor]:
    named = parts.model.named_parameters()
    return {name: getattr(parameter, "ds_tensor", parameter).detach().clone() for name, parameter in named}


def compare(run: str, fused: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    # Summed in double in another order.
    torch.testing.assert_close(fused.pop(NORMS), own.pop(NORMS), rtol=1e-13, atol=0.0)
    assert fused.keys() == own.keys()
    for name, tensor in fused.items():
        assert torch.equal(tensor, own[name]), f"{run}: {name} is off by {(tensor - own[name]).abs().max()}"


if __name__ == "__main__":
    sys.exit(main())
