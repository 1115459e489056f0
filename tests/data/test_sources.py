import json
import sys
from pathlib import Path

import datasets
import pytest

from srppo.data.sources import read_rows
from srppo.errors import DataError

ROWS = [{"prompt": "a", "response": "1\n2"}, {"prompt": "é", "response": 'say "b", c'}]


def test_unreadable_lines_are_counted_with_their_line_numbers(tmp_path: Path):
    lines = [
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"{not json",
        b"",
        b'["a list"]',
        b'{"prompt": "\xe9"}',
        b"[" * 100_000,
        b'{"prompt": "b"}',
        b'{"cut',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = read_rows(str(path), 0, "train")
    assert [row["prompt"] for row in rows.rows] == ["a", "b"]
    assert list(rows.numbers) == [1, 7]
    assert [(row.number, row.reason) for row in rows.unreadable] == [
        (2, "not JSON"),
        (4, "not an object"),
        (5, "not UTF-8"),
        (6, "not JSON"),
        (8, "not JSON"),
    ]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path):
    frame = datasets.Dataset.from_list(ROWS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    jsonl = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(jsonl)
    (tmp_path / "lines.json").write_text(jsonl)
    for path in sorted(tmp_path.iterdir()):
        assert list(read_rows(str(path), 0, "train").rows) == ROWS, path.name


def test_numbers_in_a_csv_stay_text(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n1+1?,02\ntoo,many,cells\n")
    rows = read_rows(str(path), 0, "train")
    assert list(rows.rows) == [{"question": "1+1?", "answer": "02"}]
    assert [(row.number, row.reason) for row in rows.unreadable] == [(2, "more cells than columns")]


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("a.json", b"[{]", "save one object per line"),
        ("a.csv", b"\xff\xfe\x00a", "Save it as UTF-8"),
        ("a.parquet", b"not parquet at all", "Write it anew"),
        ("a.jsonl.gz", b"", "Save it as one of"),
    ],
)
def test_broken_files_name_the_cure(tmp_path: Path, name: str, content: bytes, cure: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=cure):
        read_rows(str(tmp_path / name), 0, "train")


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such file.*Give a path"):
        read_rows(str(tmp_path / "none.jsonl"), 0, "train")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub lays it out; `load_dataset` reads it without network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    return folder


def test_load_dataset_honours_the_split(hub_folder: Path):
    assert list(read_rows(str(hub_folder), 0, "train").rows) == ROWS
    rows = read_rows(str(hub_folder), 0, "test")
    assert list(rows.shuffled(0)) == [(1, ROWS[1])]


def test_load_dataset_failures_are_data_errors(hub_folder: Path):
    with pytest.raises(DataError, match=r"'nothere' cannot be loaded.*Check the name"):
        read_rows(str(hub_folder), 0, "nothere")
    with pytest.raises(DataError, match="Check the name"):
        read_rows(str(hub_folder / "no" / "such" / "folder"), 0, "train")


def test_config_of_a_hub_name_follows_the_colon(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(*args: object, **options: object) -> list[object]:
        calls.append((args, options))
        return []

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_rows("openai/gsm8k:main", 0, "test")
    read_rows("tatsu-lab/alpaca", 0, "train")
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("tatsu-lab/alpaca", None), {"split": "train"}),
    ]


def test_generator_gets_seed_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "def rows(seed, split):\n    yield {'prompt': f'{split}{seed}'}\n    yield 'no row'\n"
    (tmp_path / "a_world.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_world", raising=False)
    rows = read_rows("python:a_world:rows", 7, "test")
    assert list(rows.rows) == [{"prompt": "test7"}]
    assert [row.reason for row in rows.unreadable] == ["not an object"]


@pytest.mark.parametrize(
    "source", ["python:no_such_module_xyz:f", "python:json:nothing", "python:"]
)
def test_generator_that_cannot_be_imported(source: str):
    with pytest.raises(DataError, match=r"PYTHONPATH"):
        read_rows(source, 0, "train")


def test_generator_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "b_world.py").write_text("def rows(seed, split):\n    yield {}\n    1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "b_world", raising=False)
    with pytest.raises(DataError, match=r"ZeroDivisionError.*function\(seed=int, split=str\)"):
        read_rows("python:b_world:rows", 7, "test")
