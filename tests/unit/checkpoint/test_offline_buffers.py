"""Checkpoints that no export is made of: another version's, and those that would lack what isn't trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_train.checkpoint.manifest import write_manifest
from ds_train.checkpoint.native import FORMAT
from ds_train.checkpoint.offline import check, check_all_trained
from ds_train.errors import UserError


def outline(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2))


def test_a_model_with_more_than_trained_parameters_is_not_exported_from_a_checkpoint() -> None:
    check_all_trained(outline("llama"), Path("step-1"))
    for family in ("glm4_moe", "ernie4_5_moe"):  # a buffer, and a parameter without a gradient
        with pytest.raises(UserError, match=r"checkpoint=step-1: .*e_score_correction_bias isn't trained"):
            check_all_trained(outline(family), Path("step-1"))


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"format": FORMAT, "step": 1})
    check(tmp_path)
    write_manifest(tmp_path, {"format": FORMAT - 1, "step": 1})
    with pytest.raises(UserError, match="another version of ds_train"):
        check(tmp_path)
