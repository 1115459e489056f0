"""Models that read and write any text, and small benchmarks of our own invention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import bytewise
from questions import ALPACA, GPQA, GSM8K, IFEVAL, write_jsonl


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder `shared` beside the repository: benchmarks and a model")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Our own questions; no nltk data."""
    path = tmp_path_factory.mktemp("data")
    gsm8k = [{"question": question, "answer": answer} for question, answer in GSM8K]
    write_jsonl(path / "ifeval" / "input_data.jsonl", IFEVAL)
    write_jsonl(path / "gsm8k" / "test.jsonl", gsm8k)
    write_jsonl(path / "gsm8k" / "train.jsonl", gsm8k[::-1] * 3)
    write_jsonl(path / "gpqa" / "gpqa_main.jsonl", GPQA)
    (path / "alpaca_eval").mkdir()
    (path / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(ALPACA))
    return path


@pytest.fixture(scope="session")
def with_punkt(data_dir, shared, tmp_path_factory) -> Path:
    """The same beside nltk's punkt_tab."""
    path = tmp_path_factory.mktemp("with_punkt")
    for folder in data_dir.iterdir():
        (path / folder.name).symlink_to(folder)
    (path / "nltk_data").symlink_to(shared / "data" / "nltk_data")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytewise.tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    """A model without chat template."""
    path = tmp_path_factory.mktemp("models") / "plain"
    bytewise.byte_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory, tokenizer) -> Path:
    """Another one, with."""
    path = tmp_path_factory.mktemp("models") / "chat"
    bytewise.byte_llama(seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(bytewise.TEMPLATE)
    return path
