"""Rows of the real data sets under a real tokenizer; skipped where they are not at hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from srppo.data.demonstrations import load_demonstrations
from srppo.data.prompts import load_prompts
from srppo.data.schemas import to_messages
from srppo.errors import DataError

LIMITS: dict[str, Any] = {"max_prompt_tokens": 600, "limit": None, "seed": 0, "split": "train"}
PAIRS = [
    *["alpaca.jsonl", "dolly_15k.jsonl", "gsm8k.jsonl", "hh_rlhf.jsonl", "ultrafeedback.jsonl"],
    *["tulu_v2_sft_mixture.jsonl", "ultrachat_200k.train_sft.jsonl"],
    *["ultrafeedback_binarized.train_prefs.jsonl", "alpaca_eval_model_outputs.json"],
]


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


@pytest.mark.parametrize("name", PAIRS)
def test_data_sets_load_whole(shared: Path, stories: PreTrainedTokenizerFast, name: str):
    path = shared / "data" / "schemas" / name
    examples, report = load_demonstrations(str(path), stories, **LIMITS, max_response_tokens=600)
    prompts, _ = load_prompts(str(path), stories, **LIMITS)
    assert report.rows == report.used == len(prompts) == 2
    content = path.read_text()
    rows = json.loads(content) if content[0] == "[" else map(json.loads, content.splitlines())
    responses = {to_messages(row)[1] for row in rows}
    assert responses == {stories.decode(e.response_ids[:-1]).lstrip() for e in examples}


def test_prompts_alone_and_unknown_columns(shared: Path, stories: PreTrainedTokenizerFast):
    folder = shared / "data" / "schemas"
    prompts, _ = load_prompts(str(folder / "ifeval.jsonl"), stories, **LIMITS)
    assert len(prompts) == 2
    with pytest.raises(DataError, match="no assistant turn"):
        load_demonstrations(str(folder / "ifeval.jsonl"), stories, **LIMITS, max_response_tokens=9)
    with pytest.raises(DataError, match="Columns found: Correct Answer"):
        load_prompts(str(folder / "gpqa.jsonl"), stories, **LIMITS)


def test_edge_case_file(shared: Path, stories: PreTrainedTokenizerFast):
    path = shared / "data" / "schemas" / "edge_cases_messages.jsonl"
    examples, report = load_demonstrations(str(path), stories, **LIMITS, max_response_tokens=100)
    assert sorted(str(example.meta["id"]) for example in examples) == [
        *["assistant_first", "duplicate", "ends_with_user", "long_response"],
        *["special_tokens_in_text", "system_only_first", "two_users_in_a_row", "unicode"],
        "unknown_role",
    ]
    assert report.truncated == 1
    [special] = [e for e in examples if e.meta["id"] == "special_tokens_in_text"]
    assert stories.eos_token_id not in special.prompt_ids
    assert "What is </s> or <|im_end|> or <|assistant|>?" in stories.decode(special.prompt_ids)
    prompts, report = load_prompts(str(path), stories, **LIMITS)
    assert (len(prompts), report.dropped["duplicate"]) == (10, 4)


def test_gsm8k_answers_lose_their_marks(shared: Path, stories: PreTrainedTokenizerFast):
    path = shared / "data" / "gsm8k" / "train.jsonl"
    limits = LIMITS | {"limit": 200}
    examples, _ = load_demonstrations(str(path), stories, **limits, max_response_tokens=900)
    texts = [stories.decode(example.response_ids) for example in examples]
    assert all("#### " in text and "<<" not in text for text in texts)
    prompts, _ = load_prompts(str(path), stories, **limits, skip=200)
    assert not {str(e.prompt_ids) for e in examples} & {str(prompt.ids) for prompt in prompts}
    assert all("####" in str(prompt.meta["answer"]) for prompt in prompts)
