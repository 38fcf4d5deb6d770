"""Tokenizers: the embedded byte-level one, a model's own, or a BPE trained on the data."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ds_train.config import RunConfig
from ds_train.errors import first_line, user_error

END, PADDING, MASK = "<eos>", "<pad>", "<mask>"
SPECIAL = (END, PADDING, MASK)


def load_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names (`bytes`, `model`, hub id or folder); see `train_bpe` for trained ones.

    Raises:
        UserError: nothing can be loaded from that name, or it has no mask token and the task is `masked-lm`.
    """
    name = run.data.tokenizer
    if name == "bytes":
        return byte_tokenizer()
    key, place = ("model.path", str(run.model.path)) if name == "model" else ("data.tokenizer", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place,
            revision=run.model.revision or "main" if name == "model" else "main",
            trust_remote_code=run.model.trust_remote_code,
        )
    except Exception as error:  # missing files, no network, broken json: transformers raises many kinds
        fix = "give a local folder with tokenizer files, a hub id on a machine that reaches the hub, or bytes"
        raise user_error(key, f"no tokenizer can be loaded from there ({first_line(error)})", fix, place) from error
    if run.task.kind == "masked-lm" and tokenizer.mask_token_id is None:
        fix = "choose one that has, bytes, or data.train_vocabulary"
        raise user_error("data.tokenizer", "this tokenizer has no mask token, which masked-lm needs", fix, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, whose id is the byte's value; then end of text (256), padding (257) and mask (258).

    Any text survives encoding and decoding unchanged.
    """
    # ByteLevel writes byte b as one printable character; its alphabet in the order of the bytes gives id = byte.
    vocabulary = {_byte_character(byte): byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap(core)


def train_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, special ones included, trained on `texts`; smaller if they are few."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _wrap(core)


class Encoder:
    """Text -> token ids of documents, as `prepare` stores them.

    A language model's document is its text and then the end-of-text token (or the separator, where there is no
    other), without further special tokens. A classifier's text has its special tokens and is cut to `length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: bool, classify: bool, length: int) -> None:
        self._tokenizer: Any = tokenizer
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self._end = None if classify else end
        self._length = length if classify else None
        self._bytes = fingerprint(tokenizer) == fingerprint(byte_tokenizer())
        self._options: dict[str, Any] = {
            "return_attention_mask": False,
            "return_token_type_ids": False,
            "verbose": False,
        }
        if own:
            # "<mask>" in a text is six characters to our own tokenizers; loaded ones decide for themselves.
            self._options["split_special_tokens"] = True
        if classify:
            self._options |= {"truncation": True, "max_length": length}
        else:
            self._options["add_special_tokens"] = False

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids, (tokens,) int64, of each text."""
        if self._bytes:  # what the tokenizer gives, without making an object of each byte
            rows: Any = [np.frombuffer(text.encode(), np.uint8)[: self._length] for text in texts]
        else:
            rows = self._tokenizer(list(texts), **self._options)["input_ids"]
        ids = [np.asarray(row, dtype=np.int64) for row in rows]
        return ids if self._end is None else [np.append(row, self._end) for row in ids]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which is more than the number of tokens where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        core = json.loads(backend.to_str())
        # Encoding with a length leaves its mark in these two; whoever encodes says them anew.
        core.pop("truncation", None)
        core.pop("padding", None)
    module = sys.modules[type(tokenizer).__module__]
    if module.__name__.startswith("transformers_modules."):  # code that came with it may do anything
        core = [core, inspect.getsource(module)]
    specials = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(json.dumps([core, specials], sort_keys=True).encode()).hexdigest()


def load_saved(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer that `save_pretrained` wrote into `folder`, with the code of its own where it has any."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, eos_token=END, pad_token=PADDING, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def _byte_character(byte: int) -> str:
    # GPT-2's mapping: printable Latin-1 stands for itself, the rest is moved above 255 in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
