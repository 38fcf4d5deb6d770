"""What a rule of the table may look at, worked out once from recipe, cluster and installed sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.batch import settled
from ds_train.config.data import BYTES_VOCABULARY
from ds_train.plan.model_size import ModelSize, model_size, of_kept_layers, read_config
from ds_train.plan.outline import Outline, outline
from ds_train.plan.shares import Shares
from ds_train.plan.stage import effective_stage
from ds_train.plan.topology import Cluster
from ds_train.plan.transformers_keys import config_fields, supports

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder, whose recipe and export stand in it."""
    return (folder / "recipe.yaml").is_file()


def model_folder(source: Path) -> Path:
    """The transformers folder that stands for `source`: a run's export, or itself."""
    return source / "export" if is_run(source) else source


def has_tokenizer(path: str) -> bool:
    """Whether a model's folder has a tokenizer beside the weights; yes for a hub id."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).is_file() for name in _TOKENIZER_FILES)


@dataclass(frozen=True)
class Facts:
    """A recipe on a cluster, and what follows from the two."""

    run: RunConfig
    cluster: Cluster

    @cached_property
    def size(self) -> ModelSize | None:
        """Sizes of the model; None for a hub id that isn't on this machine."""
        return model_size(self.run.model, self.run.task.kind, self.vocabulary)

    @cached_property
    def outline(self) -> Outline | None:
        """Parameters and plans of the model; None where its config isn't known here, or its code isn't understood."""
        keys = self._model_keys
        if self.arch is None or keys is None:
            return None
        return outline(self.arch, self.run.task.kind, keys)

    @cached_property
    def shares(self) -> Shares | None:
        """How the model can be cut; None where `outline` is."""
        if self.arch is None or self.outline is None:
            return None
        return Shares(self.outline, self.arch, self.run.data.sequence_length)

    def on(self, run: RunConfig) -> Facts:
        """The facts of another recipe of the same model and data on the same cluster, without working them out anew."""
        other = Facts(run, self.cluster)
        other.__dict__.update({name: getattr(self, name) for name in ("size", "outline", "shares")})
        return other

    @property
    def arch(self) -> str | None:
        """The family: from the recipe, or from the config.json beside the weights; None for an unknown hub id."""
        return self.size.arch if self.size is not None else self.run.model.arch

    @property
    def stage(self) -> int:
        """The ZeRO stage that really runs."""
        return effective_stage(self.run)[0]

    @property
    def fixed_ranks(self) -> int:
        """Ranks of one copy of the model; the number of ranks is a multiple of it."""
        return self.pipeline * self.tensor * self.sequence

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return settled(self.run.parallel.pipeline)

    @property
    def tensor(self) -> int:
        """Tensor ranks."""
        return settled(self.run.parallel.tensor)

    @property
    def sequence(self) -> int:
        """Sequence ranks."""
        return settled(self.run.parallel.sequence)

    @property
    def vocabulary(self) -> int | None:
        """Tokens of the tokenizer, where it is known before the tokenizer is loaded or trained."""
        data = self.run.data
        return data.train_vocabulary or (BYTES_VOCABULARY if data.tokenizer == "bytes" else None)

    @property
    def config_keys(self) -> dict[str, Any]:
        """Every key that the family's transformers config takes; empty where they aren't known."""
        return config_fields(self.arch) if self.arch else {}

    @property
    def _model_keys(self) -> Mapping[str, Any] | None:
        """Keys of the model's config as training will build it; None for a hub id that isn't on this machine."""
        run = self.run
        keys: dict[str, Any] = dict(run.model.config)
        if run.task.kind == "sequence-classification":
            keys["num_labels"] = run.task.num_labels
        if run.model.path is None:
            if "vocab_size" not in keys:
                if self.vocabulary is None:
                    return None
                keys["vocab_size"] = self.vocabulary
            return keys
        stored = read_config(run.model.path, run.model.revision)
        return of_kept_layers(stored, run.model.keep_layers) | keys if stored is not None else None

    def supports(self, flag: str) -> bool:
        """Whether the family's models have what a class attribute of transformers says; yes where it isn't known."""
        return self.arch is None or supports(self.arch, flag) is not False

    def value(self, key: str) -> Any:
        """What stands at a dotted recipe key; None where nothing does."""
        value: Any = self.run
        for part in key.split("."):
            if value is self.run.model and part not in type(self.run.model).model_fields:
                value = self.run.model.config.get(part)
            else:
                value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        return value

    def raw(self, key: str) -> Any:
        """What stands at a dotted key of the raw `deepspeed:` section; None where nothing does."""
        return self.value(f"deepspeed.{key}")

    @property
    def own_tokenizer(self) -> bool:
        """Whether the pretrained model has a tokenizer of its own, as far as this machine can tell."""
        path = self.run.model.path
        return path is not None and has_tokenizer(path)

    @property
    def weights_missing(self) -> bool:
        """Whether `model.path` is a folder, by its look, without a config.json."""
        path = self.run.model.path
        if path is None or not self.cluster.here:
            return False
        looks_local = path.startswith((".", "/", "~")) or Path(path).is_dir()
        return looks_local and read_config(path) is None
