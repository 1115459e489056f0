"""docs/data.md against rows of the real data sets, under a real tokenizer.

Skipped where the rows are not at hand. The expected texts are taken from the rows by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loading import demonstrations, prompts
from srppo.data.presets import PRESETS
from srppo.errors import DataError

LIMITS: dict[str, Any] = {"max_prompt_tokens": 600, "limit": None, "seed": 0, "split": "train"}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


SETS = {name: cells for name, *cells in table("Columns")}
FATES = {name: cells for name, *cells in table("What becomes of odd rows")}


def turns(row: dict[str, Any]) -> list[tuple[list[str], str]]:
    """Contents before each assistant turn, and its own."""
    contents = [turn["content"] for turn in row["messages"]]
    roles = [turn["role"] for turn in row["messages"]]
    return [(contents[:i], contents[i]) for i, role in enumerate(roles) if role == "assistant"]


def alpaca(row: dict[str, Any]) -> list[tuple[list[str], str]]:
    context = row.get("input") or row.get("context")
    whole = row["instruction"] + (f"\n\n{context}" if context else "")
    return [([whole], row["output"] if "output" in row else row["response"])]


def ultrafeedback(row: dict[str, Any]) -> list[tuple[list[str], str]]:
    scored = sorted(row["completions"], key=lambda c: float(c["fine-grained_score"]))
    return [([row["instruction"]], scored[-1]["response"])]


HH = [
    (
        ["How do I poach an egg?"],
        "Simmer the water, add a little vinegar and slip the egg in for three minutes.",
    ),
    (["Hi there"], "Hello! What can I do for you?"),
    (["Hi there", "Hello! What can I do for you?", "What is the capital of Peru?"], "Lima."),
]
EXPECTED = {  # what a row's demonstrations are: contents of the prompt, response
    "tulu_v2_sft_mixture": turns,
    "ultrafeedback_binarized.train_prefs": turns,
    "ultrachat_200k.train_sft": turns,
    "alpaca": alpaca,
    "dolly_15k": alpaca,
    "alpaca_eval_model_outputs": alpaca,
    "ultrafeedback": ultrafeedback,
    "gsm8k": lambda row: [([row["question"]], re.sub("<<.*?>>", "", row["answer"]))],
    "hh_rlhf": lambda row: HH[:1] if "egg" in row["chosen"] else HH[1:],
    "gpqa": lambda row: [([row["Question"]], row["Correct Answer"])],
}


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


def file_of(shared: Path, name: str) -> Path:
    (path,) = (shared / "data" / "schemas").glob(f"{name}.json*")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return json.loads(text) if text[0] == "[" else [json.loads(t) for t in text.splitlines()]


def test_every_schema_at_hand_is_in_the_table_and_every_preset(shared: Path):
    there = {p.name.removesuffix(p.suffix) for p in (shared / "data" / "schemas").iterdir()}
    assert there - {"edge_cases_messages"} == EXPECTED.keys() | {"ifeval"}
    assert there - {"edge_cases_messages"} <= SETS.keys()
    assert {cells[0].strip("`") for cells in SETS.values()} - {""} == PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "recognition") for name in EXPECTED]
    + [(name, "preset") for name in EXPECTED if SETS[name][0]],
)
def test_a_data_set_gives_what_the_table_promises(
    shared: Path, stories: PreTrainedTokenizerFast, name: str, how: str
):
    path = file_of(shared, name)
    preset, recognised, *_ = SETS[name]
    settings: dict[str, Any] = dict(LIMITS)
    if recognised == "a column map":
        settings["columns"] = {"prompt": "Question", "response": "Correct Answer"}
        recognised = "`prompt + response`"
    source = f"{preset.strip('`')}={path}" if how == "preset" else str(path)
    examples, report = demonstrations(source, stories, **settings, max_response_tokens=600)
    assert (report.used, report.dropped) == (2, {})
    assert report.schemas == {recognised.strip("`"): 2}
    expected = [pair for row in rows_of(path) for pair in EXPECTED[name](row)]
    responses = [stories.decode(e.response_ids[:-1]).lstrip() for e in examples]
    assert sorted(responses) == sorted(response for _, response in expected)
    for example, response in zip(examples, responses, strict=True):
        (contents,) = (c for c, r in expected if r == response)
        text = stories.decode(example.prompt_ids)
        places = [text.index(content) for content in contents]
        assert places == sorted(places)
        markers = re.findall(r"<\|(\w+)\|>", text)
        assert len(markers) == len(contents) + 1
        assert example.response_ids[-1] == stories.eos_token_id
    found, report = prompts(source, stories, **settings)
    assert (report.used, report.dropped) == (2, {})
    finals = {tuple(e.prompt_ids) for e in examples if e.final}
    assert {tuple(prompt.ids) for prompt in found} == finals


def test_prompts_alone_and_unknown_columns(shared: Path, stories: PreTrainedTokenizerFast):
    ifeval, gpqa = (str(file_of(shared, name)) for name in ("ifeval", "gpqa"))
    found, report = prompts(ifeval, stories, **LIMITS)
    assert report.schemas == {SETS["ifeval"][1].strip("`"): 2}
    assert all(row["prompt"] in "".join(p.text for p in found) for row in rows_of(Path(ifeval)))
    with pytest.raises(DataError, match="no response column beside prompt"):
        demonstrations(ifeval, stories, **LIMITS, max_response_tokens=9)
    with pytest.raises(DataError, match="Columns found: Correct Answer"):
        prompts(gpqa, stories, **LIMITS)


def test_a_preset_refuses_the_columns_of_another(shared: Path, stories: PreTrainedTokenizerFast):
    source = f"alpaca={file_of(shared, 'dolly_15k')}"
    with pytest.raises(DataError, match=r"2 x no column 'output'.*--column-map"):
        prompts(source, stories, **LIMITS)


def fate(load: Any, source: str, stories: PreTrainedTokenizerFast) -> tuple[str, Any]:
    """`used`, `mended` or the reason, and the one thing that came out."""
    more = {"max_response_tokens": 100} if load is demonstrations else {}
    try:
        [found], report = load(source, stories, **LIMITS, **more)
    except DataError as error:
        return str(error).split(" x ")[1].split(" (")[0], None
    return "mended" if report.truncated or report.turns_dropped else "used", found


def test_every_edge_case_is_documented(shared: Path):
    rows = rows_of(file_of(shared, "edge_cases_messages"))
    assert len(rows) == 16
    assert {row["id"] for row in rows} == FATES.keys()


@pytest.mark.parametrize("name", FATES)
def test_edge_cases_end_as_documented(
    shared: Path, stories: PreTrainedTokenizerFast, tmp_path: Path, name: str
):
    rows = {row["id"]: row for row in rows_of(file_of(shared, "edge_cases_messages"))}
    source = tmp_path / "row.jsonl"
    source.write_text(json.dumps(rows[name]))
    found = {}
    for promise, load in zip(FATES[name], (demonstrations, prompts), strict=True):
        outcome, found[load] = fate(load, str(source), stories)
        word, _, why = promise.partition(": ")
        if word == "dropped":
            assert outcome == why.replace("N", "600")
        elif word == "mended":
            assert outcome in ("mended", "used")
        else:
            assert outcome == "used"
    example = found[demonstrations]
    if example is None:
        return
    spelt = stories.decode(example.response_ids)
    last = [t for t in rows[name]["messages"] if t["role"] in ("assistant", "gpt")][-1]
    if name == "long_response":
        assert len(example.response_ids) == 100
        assert stories.eos_token_id not in example.response_ids
    else:
        assert spelt.removesuffix("</s>").lstrip() == (last.get("content") or last["value"])
        assert example.response_ids.index(stories.eos_token_id) == len(example.response_ids) - 1
    if name == "ends_with_user":
        assert found[prompts].text.rstrip().endswith("c\n<|assistant|>")
    if name == "special_tokens_in_text":
        assert stories.eos_token_id not in example.prompt_ids
        assert "What is </s> or <|im_end|> or <|assistant|>?" in stories.decode(example.prompt_ids)


def test_edge_cases_in_one_file(shared: Path, stories: PreTrainedTokenizerFast):
    path = str(file_of(shared, "edge_cases_messages"))
    examples, report = demonstrations(path, stories, **LIMITS, max_response_tokens=100)
    kept = [n for n, (promise, _) in FATES.items() if not promise.startswith("dropped")]
    assert sorted(str(e.meta["id"]) for e in examples) == sorted(kept)
    assert (report.rows, report.used, report.truncated) == (16, 9, 1)
    assert report.turns_dropped == {"no user turn in the prompt": 1}
    assert sum(report.dropped.values()) == 7
    _, report = prompts(path, stories, **LIMITS)
    assert (report.used, report.dropped["duplicate"]) == (10, 4)


def test_gsm8k_answers_lose_their_marks(shared: Path, stories: PreTrainedTokenizerFast):
    path = str(shared / "data" / "gsm8k" / "train.jsonl")
    limits = LIMITS | {"limit": 200}
    examples, report = demonstrations(path, stories, **limits, max_response_tokens=900)
    texts = [stories.decode(example.response_ids) for example in examples]
    assert all("#### " in text and "<<" not in text for text in texts)
    found, _ = prompts(path, stories, **limits, skip=report.looked_at)
    assert not {str(e.prompt_ids) for e in examples} & {str(prompt.ids) for prompt in found}
    assert all("####" in str(prompt.meta["answer"]) for prompt in found)
