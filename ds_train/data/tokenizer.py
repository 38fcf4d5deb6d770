"""Tokenizers: the embedded byte-level one, a model's own, or a BPE trained on the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ds_train.config import RunConfig
from ds_train.errors import user_error

END, PADDING, MASK = "<eos>", "<pad>", "<mask>"
SPECIAL = (END, PADDING, MASK)


def load_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names (`bytes`, `model`, hub id or folder); see `train_bpe` for trained ones.

    Raises:
        UserError: nothing can be loaded from that name.
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
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "give a local folder with tokenizer files, a hub id on a machine that reaches the hub, or bytes"
        raise user_error(key, f"no tokenizer can be loaded from there ({line})", fix, place) from error
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
    return _wrap(core)


def train_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, special ones included, trained on `texts`."""
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


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    specials = repr(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return hashlib.sha256((text + specials).encode()).hexdigest()


def load_saved(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that `save_pretrained` wrote into `folder`."""
    return AutoTokenizer.from_pretrained(folder)


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=len(core.get_vocab()) > 256)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PADDING, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def _byte_character(byte: int) -> str:
    # GPT-2's mapping: printable Latin-1 stands for itself, the rest is moved above 255 in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
