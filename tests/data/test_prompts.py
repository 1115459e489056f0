import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loading import demonstrations, prompts
from srppo.errors import DataError

Write = Callable[[list[Any]], str]
LIMITS: dict[str, Any] = {"max_prompt_tokens": 60, "limit": None, "seed": 3, "split": "train"}
ROWS = [{"prompt": f"q{i}", "response": f"r{i}", "group": i} for i in range(40)]
CONTENT = st.sampled_from(["a", "b", "c", "d", "", " a ", "long " * 40, "</s>"]) | st.none()
ROW = st.lists(CONTENT, max_size=4).map(
    lambda contents: {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": content}
            for i, content in enumerate(contents)
        ]
    }
)


def test_prompts_equal_the_prompts_of_demonstrations(
    tokenizer: PreTrainedTokenizerFast, write: Write
):
    source = write(ROWS)
    examples, _ = demonstrations(source, tokenizer, **LIMITS, max_response_tokens=9)
    found, report = prompts(source, tokenizer, **LIMITS)
    assert [prompt.ids for prompt in found] == [example.prompt_ids for example in examples]
    assert found[0].meta == examples[0].meta | {"response": f"r{examples[0].meta['group']}"}
    assert report.response_tokens == {}
    assert report.prompt_tokens["max"] == max(len(prompt.ids) for prompt in found)


def test_text_is_what_the_ids_spell(tokenizer: PreTrainedTokenizerFast, write: Write):
    [prompt], _ = prompts(write([{"prompt": "hello 12?"}]), tokenizer, **LIMITS)
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert "hello 12?" in prompt.text


def test_skip_continues_where_demonstrations_end(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    """Rows that are prompts only (no response) or neither do not shift the border."""
    rows = [r for row in ROWS for r in (row, {"prompt": f"only {row['group']}", "response": ""})]
    source = write(rows)
    limits = LIMITS | {"limit": 15}
    examples, before = demonstrations(source, plain_tokenizer, **limits, max_response_tokens=9)
    found, report = prompts(source, plain_tokenizer, **limits, skip=before.looked_at)
    assert len(examples) == len(found) == 15
    assert report.skipped == before.used + sum(before.dropped.values())
    assert report.rows == report.used + report.skipped + report.not_needed
    spent = {tuple(example.prompt_ids) for example in examples}
    assert not spent & {tuple(prompt.ids) for prompt in found}
    everything, _ = prompts(source, plain_tokenizer, **LIMITS)
    behind, _ = prompts(source, plain_tokenizer, **LIMITS, skip=before.looked_at)
    assert behind == everything[before.looked_at :]


@settings(max_examples=60)
@given(
    st.lists(ROW | st.just("no row"), max_size=14),
    st.integers(1, 5),
    st.integers(0, 3),
    st.sampled_from(["all", "last"]),
)
def test_demonstrations_and_prompts_are_disjoint_whatever_the_rows(
    plain_tokenizer: PreTrainedTokenizerFast, rows: list[Any], count: int, seed: int, turns: str
):
    limits = LIMITS | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            examples, before = demonstrations(
                str(path),
                plain_tokenizer,
                **limits | {"limit": count},
                max_response_tokens=9,
                turns=turns,
            )
            found, report = prompts(str(path), plain_tokenizer, **limits, skip=before.looked_at)
        except DataError:
            return
    spent = {tuple(example.prompt_ids) for example in examples}
    assert not spent & {tuple(prompt.ids) for prompt in found}
    assert report.rows == report.used + report.skipped + sum(report.dropped.values())


def test_a_prompt_of_a_skipped_row_does_not_come_back(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    """One question, many answers: each is a demonstration of its own, but one prompt."""
    rows = [{"prompt": "same", "response": f"r{i}"} for i in range(6)]
    source = write([*rows, {"prompt": "other", "response": "r"}])
    found, report = prompts(source, plain_tokenizer, **LIMITS)
    assert (len(found), report.dropped) == (2, {"duplicate": 5})
    found, report = prompts(source, plain_tokenizer, **LIMITS | {"seed": 0}, skip=2)
    assert [prompt.text.count("same") for prompt in found] == [0]


def test_skip_of_all_rows_names_the_cure(plain_tokenizer: PreTrainedTokenizerFast, write: Write):
    with pytest.raises(DataError, match=r"40 x passed over.*Lower data.demonstrations_limit"):
        prompts(write(ROWS), plain_tokenizer, **LIMITS, skip=40)
    with pytest.raises(DataError, match="skip=-1"):
        prompts(write(ROWS), plain_tokenizer, **LIMITS, skip=-1)
