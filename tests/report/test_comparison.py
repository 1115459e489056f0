"""A comparison as table, Markdown, JSON, CSV and page; and the commands of docs/compare.md."""

import csv
import io
import json
import re
import shlex
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runs import srppo_command
from scored import KINDS, change, demo, random_scores, write
from srppo.eval.compare import Row, compare
from srppo.report.comparison import render

HOSTILE = "<script>alert(1)</script>[red]|$x$"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^srppo .*?(?=\s*#|$)", DOCUMENT, re.MULTILINE)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """As docs/compare.md has it; `quick` answered the first 50 questions of one task."""
    parent = demo(tmp_path_factory.mktemp("runs") / "out")
    write(parent / "quick", random_scores(7, 0.5, 50, ["gsm8k"]))
    return parent


@pytest.fixture(scope="module")
def comparison(out):
    return compare({name: out / name for name in ("base", "sft", "srppo")})


def cells(text):
    """Rows of all tables in Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_json_is_the_comparison_itself(comparison):
    assert json.loads(render(comparison, "json")) == comparison


def test_csv_has_a_line_for_each_task_metric_and_model(comparison):
    found = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert len(found) == len(comparison["rows"]) == 3 * 7
    for line, row in zip(found, comparison["rows"], strict=True):
        for key, value in row.items():
            assert line[key] == ("" if value is None else str(value))
    assert float(found[1]["p"]) == comparison["rows"][1]["p"]


def test_the_columns_are_documented():
    table = DOCUMENT.split("## Columns")[1]
    named = [
        n for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for n in line.split(", ")
    ]
    assert [name.strip("`") for name in named] == [field.name for field in fields(Row)]


@pytest.mark.parametrize("form", ["table", "md"])
def test_every_number_is_there_in_per_cent_and_points(comparison, form):
    text = render(comparison, form)
    for row in comparison["rows"]:
        name = row["model"]
        line = re.compile(
            rf"{name} .*{100 * row['value']:.1f}\W.*{row['mean_length']:.1f}\W"
            rf".*{100 * row['eos_rate']:.1f}\W.*\b{row['truncated_responses']}\b"
            + (rf".*\{100 * row['difference']:+.1f}\W" if row["against"] else "")
        )
        assert line.search(text.replace("−", "-")), (row, text)
    for note in comparison["notes"]:
        assert " ".join(note.split()) in " ".join(text.split())
    assert "McNemar, exact (prompt strict, flexible, strict, accuracy)" in " ".join(text.split())
    assert "…" not in text


def test_markdown_has_a_table_a_task_whose_lines_are_equally_long(comparison):
    text = render(comparison, "md")
    titles = re.findall(r"^### (\w+): 200 questions, version 4, template chat$", text, re.MULTILINE)
    assert titles == list(KINDS)
    assert {len(line) for line in cells(text)} == {14}
    first = cells(text)[2]
    row = comparison["rows"][0]
    assert first[:3] == ["prompt strict", "base", f"{100 * row['value']:.1f}"]
    assert set(first[7:]) == {""}


def test_what_is_not_known_is_a_dash(out):
    unknown = dict.fromkeys(
        ("mean_length", "eos_rate", "truncated_responses", "truncated_prompts", "empty", "template")
    )
    one = write(out / "one", random_scores(0, 0.5, 1), **unknown)
    two = write(out / "two", random_scores(1, 0.5, 1), **unknown)
    comparison = compare({"one": one, "two": two})
    for form in ("table", "md", "json", "csv", "html"):
        text = render(comparison, form)
        assert "nan" not in text
        assert "None" not in text
    assert "template unknown" in render(comparison, "md")
    second = cells(render(comparison, "md"))[3]
    assert second[4:7] == ["–", "–", "–"]


class Page(HTMLParser):
    """Element names, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_cell_a_picture_a_task_and_loads_nothing(comparison):
    page = Page(render(comparison, "html"))
    assert page.names.count("svg") == 4
    assert page.names.count("table") == 4 + 1
    assert not {"script", "link", "img", "iframe"} & set(page.names)
    assert not [v for k, v in page.attributes if k in ("src", "href") and not v.startswith("#")]
    for line in cells(render(comparison, "md"))[2:]:
        if line[0] not in ("---", "metric"):
            for cell in line:
                assert cell in page.text
    assert "sft, srppo against base" in page.text


def test_the_same_comparison_gives_the_same_page(comparison):
    assert render(comparison, "html") == render(comparison, "html")


@pytest.mark.parametrize("form", ["table", "md", "json", "csv", "html"])
def test_names_are_text(out, tmp_path, form):
    odd = write(tmp_path / "odd", random_scores(0, 0.5, 200), notes=[HOSTILE])
    change(odd, model={"path": HOSTILE})
    comparison = compare({"base": out / "base", HOSTILE: odd})
    text = render(comparison, form).encode("utf-8").decode()
    if form == "html":
        page = Page(text)
        assert "script" not in page.names
        assert HOSTILE in page.text
    elif form == "md":
        assert {len(line) for line in cells(text)} == {14}
    elif form == "csv":
        assert {line["model"] for line in csv.DictReader(io.StringIO(text))} == {"base", HOSTILE}
    else:
        assert HOSTILE in text


def test_no_form_holds_a_question_or_a_response(comparison):
    for form in ("table", "md", "json", "csv", "html"):
        text = render(comparison, form)
        assert "gpqa question" not in text
        assert "answer 1" not in text


# --- the command ----------------------------------------------------------------------------------


def test_the_document_has_a_command_for_each_option():
    options = {word for line in COMMANDS for word in line.split() if word.startswith("--")}
    assert options == {"--against", "--tasks", "--out", "--format", "--force"}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_document_run(out, line, monkeypatch):
    monkeypatch.chdir(out.parent)
    done = srppo_command(*shlex.split(line)[1:])
    assert done.code == 0, done.err
    if "--out" in line:
        assert done.out == "Comparison: compare.html\n"
        assert (out.parent / "compare.html").read_text().startswith("<!doctype html>")
    elif "csv" in line:
        assert len(list(csv.DictReader(io.StringIO(done.out)))) == 2 * 7
    else:
        assert "cannot be told from chance" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("name", "begins"),
    [("x.md", "### "), ("x.csv", "task,"), ("x.json", "{"), ("x.txt", "ifeval: ")],
)
def test_the_form_follows_the_suffix(out, tmp_path, name, begins):
    models = [f"{m}={out / m}" for m in ("base", "sft")]
    done = srppo_command("compare", *models, "--out", str(tmp_path / name))
    assert done.code == 0, done.err
    assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out/base", "sft=out/sft"], "'out/base' is not of the form NAME=DIR"),
        (["base=", "sft=out/sft"], "'base=' is not of the form NAME=DIR"),
        (["a=out/base", "a=out/sft"], "a is there twice, out/base and out/sft"),
        (["base=out/base", "quick=out/quick"], "n is 50 and 200; use the same --limit"),
        (["base=out/base", "no=nowhere"], "nowhere/results.json cannot be read"),
        (["base=out/base", "sft=out/sft", "--out", "no/x.md"], "no/x.md cannot be written"),
    ],
)
def test_what_cannot_be_compared_ends_with_a_message(out, arguments, message, monkeypatch):
    monkeypatch.chdir(out.parent)
    done = srppo_command("compare", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
