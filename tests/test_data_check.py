"""`srppo data check`, as a user types it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from runs import python, srppo_command, write_recipe
from srppo.data_check import check
from srppo.errors import ConfigError
from srppo.report import build

ROWS = [{"prompt": f"copy : {c}", "response": c} for c in "abcdef"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    bad = ["{no", "[]", json.dumps({"prompt": "a", "response": " "}), json.dumps(ROWS[0])]
    path.write_text("\n".join([*map(json.dumps, ROWS), *bad]))
    return path


def test_counts_reasons_lines_lengths_and_examples(source: Path, tmp_path: Path):
    dropped = tmp_path / "dropped.tsv"
    done = srppo_command(
        "data", "check", source, "--model", "srppo:miniature", "--dropped", dropped
    )
    assert done.code == 0, done.err
    for words in (
        f"{source}: 6 of 10 rows used",
        "columns: prompt + response (6)",
        "dropped 1: not JSON, rows 7",
        "dropped 1: not an object, rows 8",
        "dropped 1: empty response, rows 9",
        "responses, tokens: 2 to 2, median 2, mean 2.0",
    ):
        assert words in done.out
    assert done.out.count("⟦") == 1 + 3
    places = dict(line.split("\t") for line in dropped.read_text().splitlines())
    assert places.pop("7") == "not JSON"
    assert places.pop("8") == "not an object"
    assert places.pop("9") == "empty response"
    assert list(places.values()) == ["duplicate"]


def test_what_data_say_does_not_steer_the_terminal(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "\x1b[2J\x07 \x9b1m[/x]", "response": "r\x1b]0;t\x07"}))
    done = srppo_command("data", "check", path)
    assert done.code == 0, done.err
    assert "␛[2J␇ \N{REPLACEMENT CHARACTER}1m[/x]" in done.out
    assert not {"\x1b", "\x07", "\x9b"} & set(done.out)
    path.write_text(json.dumps({"\x1b[2J": "a"}))
    done = srppo_command("data", "check", path)
    assert done.code == 2
    assert "Columns found: ␛[2J." in done.err


def test_without_a_model_lengths_are_bytes(source: Path):
    done = srppo_command("data", "check", source, "--max-prompt-tokens", "1")
    assert done.code == 0, done.err
    # "<|user|>\ncopy : a\n<|assistant|>\n"
    assert "prompts, bytes: 32 to 32" in done.out
    assert "⟦" + "a<eos>" + "⟧" in done.out or "⟦b<eos>⟧" in done.out


def test_what_the_model_sees_is_shown_token_by_token(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "copy : a b", "response": "a b"}))
    done = srppo_command("data", "check", path, "--model", "srppo:miniature")
    shown = done.out.split("row 1\n")[1]
    prompt, response = shown.split("⟦")
    assert prompt.replace("│", "").split() == ["<bos>", "copy", ":", "a", "b"]
    assert [t.strip() for t in response.split("⟧")[0].split("│")] == ["a", "b", "<eos>"]


def test_prompts_alone(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(5)))
    done = srppo_command("data", "check", path)
    assert done.code == 2
    assert "dropped 5: no response column beside prompt, rows 1, 2, 3, 4, 5" in done.out
    assert "none of its 5 rows can be used as demonstrations" in done.err
    done = srppo_command("data", "check", path, "--prompts", "--limit", "3")
    assert done.code == 0, done.err
    assert "3 of 5 rows used, 2 not needed" in done.out


def test_other_columns_are_mapped(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("Question,Correct Answer\nq,r\n")
    done = srppo_command("data", "check", path)
    assert done.code == 2
    for words in ("Columns found: Correct Answer, Question", "--column-map"):
        assert words in done.err
    maps = ["--column-map", "prompt=Question", "--column-map", "response=Correct Answer"]
    done = srppo_command("data", "check", path, *maps)
    assert done.code == 0, done.err
    assert "1 of 1 rows used" in done.out


def test_a_recipe_is_checked_whole(tmp_path: Path):
    done = srppo_command("data", "check", write_recipe(tmp_path))
    assert done.code == 0, done.err
    for role in ("demonstrations", "prompts", "eval", "curve", "overlap"):
        assert f"== {role}\n" in done.out
    assert "prompts of stage 2 (other): of 16," in done.out
    assert not (tmp_path / "run").exists()


def test_settings_go_on_top_of_a_recipe(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    done = srppo_command("data", "check", recipe, "data.demonstrations_limit=20")
    assert done.code == 0, done.err
    assert "28 of 440 rows used" in done.out, done.out  # 8 of them are held out


def test_more_than_the_model_has_positions_for_is_told(tmp_path: Path):
    done = srppo_command("data", "check", write_recipe(tmp_path), "data.max_prompt_tokens=9999")
    assert done.code == 2
    assert "data.max_prompt_tokens=9999" in done.err
    assert "positions" in done.err


def test_settings_beside_a_source_are_refused(source: Path):
    done = srppo_command("data", "check", source, "data.max_prompt_tokens=1")
    assert done.code == 2
    assert "'data.max_prompt_tokens=1'" in done.err
    assert "Give the recipe in the place of the source" in done.err


def test_the_page_of_a_run_holds_the_same(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "data.txt").write_text("3 of 4 rows used <b>\n  ⟦Hello│<eos>⟧\n")
    page = build(tmp_path).read_text()
    assert "3 of 4 rows used &lt;b&gt;\n  ⟦Hello│&lt;eos&gt;⟧" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl"], ["missing.jsonl", "no such file", "Give a path that exists"]),
        (["a.docx"], ["a.docx", "cannot be read", "Save it as"]),
        (["{source}", "--column-map", "prompt"], ["'prompt' is not of the form", "Write, for"]),
        (["{source}", "--column-map", "q=x"], ["maps to 'q'", "KNOWN is one of"]),
        (["{source}", "--column-map", "prompt=x"], ["10 rows", "no column 'x'", "rows 1, 2"]),
        (["{source}", "--model", "nowhere/at/all"], ["nowhere/at/all", "does not exist"]),
        (["{source}", "--max-prompt-tokens", "0"], ["max_prompt_tokens=0", "greater than 0"]),
        (["{source}", "--limit", "0"], ["limit=0 leaves no rows", "Set limit"]),
        (["alpaca={source}"], ["alpaca=", "no column 'instruction'", "Columns found: prompt"]),
        (["{source}", "--dropped", "no/such/folder/x"], ["cannot be written", "--dropped"]),
        (["missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["python:nowhere:rows"], ["cannot be imported", "PYTHONPATH"]),
        (["{source}*.csv"], ["no file matches", "Mend the pattern"]),
    ],
)
def test_errors_name_value_and_cure(
    source: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    Path("a.docx").write_text("hello")
    done = srppo_command("data", "check", *(a.format(source=source) for a in arguments))
    assert done.code == 2
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err.replace("\n", " ")


def test_a_template_that_closes_turns_otherwise_is_noted(tmp_path: Path):
    from srppo.models.load import load_tokenizer

    tokenizer = load_tokenizer("srppo:miniature")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} ;\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "copy : a", "response": "a"}))
    done = srppo_command("data", "check", path, "--model", tmp_path / "model")
    assert "chat template: own" in done.out
    assert r"closes an assistant turn with ' ;\n'" in done.out


# --- large files ----------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from srppo.cli import main
sys.argv = ["srppo", "data", "check", sys.argv[1], "--dropped", sys.argv[2]]
try:
    main()
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
BAD = ["{cut", "[1]", '{"prompt": "q", "response": ""}', '{"other": 1}']


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file_and_every_bad_line_is_named(tmp_path: Path):
    peaks = {}
    for n in (2_000, 50_000):
        rng = random.Random(n)
        bad = sorted(rng.sample(range(1, n + 1), n // 2000))
        path, dropped = tmp_path / f"{n}.jsonl", tmp_path / f"{n}.tsv"
        with path.open("w") as file:
            for i in range(1, n + 1):
                row = {"prompt": f"{i} " + "word " * 40, "response": "word " * 60}
                file.write((rng.choice(BAD) if i in bad else json.dumps(row)) + "\n")
        done = python("-c", MEASURED, str(path), str(dropped))
        assert done.code == 0, done.err
        assert f"{n - len(bad)} of {n} rows used" in done.out
        lines = [line.split("\t")[0] for line in dropped.read_text().splitlines()]
        assert lines == [str(i) for i in bad]
        peaks[n] = int(done.out.split("PEAK ")[1]) / 1024
    assert path.stat().st_size > 24 * 2**20
    assert peaks[50_000] < peaks[2_000] + 16, f"MiB: {peaks}"


def test_options_beside_a_recipe_are_refused():
    """They would have no effect."""
    for options in ({"limit": 3}, {"prompts": True}):
        with pytest.raises(ConfigError, match="the recipe decides"):
            check("recipes/miniature.yaml", {}, **options)
    with pytest.raises(ConfigError, match="--column-map"):
        check("recipes/miniature.yaml", {}, ["prompt=Q"])
