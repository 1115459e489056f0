"""Examples token by token: against decoding all that came before, and in linear time."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from srppo.data.reporting import token_texts

TEXTS = [
    "What is the answer? The answer is 12 .\n\nhello  there",
    " Ünïcode, 漢字 and \N{GRINNING FACE} in bytes",
    "",
]


def by_prefixes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """What decoding each prefix adds to the last one that ended with a whole character."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(before) :] if whole else "")
        before = text if whole else before
    return texts


@pytest.mark.parametrize("text", TEXTS)
def test_token_texts_are_what_each_prefix_adds(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert token_texts(tokenizer, ids) == by_prefixes(tokenizer, ids)


def test_token_texts_read_each_token_a_few_times_only(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the tokens: most of these end in half a character."""
    ids = random.Random(0).choices(range(len(tokenizer)), k=500)
    decode, read = tokenizer.decode, []

    def counted(ids: list[int], **options: bool) -> str:
        read.append(len(ids))
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert len(token_texts(tokenizer, ids)) == 500
    assert sum(read) < 20 * 500


def test_special_tokens_are_visible_and_the_pieces_join_to_the_text(
    tokenizer: PreTrainedTokenizerFast,
):
    ids = [*tokenizer.encode("the answer", add_special_tokens=False), tokenizer.eos_token_id]
    pieces = token_texts(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].strip() == tokenizer.eos_token


def test_bytes_that_only_together_are_a_character():
    class Bytes:
        def decode(self, ids: list[int], **options: bool) -> str:
            return bytes(ids).decode("utf-8", "replace")

    assert token_texts(Bytes(), list("aé".encode())) == ["a", "", "é"]  # type: ignore[arg-type]
