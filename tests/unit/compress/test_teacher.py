"""Who may teach, what is compared with whom, and the loss of models whose head isn't a plain product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ds_train.compress.compared import HiddenStates
from ds_train.compress.distill import Distilling, add_projections
from ds_train.compress.post_training import quantize_folder
from ds_train.compress.teacher import Teacher, check_teacher, paired_layers
from ds_train.config import RunConfig
from ds_train.config.load import validate
from ds_train.config.quantize import QuantizeSection
from ds_train.data.tokenizer import byte_tokenizer
from ds_train.errors import UserError
from ds_train.models.tasks import TaskLoss


def bert(folder: Path, classifier: bool, **changes: Any) -> Any:
    torch.manual_seed(sum(map(ord, folder.name)))
    sizes = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3,
        "num_attention_heads": 4, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
    } | changes  # fmt: skip
    config = BertConfig(**sizes)
    model: Any = AutoModelForSequenceClassification.from_config(config) if classifier else BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model.train()


def taught(student: Path, teacher: Path, task: str, **distill: Any) -> RunConfig:
    section = {"logits": "forward-kl", "teacher": str(teacher), "alpha": 0.6, "temperature": 3.0} | distill
    return validate(
        {
            "model": {"path": str(student)}, "task": {"kind": task, "num_labels": 3}, "schedule": {"steps": 1},
            "data": {"tokenizer": "bytes", "sequence_length": 32}, "precision": {"dtype": "fp32"},
            "compress": {"distill": section},
        }
    )  # fmt: skip


@pytest.mark.parametrize("task", ["sequence-classification", "masked-lm"])
def test_the_loss_of_a_model_that_gives_logits(task: str, tmp_path: Path) -> None:
    classifies = task == "sequence-classification"
    model = bert(tmp_path / "student", classifies)
    teacher = bert(tmp_path / "teacher", classifies, hidden_size=24, num_hidden_layers=4).eval()
    run = taught(tmp_path / "student", tmp_path / "teacher", task, hidden=0.2)
    check_teacher(run, model.config, byte_tokenizer())
    matrices = dict(add_projections(model, model, 2, (32, 24), 1).items())
    theirs = Teacher(run, "cpu")
    hidden = HiddenStates(model, theirs, dict(enumerate(paired_layers(None, 2, 4))), 0.2 / 2, matrices)
    objective = Distilling(run.compress.distill, theirs, [hidden])
    loss = TaskLoss(model)
    loss.objective = objective
    tokens, mask = torch.randint(0, 256, (3, 17)), torch.ones(3, 17, dtype=torch.int64)
    mask[2, 9:] = 0
    labels = torch.randint(0, 3, (3,)) if classifies else tokens.masked_fill(torch.rand(3, 17) < 0.7, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    ours = loss.train_loss(model, batch)
    ours.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    projections = list(matrices.values())
    output, taught_by = (one(**inputs, output_hidden_states=True) for one in (model, teacher))
    student, target, kept = output.logits.view(-1, output.logits.shape[-1]), taught_by.logits.detach(), labels.view(-1)
    at = kept != -100
    p, q = (torch.log_softmax(logits[at] / 3.0, -1) for logits in (target.view(student.shape), student))
    expected = 0.6 * 9.0 * functional.kl_div(q, p, reduction="sum", log_target=True)
    expected = expected + 0.4 * functional.cross_entropy(student[at], kept[at], reduction="sum")
    for number, (own, other) in enumerate(((0, 1), (1, 3))):
        # transformers' hidden states begin with the embeddings.
        states = output.hidden_states[own + 1], taught_by.hidden_states[other + 1].detach()
        square = (projections[number](states[0]) - states[1]).square().mean(-1)
        per_sample = (square * mask).sum(-1) / mask.sum(-1)
        expected = expected + 0.1 * (per_sample * (labels != -100).view(3, -1).sum(-1)).sum()
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():  # evaluation is cross-entropy, as ever
        plain = functional.cross_entropy(model(**inputs).logits.view(student.shape), kept, reduction="sum")
        torch.testing.assert_close(loss.scores(model, batch)[0].float(), plain)


@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [
        ("masked-lm", {"vocab_size": 300}, "its vocabulary is 300 tokens, and the model's 259"),
        ("masked-lm", {"max_position_embeddings": 16}, "it takes 16 tokens"),
        ("sequence-classification", {"num_labels": 4}, "it has 4 labels, and the model 3"),
        (
            "sequence-classification",
            {"id2label": {0: "neutral", 1: "Good", 2: "bad"}},
            "its label 0 is 'neutral', which is the model's label 1",
        ),
    ],
)
def test_who_speaks_of_other_things_may_not_teach(
    task: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    classifies = task == "sequence-classification"
    named = {"id2label": {0: "bad", 1: "neutral", 2: "good"}} if classifies else {}
    model = bert(tmp_path / "student", classifies, **named)
    bert(tmp_path / "teacher", classifies, **changes)
    with pytest.raises(UserError, match=says):
        check_teacher(taught(tmp_path / "student", tmp_path / "teacher", task), model.config, byte_tokenizer())


def test_of_labels_only_names_that_both_know_are_compared(tmp_path: Path) -> None:
    model = bert(tmp_path / "student", True, id2label={0: "bad", 1: "neutral", 2: "good"})
    bert(tmp_path / "teacher", True, id2label={0: "BAD", 1: "neither", 2: "good"})
    bert(tmp_path / "nameless", True)
    for teacher in ("teacher", "nameless"):
        run = taught(tmp_path / "student", tmp_path / teacher, "sequence-classification")
        check_teacher(run, model.config, byte_tokenizer())


def test_who_counts_positions_otherwise_may_not_teach_packed_rows(tmp_path: Path) -> None:
    """RoBERTa's tokens begin at position 2; given the model's, it would say other things, and nobody would see."""
    model = bert(tmp_path / "student", False)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = RobertaConfig(num_hidden_layers=2, max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    run = taught(tmp_path / "student", tmp_path / "roberta", "masked-lm")
    with pytest.raises(UserError, match="counts them from 2, the model from 0"):
        check_teacher(run, model.config, byte_tokenizer())
    check_teacher(run, config, byte_tokenizer())
    shorter = run.model_copy(update={"data": run.data.model_copy(update={"sequence_length": 33})})
    with pytest.raises(UserError, match=r"it takes 32 tokens, and data\.sequence_length=33"):
        check_teacher(shorter, config, byte_tokenizer())


def test_what_is_packed_may_not_teach(tmp_path: Path) -> None:
    """It is unpacked by its first forward pass, which doesn't go together with a head of our own."""
    model = bert(tmp_path / "student", True)
    quantize_folder(tmp_path / "student", tmp_path / "packed", QuantizeSection(weights="int8"), "rtn")
    run = taught(tmp_path / "student", tmp_path / "packed", "sequence-classification")
    with pytest.raises(UserError, match=r"packed integers.* Fix: give the folder of the full weights"):
        check_teacher(run, model.config, byte_tokenizer())


def test_another_tokenizer_or_no_head_may_not_teach(tmp_path: Path) -> None:
    model = bert(tmp_path / "student", True)
    bert(tmp_path / "teacher", False)
    run = taught(tmp_path / "student", tmp_path / "teacher", "sequence-classification")
    with pytest.raises(UserError, match=r"isn't trained for sequence-classification: it has no classifier\.weight"):
        Teacher(run, "cpu")
    other = byte_tokenizer()
    other.add_tokens(["ab"])
    other.save_pretrained(tmp_path / "teacher")
    bert(tmp_path / "teacher", True)
    other.save_pretrained(tmp_path / "teacher")
    swapped = byte_tokenizer()
    check_teacher(run, model.config, swapped)  # a teacher may know more tokens
    swapped.add_tokens(["cd"])
    with pytest.raises(UserError, match="'cd' is token None to it"):
        check_teacher(run, model.config, swapped)


def test_layers_are_paired_by_depth() -> None:
    assert paired_layers(None, 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert paired_layers(None, 4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert paired_layers(None, 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    with pytest.raises(UserError, match="the model has 2 layers"):
        paired_layers([(2, 0)], 2, 4)


def test_a_teacher_that_sees_other_documents_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained(tmp_path / "mamba")
    run = taught(tmp_path / "mamba", tmp_path / "mamba", "causal-lm")
    with pytest.raises(UserError, match=r"compress\.distill\.teacher=.*mamba can't train on rows of several documents"):
        Teacher(run, "cpu")
