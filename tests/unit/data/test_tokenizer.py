"""The embedded tokenizer, trained ones, loaded ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_train.config import RunConfig
from ds_train.config.data import BYTES_VOCABULARY
from ds_train.data.tokenizer import Encoder, byte_tokenizer, fingerprint, load_saved, load_tokenizer, train_bpe
from ds_train.errors import UserError

TEXTS = [
    "",
    "plain",
    " \t\r\n  x ",
    "é ü 漢字 😀 👩‍👩‍👧",
    "a\x00b\x7f\x85\u2028\ufeff",
    "<eos><mask> <pad>",
    "e\u0301 ½ ﬁ",
    "\n" * 9,
]


def any_text(seed: int, size: int = 300) -> str:
    draw = random.Random(seed)
    ranges = [(0, 127), (128, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(size))


def words(vocabulary: list[str], **specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, as a stand-in for a loaded one."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=vocabulary[0], **specials)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("text", [*TEXTS, *map(any_text, range(20))])
def test_bytes_are_their_own_tokens_and_come_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "<eos> in a text is a token to whoever prompts"


def test_the_embedded_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTES_VOCABULARY == 259
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (256, 257, 258)


def test_saved_tokenizers_come_back_the_same(tmp_path: Path) -> None:
    for name, tokenizer in {"bytes": byte_tokenizer(), "bpe": train_bpe(TEXTS, 300)}.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_saved(tmp_path / name)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_training_is_deterministic_and_reversible() -> None:
    texts = [any_text(seed) + "the quick brown fox jumps over the lazy dog " * 5 for seed in range(5)]
    one, two = train_bpe(texts, 320), train_bpe(iter(texts), 320)
    assert fingerprint(one) == fingerprint(two) != fingerprint(train_bpe(texts, 319))
    assert len(one) == 320
    assert len(one("the quick brown fox")["input_ids"]) < 19, "merges were learnt"
    for text in [*TEXTS, any_text(99)]:
        assert one.decode(one(text, split_special_tokens=True)["input_ids"]) == text


def test_fingerprints_tell_tokenizers_apart_and_forget_how_they_were_used() -> None:
    tokenizer = byte_tokenizer()
    before = fingerprint(tokenizer)
    tokenizer(["abc", "d"], truncation=True, max_length=2, padding=True)
    assert fingerprint(tokenizer) == before
    tokenizer.eos_token = "<mask>"
    assert fingerprint(tokenizer) != before, "another token ends the documents"


@pytest.mark.parametrize("classify", [False, True])
def test_the_encoder_equals_the_tokenizer(classify: bool) -> None:
    texts = [text for text in [*TEXTS, any_text(3)] if text]
    for tokenizer in (byte_tokenizer(), train_bpe(texts, 300)):
        encode = Encoder(tokenizer, own=True, classify=classify, length=7)
        plain = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
        expected = [ids[:7] if classify else [*ids, tokenizer.eos_token_id] for ids in plain]
        assert [ids.tolist() for ids in encode(texts)] == expected


def test_loaded_tokenizers_end_documents_with_what_they_have() -> None:
    vocabulary = ["?", "a", "b", "[SEP]", "</s>", "<tool>"]
    for specials, end in (({"eos_token": "</s>", "sep_token": "[SEP]"}, [4]), ({"sep_token": "[SEP]"}, [3]), ({}, [])):
        encode = Encoder(words(vocabulary, **specials), own=False, classify=False, length=8)
        assert [ids.tolist() for ids in encode(["a b", "b"])] == [[1, 2, *end], [2, *end]]


def test_a_loaded_tokenizer_without_padding_pads_with_its_end(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    words(["?", "a", "</s>"], eos_token="</s>").save_pretrained(tmp_path / "words")
    assert load_tokenizer(recipe(data={"tokenizer": str(tmp_path / "words")})).pad_token_id == 2
    model = load_tokenizer(recipe(data={"tokenizer": "model"}, model={"path": str(tmp_path / "words")}))
    assert model.get_vocab() == {"?": 0, "a": 1, "</s>": 2}


def test_tokenizers_that_cannot_be_loaded_are_one_line(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for run, start in (
        (recipe(data={"tokenizer": str(empty)}), f"data.tokenizer={empty}"),
        (recipe(data={"tokenizer": "model"}, model={"path": str(empty)}), f"model.path={empty}"),
    ):
        with pytest.raises(UserError) as caught:
            load_tokenizer(run)
        assert str(caught.value).startswith(start)
        assert len(str(caught.value).splitlines()) == 1


def test_masking_needs_a_mask(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    words(["?", "a", "</s>"], eos_token="</s>").save_pretrained(tmp_path / "words")
    run = recipe(data={"tokenizer": str(tmp_path / "words")}, task={"kind": "masked-lm"})
    with pytest.raises(UserError, match=r"data.tokenizer=.*no mask token"):
        load_tokenizer(run)
