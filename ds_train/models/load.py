"""A recipe -> a transformers model, from weights or from scratch, the same at every ZeRO stage.

Weights that start at random are drawn module by module, each from a seed made of the run's seed and the
module's name. So they don't depend on the number of ranks, on the stage, or on which other modules a rank holds.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, prevent_arange_dtype_change

from ds_train.config import RunConfig
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.fewer_layers import config_of_layers
from ds_train.plan.model_size import first_position
from ds_train.schedule.seeds import fold_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

AUTO_CLASSES = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
}


def load_model_config(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The transformers config of the recipe's model, with the vocabulary and special tokens of the tokenizer.

    Raises:
        UserError: unknown family, a key or value that the family's config refuses, a path that can't be loaded,
            or a vocabulary smaller than the tokenizer's.
    """
    keys = dict(run.model.config)
    tokens = max(tokenizer.get_vocab().values()) + 1  # not their number: some tokenizers leave ids out
    if run.task.kind == "sequence-classification":
        keys["num_labels"] = run.task.num_labels
    if run.model.path is None:
        keys.setdefault("vocab_size", tokens)
        keys.update(_special_tokens(tokenizer))
        config = _config_from_scratch(str(run.model.arch), keys)
    else:
        config = _config_of_pretrained(run, keys)
        if run.model.keep_layers is not None:
            try:
                config = config_of_layers(config, run.model.keep_layers)
            except ValueError as error:
                fix = "leave it out for this family"
                raise user_error("model.keep_layers", str(error), fix, run.model.keep_layers) from error
        # GPT-like classifiers look for the last token that isn't padding, and the tokenizer pads.
        if run.task.kind == "sequence-classification" or getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if getattr(config, "output_router_logits", False):
        reason = "the routers' auxiliary loss isn't part of the loss here"
        raise user_error("model.output_router_logits", reason, "set false", "true")
    config.use_cache = False
    vocabulary = config.get_text_config().vocab_size
    if vocabulary < tokens:
        largest = "" if tokens == len(tokenizer) else f", and the largest is number {tokens - 1}"
        raise user_error(
            "model.vocab_size",
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens{largest}",
            f"set model.vocab_size to {tokens} or more, or data.tokenizer to the model's own",
            vocabulary,
        )
    return config


def position_of_first(config: PreTrainedConfig) -> int:
    """The position id of a sample's first token: 0, but for RoBERTa and its like."""
    return first_position(config.model_type, getattr(config, "pad_token_id", None))


def build_model(
    run: RunConfig,
    config: PreTrainedConfig,
    deepspeed_json: dict[str, Any],
    zero_stage: int,
    cut: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """The model in the run's dtype, on the CPU (stages 0-2) or already partitioned over ranks (stage 3).

    torch.distributed must be initialised for stage 3; no rank then ever holds more than one module's weights. A
    pretrained one has the names of modules that its files lack weights of, such as a new head, in `drawn_modules`.
    With `cut` (stages 0-2), the part that it leaves of a model: no memory is taken for the rest and no weights of it
    are read, and the part's weights are those of the whole.
    """
    try:
        if run.model.path is not None:
            model = _pretrained_model(run, config, deepspeed_json, zero_stage, cut)
        elif cut is not None:
            model = outline(run, config)
            _cut_part(model, cut)
            model.to_empty(device="cpu")
            initialize_weights(model, run.seed)
        else:
            model = _random_model(run, config, deepspeed_json if zero_stage == 3 else None)
            initialize_weights(model, run.seed)
    except (ValueError, ImportError, KeyError) as error:
        raise user_error(
            "model", first_line(error), "see the model's page in the transformers documentation"
        ) from error
    if run.model.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise user_error(
                "model.activation_checkpointing", f"{type(model).__name__} has no support for it", "set false"
            )
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def without_weights(run: RunConfig, config: PreTrainedConfig) -> RunConfig:
    """The recipe of a model of this config from scratch."""
    model = run.model.model_copy(update={"path": None, "arch": config.model_type})
    return run.model_copy(update={"model": model})


def keep_generation_config(run: RunConfig, model: PreTrainedModel) -> None:
    """Give a model whose weights come from a checkpoint the generation settings of the recipe's pretrained one.

    Where that has none, they stay those that follow from the config.
    """
    if run.model.path is not None and hasattr(model, "generation_config"):  # classifiers have none
        with contextlib.suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                run.model.path, revision=run.model.revision or "main"
            )


@contextlib.contextmanager
def not_waiting() -> Iterator[None]:
    """This rank loads and runs what is packed in the block, whatever others do.

    compressed-tensors divides packing and, at the first forward pass, unpacking among all ranks of the process group,
    and waits for them (distributed/module_parallel.py:89).
    """
    plain = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = plain


def outline(run: RunConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model without memory for its weights (torch's meta device), its tied weights tied."""
    with torch.device("meta"):
        model = _random_model(run, config, None)
    model.tie_weights()
    return model


def first_names(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter, by each name that it has; an outline will do."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def untrained(model: nn.Module) -> list[str]:
    """What a model is loaded with and no optimizer trains, such as a router's correction: no checkpoint has it."""
    trained = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    return [name for name in model.state_dict() if name not in trained]


def initialize_weights(model: PreTrainedModel, seed: int, only: set[str] | None = None) -> None:
    """Draw the weights of `model` with its family's own rules, each module from its own seed.

    `only` names the modules that are drawn; None draws all. Tied weights are the input embedding's. Partitioned
    parameters (ZeRO-3) are gathered a module at a time. Source of the walk: transformers'
    `PreTrainedModel.initialize_weights`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, owner, module in _post_order(model, "", model):
            if only is not None and name not in only:
                continue
            torch.manual_seed(fold_seed(seed, name))
            # `_init_weights` may also write to its direct children's parameters.
            parameters = [*module.parameters(recurse=False)]
            for child in module.children():
                if not isinstance(child, PreTrainedModel):
                    parameters.extend(child.parameters(recurse=False))
            with gathered(parameters, modify=True), _on_host(parameters):
                owner._init_weights(module)
    if model.all_tied_weights_keys:  # a part of a model has none
        model.tie_weights()


def shares_embedding(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the input embedding's."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def matrix_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in matrix products: all matrices but an input embedding that isn't the head too."""
    embedding, tied = model.get_input_embeddings().weight, shares_embedding(model)
    matrices = (parameter for parameter in model.parameters() if parameter is not embedding or tied)
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in matrices)
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Whole parameters inside the block, also where ZeRO-3 has partitioned them; `modify` keeps rank 0's edits."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


@contextlib.contextmanager
def _on_host(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters that ZeRO-3 has gathered on a device are on the CPU inside the block: its generator draws others."""
    places = [(parameter, parameter.data) for parameter in parameters if parameter.device.type not in ("cpu", "meta")]
    for parameter, place in places:
        parameter.data = place.cpu()
    try:
        yield
    finally:
        for parameter, place in places:
            parameter.data = place.copy_(parameter.data)


def _post_order(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterator[tuple[str, PreTrainedModel, nn.Module]]:
    """(name, the model whose rules apply, module), children before parents."""
    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _post_order(child, f"{name}.{child_name}" if name else child_name, child_owner)
    yield name, owner, module


def _cut_part(model: PreTrainedModel, cut: Callable[[PreTrainedModel], None]) -> None:
    cut(model)
    model.all_tied_weights_keys = {}  # whoever shares a weight across parts keeps it equal


def _random_model(run: RunConfig, config: PreTrainedConfig, zero3_json: dict[str, Any] | None) -> PreTrainedModel:
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if zero3_json is not None:
            import deepspeed

            stack.enter_context(prevent_arange_dtype_change())
            # Without a dtype: one that is given counts only where the processor has fp16, and is bf16 elsewhere
            # (partition_parameters.py, Init._set_dtype). The JSON says it too.
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero3_json))
        auto_class: Any = AUTO_CLASSES[run.task.kind]
        return auto_class.from_config(
            config,
            dtype=DTYPES[run.precision.dtype],
            trust_remote_code=run.model.trust_remote_code,
            **_attention(run),
        )


def _attention(run: RunConfig) -> dict[str, str]:
    return {} if run.model.attention == "auto" else {"attn_implementation": run.model.attention}


def _pretrained_model(
    run: RunConfig,
    config: PreTrainedConfig,
    deepspeed_json: dict[str, Any],
    zero_stage: int,
    cut: Callable[[PreTrainedModel], None] | None,
) -> PreTrainedModel:
    # transformers partitions while it loads only if such an object is alive (deepspeed-rules: silent otherwise).
    alive = HfDeepSpeedConfig(deepspeed_json) if zero_stage == 3 else None
    family = type(outline(run, config)) if cut is not None else None
    loader: Any = AUTO_CLASSES[run.task.kind] if family is None else _part_of(family, cut)
    try:
        model, info = loader.from_pretrained(
            run.model.path,
            config=config,
            dtype=DTYPES[run.precision.dtype],
            revision=run.model.revision or "main",
            trust_remote_code=run.model.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_fit` refuses: transformers only points to a log that is off
            **_attention(run),
        )
    except (OSError, SafetensorError) as error:
        raise _cannot_load(run, error) from error
    except RuntimeError as error:
        mismatch = re.search(r"size mismatch for .*", str(error))  # of ZeRO-3, on the rank that reads
        if mismatch is None:
            raise
        raise _unfit(run, mismatch[0].rstrip(".")) from error
    finally:
        del alive
    _check_fit(run, model, info)
    if family is not None:
        model.__class__ = family
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    model.drawn_modules = sorted(missing)
    if missing:
        # A new head, say: drawn again from its own seed, so that it is the same at every stage.
        for name in missing:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        initialize_weights(model, run.seed, only=missing)
    return model


def _check_fit(run: RunConfig, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse weights of other sizes, and files without one of the layers: it would begin at random, in silence."""
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise _unfit(run, f"{name} is {tuple(stored)} there and {tuple(wanted)} by the recipe")
    for name, layers in model.named_modules():
        for number, layer in layers.named_children() if isinstance(layers, nn.ModuleList) else ():
            own = {f"{name}.{number}.{inner}" for inner, _ in layer.named_parameters()}
            if own and own <= {*info["missing_keys"]}:
                raise _unfit(run, f"there is nothing of {name}.{number} in its files")


def _part_of(family: Any, cut: Any) -> Any:
    """The family's class, cut as soon as its modules are there and before weights are read."""

    def build(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        family.__init__(self, *arguments, **options)
        _cut_part(self, cut)

    return type(family.__name__, (family,), {"__init__": build, "__module__": family.__module__})


def _config_from_scratch(arch: str, keys: dict[str, Any]) -> PreTrainedConfig:
    try:
        return transformers.AutoConfig.for_model(arch, **keys)
    except UserError:
        raise
    except Exception as error:  # every config class validates in its own way
        raise user_error("model", f"{arch}: {first_line(error)}", "correct the key that it names") from error


def _config_of_pretrained(run: RunConfig, keys: dict[str, Any]) -> PreTrainedConfig:
    try:
        config, unread = transformers.AutoConfig.from_pretrained(
            str(run.model.path),
            revision=run.model.revision or "main",
            trust_remote_code=run.model.trust_remote_code,
            return_unused_kwargs=True,
            **keys,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(run, error) from error
    except StrictDataclassError as error:
        raise user_error("model", first_line(error), "correct the key that it names, or leave it out") from error
    if unread:
        key, value = next(iter(unread.items()))
        fix = "correct it by the config.json there, or leave it out"
        raise user_error(f"model.{key}", f"the config of {run.model.path} has no such key", fix, value)
    return config


def _cannot_load(run: RunConfig, error: Exception) -> UserError:
    return user_error(
        "model.path",
        f"no model can be loaded from there ({first_line(error)})",
        "give a local folder with config.json and weights, or a hub id on a machine that reaches the hub",
        run.model.path,
    )


def _unfit(run: RunConfig, reason: str) -> UserError:
    fix = "leave the model's sizes and task.num_labels as its config.json has them, or give other weights"
    return user_error("model.path", reason, fix, run.model.path)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}
