"""Raw `deepspeed:` keys at other values than DeepSpeed's: the losses of a plain loop, also on from a checkpoint.

What they change is where gradients, parameters and optimizer states lie, and in which pieces they travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_loop import history_of, plain_loop, write_corpus, write_recipe, write_weights
from ranks import run_ranks
from torch import Tensor

from ds_train.checkpoint import native
from ds_train.plan import deepspeed_keys as keys_of_deepspeed
from ds_train.plan.deepspeed_json import OWNED

HALF, END = 3, 5
SMALL = 1_000
"""Elements: less than a matrix of the model has, so that it takes several pieces."""

Case = tuple[dict[str, Any], dict[str, Any]]

_REPORTS = {
    "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "steps_per_print": 2,
    "log_level": "info", "disable_python_gc": True, "timers": {"throughput": {"enabled": True, "synchronized": True}},
    "comms_logger": {"enabled": True, "verbose": True, "prof_all": True, "debug": True, "prof_ops": ["all_reduce"]},
    "flops_profiler": {
        "enabled": True, "profile_step": 2, "module_depth": 1, "top_modules": 2, "detailed": False,
        "recompute_fwd_factor": 1.0, "output_file": None,
    },
}  # fmt: skip
_BOTH_STAGES: dict[str, dict[str, Any]] = {
    "round-robin": {"round_robin_gradients": True},
    "scattered": {"contiguous_gradients": False},
    "all-reduce": {"reduce_scatter": False},
    "one-rank": {"use_multi_rank_bucket_allreduce": False},
    "aligned": {"parameter_alignment": True, "ignore_unused_parameters": False},
    "aligned-round-robin": {"parameter_alignment": True, "round_robin_gradients": True, "contiguous_gradients": False},
}
_STAGE_3: dict[str, dict[str, Any]] = {
    "sub-groups": {"sub_group_size": SMALL},
    "none-kept": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
    "all-kept": {"stage3_param_persistence_threshold": 10**6, "stage3_model_persistence_threshold": 10**7},
    "few-kept": {"stage3_param_persistence_threshold": 10**6, "stage3_model_persistence_threshold": SMALL},
    "none-live": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    "all-reduce": {"stage3_use_all_reduce_for_fetch_params": True, "reduce_scatter": False},
    "one-by-one": {"stage3_allgather_sequential": True, "contiguous_gradients": False},
    "checked": {"enable_sanity_checks": True, "log_trace_cache_warnings": True, "memory_efficient_linear": False},
    "plain-modules": {"override_module_apply": False},
    # What is called with its inputs by position; of self_attn, whose are named, parameters are gone too early.
    "leaves": {"leaf_module": {"classes": ["LlamaMLP"], "names": ["model.layers.0.mlp"], "name_suffixes": ["mlp"]}},
}


def _of_zero(stage: int, keys: dict[str, Any], **parallel: Any) -> Case:
    return {"zero_stage": stage, **parallel}, {"zero_optimization": keys}


def _cases() -> Iterator[tuple[str, Case]]:
    for stage, (name, keys) in product((1, 2), _BOTH_STAGES.items()):
        yield f"{name}-{stage}", _of_zero(stage, keys)
    for name in ("round-robin", "aligned"):
        yield f"{name}-offloaded", _of_zero(2, _BOTH_STAGES[name], offload_optimizer="cpu", pin_memory=False)
    for name, keys in _STAGE_3.items():
        yield f"{name}-3", _of_zero(3, keys)
    offload = {"offload_optimizer": "cpu", "offload_params": "cpu", "pin_memory": False}
    yield "sub-groups-offloaded", _of_zero(3, _STAGE_3["sub-groups"], **offload)
    yield "reports", ({"zero_stage": 2}, _REPORTS)
    for stage in range(4):
        yield f"fp32-{stage}", ({"zero_stage": stage}, {"communication_data_type": "fp32"})
    # The recipe's own keys of the same kind.
    for stage in (1, 2, 3):
        yield f"small-buckets-{stage}", ({"zero_stage": stage, "bucket_elements": SMALL}, {})
        yield f"overlapped-{stage}", ({"zero_stage": stage, "overlap_communication": True}, {})


CASES = dict(_cases())
ROUNDED: dict[str, Case] = {
    f"bf16-{stage}": ({"zero_stage": stage}, {"communication_data_type": "bf16"}) for stage in range(4)
}
"""Gradients lose bits on their way, as they are asked to."""
IN_BF16: dict[str, Case] = {
    "at-once": ({"zero_stage": 1}, {"bf16": {"immediate_grad_update": True}}),
    "later": ({"zero_stage": 1}, {"bf16": {"immediate_grad_update": False}}),
}

UNTRIED = {
    "aio": "nvme offload needs a file engine that DeepSpeed builds",
    "zero_optimization.offload_optimizer": "of these keys, those that aren't refused are nvme offload's",
    "zero_optimization.offload_param": "as above",
    "zero_optimization.zero_quantized_nontrainable_weights": "it needs DeepSpeed's quantizer of CUDA devices",
    "fp16": "when the loss scale changes",
    "data_types.keep_in_fp32_modules": "which buffers of a 16-bit model stay wide",
}
"""Keys that no case sets, and why."""


def accepted(section: str = "") -> Iterator[str]:
    """Every raw key that isn't refused whatever its value."""
    refused = OWNED.keys() | keys_of_deepspeed.REFUSED.keys() | keys_of_deepspeed.removed_keys().keys()
    for leaf in keys_of_deepspeed.section_fields(section) or ():
        path = f"{section}.{leaf}" if section else leaf
        if path not in refused and keys_of_deepspeed._is_section(path):
            yield from accepted(path)
        elif path not in refused:
            yield path


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_raw_key_has_a_case() -> None:
    tried = {path for _, raw in [*CASES.values(), *ROUNDED.values(), *IN_BF16.values()] for path in leaves(raw)}
    missing = [
        path for path in accepted() if path not in tried and not any(path.startswith(start) for start in UNTRIED)
    ]
    assert missing == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder, a corpus and weights of a small Llama."""
    folder = tmp_path_factory.mktemp("raw")
    return folder, write_corpus(folder / "corpus"), write_weights(folder / "llama", "llama")


def train(place: tuple[Path, Path, Path], cases: dict[str, Case], dtype: str = "fp32") -> list[Path]:
    folder, corpus, weights = place
    recipes = [
        write_recipe(
            folder, name, corpus, weights, "llama", parallel,
            deepspeed=raw, precision={"dtype": dtype}, checkpoint={"save_final": True},
        )
        for name, (parallel, raw) in cases.items()
    ]  # fmt: skip
    run_ranks(2, ["tests/parity/train_in_two.py", str(HALF), str(END), *map(str, recipes)], timeout_s=900).check()
    return recipes


def states_of(folder: Path, name: str) -> dict[tuple[str, str], Tensor]:
    """Weights and moments of the last step's checkpoint, by kind and parameter."""
    files = native.open_fragments(native.of_step(folder / "runs" / name / "checkpoints", END))
    found = {(kind, name): files.whole(name, kind) for kind in ("weight", "exp_avg") for name in files.shapes}
    files.close()
    return found


@pytest.mark.parity
@pytest.mark.exhaustive
def test_losses_are_those_of_a_plain_loop(place: tuple[Path, Path, Path]) -> None:
    recipes = train(place, CASES)
    wanted, states = plain_loop(recipes[0])[:END], states_of(place[0], "fp32-0")
    wrong = []
    for name in CASES:
        found = np.array(history_of(place[0], name))
        if found.shape != (END, 2) or not np.allclose(found, wanted, rtol=1e-5, atol=0):
            wrong.append(f"{name}: {found.tolist()}")
        for (kind, parameter), tensor in states_of(place[0], name).items():
            off = float((tensor - states[kind, parameter]).abs().max() / states[kind, parameter].abs().max())
            if not off < 1e-4:
                wrong.append(f"{name}: {kind} of {parameter} is {off:.2g} off")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parity
@pytest.mark.exhaustive
def test_gradients_that_travel_in_16_bits_are_rounded_and_no_more(place: tuple[Path, Path, Path]) -> None:
    recipes = train(place, ROUNDED)
    wanted = plain_loop(recipes[0])[:END]
    for name in ROUNDED:
        np.testing.assert_allclose(history_of(place[0], name), wanted, rtol=5e-3, err_msg=name)


@pytest.mark.parity
@pytest.mark.exhaustive
def test_wide_gradients_may_be_summed_at_once(place: tuple[Path, Path, Path]) -> None:
    train(place, IN_BF16, "bf16")
    once, later = (history_of(place[0], name) for name in IN_BF16)
    assert once == later
