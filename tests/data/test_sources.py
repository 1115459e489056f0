"""Where rows come from; every kind of file is written by its own library and read by ours."""

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srppo.config_data import SourceConfig
from srppo.data.files import Rows
from srppo.data.mixture import Part, Source
from srppo.data.schemas import Reading
from srppo.data.sources import open_source
from srppo.errors import DataError

ROWS = [{"prompt": "a", "response": "1\n2"}, {"prompt": "é", "response": 'say "b", c'}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def read(source: Any, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of all files, in their order."""
    found = open_source(source, seed=seed, split=split)
    return [row for part in found.parts for _, rows in part.files for row in rows.rows]


def config(source: object, **settings: Any) -> SourceConfig:
    return SourceConfig(source=str(source), **settings)


# --- files ----------------------------------------------------------------------------------------


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
    source = open_source(str(path), seed=0)
    assert [row["prompt"] for row in read(str(path))] == ["a", "b"]
    assert sorted((r.where, r.row["prompt"]) for r in source.shuffled(0)) == [(1, "a"), (7, "b")]
    assert list(source.unreadable()) == [
        (2, "not JSON"),
        (4, "not an object"),
        (5, "not UTF-8"),
        (6, "not JSON"),
        (8, "not JSON"),
    ]
    assert source.count == 7


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path):
    frame = datasets.Dataset.from_list(ROWS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "lines.json").write_text(LINES)
    table = pyarrow.Table.from_pylist(ROWS)
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 7
    for path in paths:
        assert read(str(path)) == ROWS, path.name


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path):
    path = tmp_path / "a.parquet"
    for rows in (ROWS, ROWS[:1], [{"prompt": "other", "response": "x"}]):
        datasets.Dataset.from_list(rows).to_parquet(path)
        assert read(str(path)) == rows


def test_a_csv_keeps_text_and_names_the_lines_of_bad_rows(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer\r\n1+1?,02\n"two\nlines",x\ntoo,many,cells\n\n'
        b"bad \xe9,bytes\nfew\n" + b"long," + b"x" * 200_000 + b"\n"
    )
    source = open_source(str(path), seed=0)
    assert read(str(path)) == [
        {"question": "1+1?", "answer": "02"},
        {"question": "two\nlines", "answer": "x"},
        {"question": "few", "answer": None},
        {"question": "long", "answer": "x" * 200_000},
    ]
    assert sorted(r.where for r in source.shuffled(0)) == [2, 3, 8, 9]
    assert list(source.unreadable()) == [(5, "more cells than columns"), (7, "not UTF-8")]


def test_quotes_of_a_csv_within_cells_and_around_the_first_name(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf"question, or so",answer\n5" nails,"a ""word"""\n')
    assert read(str(path)) == [{"question, or so": '5" nails', "answer": 'a "word"'}]


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("a.json", b"[{]", "save one object per line"),
        ("a.csv", b"\xff\xfea\x00,\x00b\x00\n", "Save it as UTF-8"),
        ("a.csv", b"a,b\nc\rd,e\n", r"from line 2 on .*Mend that line"),
        ("a.csv", b'a,b\n1,2\n3,"open\n5,6\n', r"from line 3 on .*must close it"),
        ("a.csv", b'a,b\n1,2\n3,"open\n5,"x"\n7,8\n', r"from line 3 on .*must close it"),
        ("a.jsonl", b'[\n{"a": 1},\n{"a": 2}\n]\n', r"line 1 is not a whole .*name it \.json"),
        ("a.jsonl", b'\n[{"a": 1},\n{"a": 2}]\n', r"line 2 is not a whole .*name it \.json"),
        ("a.jsonl", b'{"data": [\n{"a": 1}\n]}\n', "write each row on a line of its own"),
        ("a.json", b'{"data": [\n{"a": 1}\n]}\n', "write each row on a line of its own"),
        ("a.jsonl", b'{"a": 1},\n{"a": 2}\n', "write each row on a line of its own"),
        ("a.parquet", b"not parquet at all", "Write it anew"),
        ("a.arrow", b"not arrow at all", "Write it anew"),
        ("a.jsonl.gz", b"", "Save it as one of"),
        ("a.docx", b"", "Save it as one of"),
    ],
)
def test_broken_files_name_the_cure(tmp_path: Path, name: str, content: bytes, cure: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=cure) as caught:
        read(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.csv"])
def test_missing_file(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=r"no such file.*Give a path"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, name: str, change: str):
    path = tmp_path / name
    path.write_text(LINES if name == "a.jsonl" else 'prompt,response\na,"1\n2"\n')
    source = open_source(str(path), seed=0)
    path.write_text("") if change == "cut" else path.unlink()
    with pytest.raises(DataError, match=r"was changed while it was read.*Run again"):
        list(source.shuffled(0))


# --- globs and folders ----------------------------------------------------------------------------


def test_a_glob_reads_all_that_match_and_places_name_the_file(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text("{bad\n" + LINES)
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.txt").write_text("no rows")
    pattern = str(tmp_path / "**" / "*.jsonl")
    assert read(pattern) == ROWS * 2
    source = open_source(pattern, seed=0)
    places = {str(record.where).removeprefix(f"{tmp_path}/") for record in source.shuffled(3)}
    assert places == {"a.jsonl:1", "a.jsonl:2", "deep/b.jsonl:2", "deep/b.jsonl:3"}
    assert list(source.unreadable()) == [(f"{tmp_path}/deep/b.jsonl:1", "not JSON")]
    with pytest.raises(DataError, match=r"no file matches.*Mend the pattern"):
        read(str(tmp_path / "*.parquet"))


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A data set as the hub lays it out."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train-00000-of-00002.jsonl").write_text(LINES)
    (folder / "train-00001-of-00002.jsonl").write_text("no json\n" + LINES)
    (folder / "test-00000-of-00001.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    return folder


def test_the_files_of_a_folder_are_read_by_split_and_bad_lines_are_named(hub_folder: Path):
    assert read(str(hub_folder)) == ROWS * 2
    assert read(str(hub_folder), "test") == ROWS[1:]
    source = open_source(str(hub_folder), seed=0)
    ((where, reason),) = source.unreadable()
    assert (where, reason) == (f"{hub_folder}/train-00001-of-00002.jsonl:1", "not JSON")
    with pytest.raises(DataError, match=r"no split 'nothere'; it has .*train.*Set the source's"):
        read(str(hub_folder), "nothere")


def test_a_folder_without_splits_is_all_train(tmp_path: Path):
    (tmp_path / "one.jsonl").write_text(LINES)
    (tmp_path / "two.csv").write_text("prompt,response\nq,r\n")
    assert read(str(tmp_path)) == [*ROWS, {"prompt": "q", "response": "r"}]


def test_more_files_than_may_be_open(tmp_path: Path):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(120):
        (tmp_path / f"{i:03}.jsonl").write_text(json.dumps({"prompt": str(i)}))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
    try:
        found = read(str(tmp_path / "*.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [{"prompt": str(i)} for i in range(120)]


def test_a_card_that_names_the_files_is_obeyed_and_any_other_readme_is_not_read(tmp_path: Path):
    (tmp_path / "one.jsonl").write_text(LINES)
    (tmp_path / "two.jsonl").write_text(json.dumps(ROWS[0]))
    card = tmp_path / "README.md"
    card.write_text("# Mine\nconfigs: none\n")
    assert read(str(tmp_path)) == [*ROWS, ROWS[0]]
    card.unlink()
    card.mkdir()
    assert read(str(tmp_path)) == [*ROWS, ROWS[0]]
    card.rmdir()
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: two.jsonl\n---\n# Mine\n")
    assert read(str(tmp_path)) == ROWS[:1]


def test_a_folder_of_save_to_disk(tmp_path: Path):
    frame = datasets.Dataset.from_list(ROWS)
    frame.save_to_disk(tmp_path / "one")
    assert read(str(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"test": frame}).save_to_disk(tmp_path / "several")
    assert read(str(tmp_path / "several"), "test") == ROWS
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        read(str(tmp_path / "several"))


def test_folders_without_data(tmp_path: Path):
    with pytest.raises(DataError, match="holds no data files"):
        read(str(tmp_path))
    (tmp_path / "train.txt").write_text("hello")
    with pytest.raises(DataError, match=r"none of the files of split 'train' can be read.*Save"):
        read(str(tmp_path))


# --- the hub, presets, streams --------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of `load_dataset`, which finds no rows."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: object, **options: object) -> list[object]:
        calls.append((args, options))
        return []

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_config_and_revision_are_parts_of_a_hub_name(hub: list[tuple[Any, ...]]):
    for name in ("openai/gsm8k:main", "tatsu-lab/alpaca", "a/b:c@0f1e", "a/b@v1.0"):
        read(name, "test")
    assert hub == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("tatsu-lab/alpaca", None), {"split": "test"}),
        (("a/b", "c"), {"split": "test", "revision": "0f1e"}),
        (("a/b", None), {"split": "test", "revision": "v1.0"}),
    ]


def test_presets_know_their_place_and_their_splits(hub: list[tuple[Any, ...]]):
    names = ["tulu-v2-mix", "ultrafeedback-binarized", "ultrachat-200k", "gsm8k"]
    for name in names:
        read(name)
    assert [(args, options["split"]) for args, options in hub] == [
        (("allenai/tulu-v2-sft-mixture", None), "train"),
        (("HuggingFaceH4/ultrafeedback_binarized", None), "train_prefs"),
        (("HuggingFaceH4/ultrachat_200k", None), "train_sft"),
        (("openai/gsm8k", "main"), "train"),
    ]
    read([config("ultrachat-200k", split="test_gen")])
    assert hub[-1][1]["split"] == "test_gen"
    read("alpaca=owner/mirror@abc")
    assert hub[-1] == (("owner/mirror", None), {"split": "train", "revision": "abc"})


def test_a_preset_is_read_by_its_own_columns_and_a_map_of_the_source_wins(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    common = {"prompt": "Question"}

    def reading(**settings: Any) -> Reading:
        found = open_source([config(**settings)], seed=0, columns=common)
        return found.parts[0].reading

    assert reading(source=f"gsm8k={path}") == Reading("question + answer")
    own = {"prompt": "p"}
    assert reading(source=f"gsm8k={path}", columns=own) == Reading(None, own)
    assert reading(source=path) == Reading(None, common)
    assert reading(source=path, columns={}) == Reading()


def test_a_folder_named_like_a_preset_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("dolly").mkdir()
    Path("dolly/a.jsonl").write_text(LINES)
    assert read("dolly") == ROWS


def test_what_the_hub_says_becomes_a_data_error(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'train' cannot be loaded .*offline.*Check the name"):
        read("owner/name")


def test_a_stream_is_a_draw_by_seed_without_reading_all(hub_folder: Path):
    many = "".join(json.dumps({"prompt": f"q{i}", "response": "r"}) + "\n" for i in range(300))
    for path in hub_folder.glob("train-*"):
        path.write_text(many)

    def draw(seed: int) -> list[str]:
        given = config(hub_folder, stream=True, limit=20)
        return [row["prompt"] for row in read([given], seed=seed)]

    assert len(draw(0)) == 20
    assert draw(0) == draw(0) != draw(1)
    assert draw(0) != [f"q{i}" for i in range(20)]
    with pytest.raises(DataError, match=r"stream=true is for the hub.*Leave it out"):
        read([config(hub_folder / "test-00000-of-00001.jsonl", stream=True, limit=1)])
    with pytest.raises(DataError, match="Check the name"):
        read([config(hub_folder, stream=True, limit=1, split="nothere")])


# --- generators -----------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_generator_gets_seed_and_split(module: Callable[[str, str], None]):
    code = "def rows(seed, split):\n    yield {'prompt': f'{split}{seed}'}\n    yield 'no row'\n"
    module("a_world", code)
    assert read("python:a_world:rows", "test", 7) == [{"prompt": "test7"}]
    source = open_source("python:a_world:rows", seed=7)
    assert list(source.unreadable()) == [(2, "not an object")]


@pytest.mark.parametrize(
    "source", ["python:no_such_module_xyz:f", "python:json:nothing", "python:"]
)
def test_generator_that_cannot_be_imported(source: str):
    with pytest.raises(DataError, match=r"PYTHONPATH"):
        read(source)


@pytest.mark.parametrize("code", ["def rows(", "1 / 0", "import no_such_module_xyz"])
def test_generator_whose_module_fails_is_named(module: Callable[[str, str], None], code: str):
    module("c_world", code)
    with pytest.raises(DataError, match=r"python:c_world:rows: cannot be imported .*PYTHONPATH"):
        read("python:c_world:rows")


def test_generator_that_fails_is_named(module: Callable[[str, str], None]):
    module("b_world", "def rows(seed, split):\n    yield {}\n    1 / 0\n")
    with pytest.raises(DataError, match=r"ZeroDivisionError.*function\(seed=int, split=str\)"):
        read("python:b_world:rows")


# --- order and mixture ----------------------------------------------------------------------------


def part(name: str, n: int, limit: int | None = None, weight: float | None = None) -> Part:
    rows = Rows([{"id": f"{name}{i}"} for i in range(n)], range(1, n + 1))
    return Part(name, [(name, rows)], Reading(), limit, weight, numbered=False)


def drawn(seed: int, *parts: Part) -> list[str]:
    return [record.row["id"] for record in Source("mix", list(parts)).shuffled(seed)]


def test_the_order_of_one_source_is_that_of_random_shuffle():
    expected = [f"a{i}" for i in range(50)]
    random.Random(5).shuffle(expected)
    assert drawn(5, part("a", 50)) == expected
    assert drawn(5, part("a", 50, limit=7)) == expected[:7]


PARTS = st.lists(
    st.tuples(st.integers(0, 40), st.none() | st.integers(1, 50)), min_size=1, max_size=4
)


@settings(max_examples=100)
@given(PARTS, st.integers(0, 3))
def test_without_weights_every_row_comes_once_up_to_the_limits(
    sizes: list[tuple[int, int | None]], seed: int
):
    parts = [part("abcd"[i], n, limit) for i, (n, limit) in enumerate(sizes)]
    found = drawn(seed, *parts)
    assert len(found) == len(set(found))
    wanted = Counter({"abcd"[i]: min(n, limit or n) for i, (n, limit) in enumerate(sizes)})
    assert +Counter(name[0] for name in found) == +wanted


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 10)), min_size=2, max_size=4))
def test_with_weights_every_beginning_is_mixed_so_and_the_first_end_ends_it(
    sizes: list[tuple[int, float]],
):
    parts = [part("abcd"[i], n, weight=w) for i, (n, w) in enumerate(sizes)]
    found = drawn(0, *parts)
    assert len(found) == len(set(found))
    total = sum(weight for _, weight in sizes)
    for end in range(len(found) + 1):
        counts = Counter(name[0] for name in found[:end])
        for i, (_, weight) in enumerate(sizes):
            assert abs(counts["abcd"[i]] - end * weight / total) <= len(sizes)
    counts = Counter(name[0] for name in found)
    left = [n - counts["abcd"[i]] for i, (n, _) in enumerate(sizes)]
    assert min(left) == 0


def test_a_mixture_names_source_and_line(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(LINES + "bad\n")
    source = open_source([config(tmp_path / n) for n in ("a.jsonl", "b.jsonl")], seed=0)
    assert source.name == f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    assert [where for where, _ in source.unreadable()] == [
        f"{tmp_path}/a.jsonl:3",
        f"{tmp_path}/b.jsonl:3",
    ]
    assert source.count == 6
