"""Which keys DeepSpeed's own source reads, so that raw `deepspeed:` keys can be checked; it ignores unknown ones.

Read from the installed source by its syntax, without importing it: keys from the calls that look one up in a
configuration dictionary, and from the fields of its config models.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_train.config.load import nearest
from ds_train.errors import Problem, outermost
from ds_train.plan.deepspeed_json import OWNED
from ds_train.plan.sources import classes, constants, package_folder
from ds_train.plan.translate import instead

# Files that read keys, and files where the names of those keys are defined.
_READERS = (
    "runtime/config.py", "runtime/zero/config.py", "runtime/precision_config.py", "monitor/config.py", "comm/config.py",
    "profiling/config.py", "runtime/activation_checkpointing/config.py", "runtime/swap_tensor/aio_config.py",
    "runtime/model_checkpointing/config.py", "runtime/tensor_parallel/config.py", "compile/config.py",
    "datastates/config.py", "utils/config.py",
)  # fmt: skip
_CONSTANTS = (
    *_READERS, "constants.py", "runtime/constants.py", "runtime/swap_tensor/constants.py", "comm/constants.py",
    "runtime/model_checkpointing/constants.py", "monitor/constants.py", "profiling/constants.py",
)  # fmt: skip
# Its `param_dict` is the checkpoint section, not the top level.
_NOT_TOP_LEVEL = frozenset({"runtime/model_checkpointing/config.py"})

# Names that DeepSpeed's source gives the dictionary of a section; "" is the top level.
_SECTION_VARIABLES = {
    "": ("param_dict", "_param_dict", "ds_config"),
    "aio": ("aio_dict",),
    "flops_profiler": ("flops_profiler_dict",),
    "activation_checkpointing": ("act_chkpt_config_dict",),
    "checkpoint": ("checkpoint_dict", "checkpoint_params"),
    "data_types": ("data_types_params",),
}

# Sections whose fields are one config model.
_SECTION_MODELS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.leaf_module": ("runtime/zero/leaf_module_config.py", "DeepSpeedZeroLeafModuleConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
    "timers.throughput": ("utils/config.py", "DeepSpeedThroughputTimerConfig"),
}
_MONITORS = ("monitor/config.py", "DeepSpeedMonitorConfig")

_MONITOR = ("a monitor of DeepSpeed that fails on rank 0 hangs the other ranks", "use RUN/metrics.jsonl or track.wandb")
_MEAN = ("gradients are those of the mean loss of the global batch", "leave it out")
_OWN_OPTIMIZER = ("it needs DeepSpeedCPUAdam, which isn't among the optimizers here", "leave it out")
_OWN_ORDER = ("the order of samples is a function of the seed and the position alone", "leave it out")
_OWN_CHECKPOINTS = (
    "checkpoints and exports are this trainer's own",
    "leave it out; `checkpoint` of the recipe says what is saved",
)
_UNREAD = ("nothing in DeepSpeed 0.19 looks at it", "leave it out")
_MASTER = ("the optimizer always keeps fp32 master weights and moments", "leave it out")

_EXPERTS = (
    "DeepSpeed's AutoEP fails with this transformers (it asks auto_ep_presets/base.py:326 for what isn't there)",
    "leave it out; parallel.tensor and parallel.zero_stage=3 spread a mixture's weights",
)

REFUSED: dict[str, tuple[str, str]] = {
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "gradient_allreduce_op": _MEAN,
    "prescale_gradients": _MEAN,
    "gradient_predivide_factor": _MEAN,
    "data_efficiency": (_OWN_ORDER[0], "leave it out; see `curriculum` and `token_drop` of the recipe"),
    "dataloader_drop_last": _OWN_ORDER,
    "disable_allgather": _UNREAD,
    "vocabulary_size": _UNREAD,
    "zero_optimization.allgather_partitions": _UNREAD,
    "zero_optimization.stage3_module_granularity_threshold": (
        "a whole model becomes one leaf, whose gradients are reduced before they are there (zero/stage3.py:1533)",
        "leave it out; leaf_module names modules",
    ),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ("there is no Muon here", "leave it out"),
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "fp16.fp16_master_weights_and_grads": _MASTER,
    "data_types.buffer_dtype": ("in 16 bits, rotary frequencies would lose positions", "leave it out"),
    "weight_quantization": ("its rounded weights never learn", "leave it out; see `compress.quantize` of the recipe"),
    "zero_optimization.zenflow": _OWN_OPTIMIZER,
    "zero_optimization.offload_optimizer.ratio": _OWN_OPTIMIZER,
    "zero_optimization.offload_optimizer.super_offload": _OWN_OPTIMIZER,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OWN_OPTIMIZER,
    "seq_parallel_communication_data_type": (
        "sequence ranks are data ranks to DeepSpeed here",
        "set deepspeed.communication_data_type",
    ),
    "zero_optimization.compute_grad_norm": ("every step reports the norm of its gradients", "leave it out"),
    "bf16.check_grad_overflow": ("steps with non-finite gradients never reach the weights", "leave it out"),
    "zero_optimization.legacy_stage1": ("its checkpoints and losses differ from stage 1's", "leave it out"),
    "expert_parallel": _EXPERTS,
    "use_data_before_expert_parallelism": _EXPERTS,
    "hybrid_engine": ("it is an engine for reinforcement learning, not for this step loop", "leave it out"),
    "autotuning": ("it ends the run after a few profiled steps", "leave it out"),
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
}
"""DeepSpeed keys that work against this trainer whatever their value: (reason, fix)."""

# What a recipe has in place of features that DeepSpeed has removed.
_REPLACED = {
    "amp": "leave it out; precision.dtype=bf16 or fp16 is mixed precision",
    "elasticity": "leave it out; a checkpoint resumes on any number of ranks",
    "curriculum_learning": "leave it out; `curriculum` of the recipe does this",
    "progressive_layer_drop": "leave it out; `layer_drop` of the recipe does this, its keep for theta",
    "zero_optimization.mics_shard_size": "leave it out; see parallel.secondary_partition",
}

# Where "auto" is a value that DeepSpeed itself resolves (runtime/constants.py:391).
_AUTO_ALLOWED = frozenset({"data_types.keep_in_fp32_modules"})


@dataclass(frozen=True)
class Field:
    """A key of a section: its type as DeepSpeed's config model writes it, "" where it writes none."""

    annotation: str = ""


def check_raw(raw: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with raw `deepspeed:` keys: the plan's own, refused, removed, unknown, of a wrong type, `auto`."""
    found = (_check_key(path, value) for path, value in _paths(raw))
    return outermost(problem for problem in found if problem is not None)


def known_key(path: str) -> bool:
    """Whether DeepSpeed reads the dotted key; keys of a section whose fields aren't known here count as read."""
    section, _, leaf = path.rpartition(".")
    known = section_fields(section)
    return (known is None or leaf in known) and (not section or known_key(section))


@cache
def section_fields(section: str) -> Mapping[str, Field] | None:
    """Keys of a section ("" for the top level) as JSON writes them; None where they can't be read from the source."""
    if section in _SECTION_MODELS:
        return _model_fields(*_SECTION_MODELS[section])
    if section in _SECTION_VARIABLES:
        files = [file for file in _READERS if section or file not in _NOT_TOP_LEVEL]
        pairs = [pair for file in files for pair in _looked_up_in(file, _SECTION_VARIABLES[section])]
        keys = dict(sorted(pairs, key=lambda pair: pair[1].annotation))  # where a key is read twice, its type stays
        extra = {*(_model_fields(*_MONITORS) or ()), "sequence_parallel_size"} if section == "" else set()
        return dict.fromkeys(extra | _subsections(section), Field()) | keys or None
    return dict.fromkeys(_subsections(section), Field()) or None


@cache
def removed_keys() -> dict[str, str]:
    """Keys that this DeepSpeed refuses because their feature is gone, with its own first sentence about each."""
    tree = _parse("runtime/config.py")
    removed: dict[str, str] = {}
    for node in tree.body if tree else []:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        prefix = {"_REMOVED_TOP_LEVEL_CONFIG_KEYS": "", "_REMOVED_ZERO_CONFIG_KEYS": "zero_optimization."}.get(name)
        if prefix is not None and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, message in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant):
                    removed[prefix + str(key.value)] = _first_sentence(message)
    return removed


def _check_key(path: str, value: Any) -> Problem | None:
    key = f"deepspeed.{path}"
    if path in OWNED:
        return Problem(key, "the plan writes this key", instead(path, value), value)
    if path in REFUSED:
        return Problem(key, *REFUSED[path], value)
    if path in removed_keys():
        return Problem(key, removed_keys()[path], _REPLACED.get(path, "leave it out"), value)
    if value == "auto" and path not in _AUTO_ALLOWED:
        return Problem(key, 'DeepSpeed drops "auto" without a word and takes its own default', "leave it out", value)
    if not known_key(path):
        return _unknown(path, value)
    if _is_section(path) and not isinstance(value, Mapping):
        return Problem(key, "this is a section", "write keys under it", value)
    return _wrong_type(path, value)


def _unknown(path: str, value: Any) -> Problem:
    section, _, leaf = path.rpartition(".")
    known = sorted(section_fields(section) or ())
    prefix = f"deepspeed.{section}." if section else "deepspeed."
    alias = next((field for field in known if field.removeprefix("stage3_") == leaf), None)
    guess = alias or nearest(leaf, known)
    if guess is None:  # right word, wrong section
        prefix, guess = next(
            ((f"deepspeed.{place}.", leaf) for place in _SECTION_MODELS if leaf in (section_fields(place) or ())),
            (prefix, None),
        )
    fix = f"did you mean `{prefix}{guess}`?" if guess else "leave it out"
    return Problem(f"deepspeed.{path}", "DeepSpeed reads no such key", fix, value)


def _wrong_type(path: str, value: Any) -> Problem | None:
    section, _, leaf = path.rpartition(".")
    annotation = (section_fields(section) or {}).get(leaf, Field()).annotation.replace("Optional[bool]", "bool")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "bool": isinstance(value, bool),
        "int": number and float(value).is_integer(),
        "float": number,
        "str": isinstance(value, str),
    }
    if fits.get(annotation, True):
        return None
    kind = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[annotation]
    fix = "write one, without quotes" if annotation != "str" else "write some"
    return Problem(f"deepspeed.{path}", f"DeepSpeed takes {kind} here", fix, value)


def _is_section(path: str) -> bool:
    return path in _SECTION_MODELS or path in _SECTION_VARIABLES or bool(_subsections(path))


def _subsections(section: str) -> set[str]:
    """Names of the sections right under `section`, of those that we know."""
    prefix = f"{section}." if section else ""
    places = [place for place in (*_SECTION_MODELS, *_SECTION_VARIABLES) if place and place.startswith(prefix)]
    return {place[len(prefix) :].split(".")[0] for place in places}


def _model_fields(file: str, class_name: str) -> dict[str, Field] | None:
    tree = _parse(file)
    node = classes(tree).get(class_name) if tree else None
    if node is None:
        return None
    fields: dict[str, Field] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            keywords = statement.value.keywords if isinstance(statement.value, ast.Call) else []
            values = [word.value for word in keywords if word.arg == "alias"]
            aliases = [value.value for value in values if isinstance(value, ast.Constant)]
            # DeepSpeed takes the field's name too, but where both are given the alias wins, and the plan writes that.
            name = str(aliases[0]) if aliases else statement.target.id
            fields[name] = Field(ast.unparse(statement.annotation))
    return fields


@cache
def _constants() -> dict[str, Any]:
    """Names that the source gives to keys and to their defaults."""
    found: dict[str, Any] = {}
    for file in _CONSTANTS:
        tree = _parse(file)
        found.update(constants(tree) if tree else {})
    return found


def _looked_up_in(file: str, variables: tuple[str, ...]) -> list[tuple[str, Field]]:
    tree = _parse(file)
    return [pair for node in ast.walk(tree) for pair in _looked_up(node, variables)] if tree else []


def _looked_up(node: ast.AST, variables: tuple[str, ...]) -> list[tuple[str, Field]]:
    """Keys that a piece of syntax looks up in a dictionary of one of these names, with the types of their defaults."""

    def is_ours(part: ast.expr) -> bool:
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        return name in variables

    candidates: list[ast.expr] = []
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and is_ours(node.func.value):
            candidates = node.args[:1]  # param_dict.get(KEY)
        elif any(is_ours(argument) for argument in node.args):
            candidates = node.args[1:2]  # get_scalar_param(param_dict, KEY, default)
    elif isinstance(node, ast.FunctionDef) and any(argument.arg in variables for argument in node.args.args):
        candidates = node.args.defaults  # get_communication_data_type(param_dict, comm_type=KEY)
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        right = node.comparators[0]
        right = right.func.value if isinstance(right, ast.Call) and isinstance(right.func, ast.Attribute) else right
        candidates = [node.left] if is_ours(right) else []  # KEY in param_dict.keys()
    elif isinstance(node, ast.Subscript) and is_ours(node.value):
        candidates = [node.slice]  # param_dict[KEY]
    names = [part.id for part in candidates if isinstance(part, ast.Name)]
    literals = [part.value for part in candidates if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    named = [(_constants()[name], _of_default(f"{name}_DEFAULT")) for name in names if name in _constants()]
    return [(key, Field()) for key in literals] + [(key, kind) for key, kind in named if isinstance(key, str)]


def _of_default(name: str) -> Field:
    """The type of a key whose default has that name in the source: bool, int and float say it, other defaults don't."""
    kind = type(_constants().get(name)).__name__
    return Field(kind if kind in ("bool", "int", "float") else "")


def _first_sentence(node: ast.expr) -> str:
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(piece.value) for piece in pieces if isinstance(piece, ast.Constant))
    return text.split(". ")[0].rstrip(". ")


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found


@cache
def _parse(file: str) -> ast.Module | None:
    path = package_folder("deepspeed") / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
