"""A checkpoint holds parameters alone, and no export is made of one that would lack the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_train.checkpoint.offline import check_no_buffers
from ds_train.errors import UserError


def outline(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2))


def test_a_model_with_more_than_parameters_is_not_exported_from_a_checkpoint() -> None:
    check_no_buffers(outline("llama"), Path("step-1"))
    with pytest.raises(UserError, match=r"checkpoint=step-1: .*e_score_correction_bias is no parameter"):
        check_no_buffers(outline("glm4_moe"), Path("step-1"))
