"""The card, as the hub reads it: its head by huggingface_hub, its body by a Markdown parser."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from runs import srppo_command, write_recipe
from srppo.errors import RunDirError
from srppo.report.card import card, write_cards
from srppo.report.read import read

CONTROLS = {
    "rloo": {"ppo": {"estimator": "rloo", "responses_per_prompt": 2}},
    "longer": {"sft": {"epochs": 2}},
    "lambda-2": {"extrapolate": 2.0},
}
HEADS = ["Use", "Results", "Audit of the reward", "Data", "Recipe", "Limits"]


@pytest.fixture(scope="module", params=["whole", "lora"])
def run_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    lora = {"lora": {"rank": 2}} if request.param == "lora" else {}
    model = {"base": "srppo:miniature", "device": "cpu", **lora}
    recipe = write_recipe(folder, model=model, controls=CONTROLS)
    assert srppo_command("run", recipe).code == 0
    return folder / "run"


def html(text):
    return MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)


def tables(text):
    """Rows of cells, head first, of each table, as text."""
    found = re.findall(r"<table>(.*?)</table>", html(text), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in found]
    return [[re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table] for table in rows]


def changed(files, **recipe):
    """The same run of another recipe; sections are merged."""
    tree = json.loads(json.dumps(files.run))
    for key, value in recipe.items():
        tree["recipe"][key] = {**tree["recipe"][key], **value} if isinstance(value, dict) else value
    return dataclasses.replace(files, run=tree)


def test_every_model_of_a_run_has_its_card(run_dir):
    found = {str(p.parent.relative_to(run_dir)) for p in run_dir.rglob("README.md")}
    assert found == {"sft", "policy", "controls/rloo", "controls/longer"}
    adapter = (run_dir / "policy" / "adapter_config.json").exists()
    for path in run_dir.rglob("README.md"):
        data = ModelCard.load(path).data
        assert data.library_name == ("peft" if adapter else "transformers")
        assert data.pipeline_tag == "text-generation"
        assert "arxiv:2510.21090" in data.tags
        assert data.base_model is None  # srppo:miniature is not on the hub, which would refuse it
        assert data.datasets is None
        heads = re.findall(r"<h2>(.*?)</h2>", html(path.read_text()))
        by_ppo = path.parent.name in ("policy", "rloo")
        assert heads == [h for h in HEADS if by_ppo or h != "Audit of the reward"]
        assert ("LoRA adapter over" in path.read_text()) == adapter


def test_the_example_of_the_card_runs(run_dir, capsys):
    text = (run_dir / "policy" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    code = code.replace("OWNER/NAME", str(run_dir / "policy")).replace("Hello", "copy : a b")
    exec(code, names)
    ids = names["answer"].tolist()
    eos = names["tokenizer"].eos_token_id
    assert len(ids) <= 12  # data.max_response_tokens
    assert ids[-1] == eos or len(ids) == 12
    assert eos not in ids[:-1]
    assert (
        capsys.readouterr().out == names["tokenizer"].decode(ids, skip_special_tokens=True) + "\n"
    )


def test_the_results_are_those_of_the_run(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    measured, data = tables((run_dir / "policy" / "README.md").read_text())
    head, *rows = measured
    assert head == [
        "model",
        "decoding",
        "group",
        "n",
        "accuracy",
        "format",
        "length",
        "EOS",
        "reward",
    ]
    shown = [r for r in results["rows"] if r["model"] in ("base", "sft", "policy")]
    assert len(rows) == len(shown)
    for cells, row in zip(rows, shown, strict=True):
        values = dict(zip(head, cells, strict=True))
        assert values["model"].removesuffix(" (this)") == row["model"]
        assert values["model"].endswith("(this)") == (row["model"] == "policy")
        assert (values["decoding"], values["group"]) == (row["decoding"], row["group"])
        assert int(values["n"]) == row["n"]
        share, _, half = values["accuracy"].partition(" ± ")
        assert float(share) == pytest.approx(100 * row["scores"]["accuracy"], abs=0.05)
        assert float(half) > 0
        assert float(values["length"]) == pytest.approx(row["response_length"], abs=0.05)
        assert float(values["reward"].replace("−", "-")) == pytest.approx(row["reward"], abs=0.005)
    reports = json.loads((run_dir / "data.json").read_text())
    for name, source, rows_read, used, _ in data[1:]:
        assert source == reports[name]["source"]
        counts = [
            int(n.replace("\N{NO-BREAK SPACE}", "").replace(" ", "")) for n in (rows_read, used)
        ]
        assert counts == [reports[name]["rows"], reports[name]["used"]]


def test_a_control_s_card_shows_its_own_rows_and_no_other_control_s(run_dir):
    measured, _ = tables((run_dir / "controls" / "rloo" / "README.md").read_text())
    assert {row[0] for row in measured[1:]} == {"base", "sft", "policy", "rloo (this)"}
    assert "controls longer, lambda-2 are in" in (run_dir / "controls/rloo/README.md").read_text()


def test_warnings_early_ends_and_quantised_weights_are_limits(run_dir):
    files = changed(read(run_dir), model={"quantize": "4bit"})
    files.run["stopped"] = {"policy": "KL 60 > max_kl"}
    files.run["changes"] = [{"at": "2026-01-12", "changed": ["seed was 0 and is now 1"]}]
    files = dataclasses.replace(files, audit={**files.audit, "warnings": ["length <b> dominates"]})
    page = html(card(files, "policy", adapter=False))
    assert "<strong>Warning:</strong> length &lt;b&gt; dominates" in page
    limits = page.split("<h2>Limits</h2>")[1]
    for words in (
        "stopped early: KL 60 &gt; max_kl",
        "The audit warned",
        "in 4bit during",
        "from 2026-01-12 on it was trained with changes. seed was 0 and is now 1",
    ):
        assert words in limits
    other = html(card(read(run_dir), "policy", adapter=False))
    assert "It gave no warning." in other or "Warning:" in other
    for words in ("stopped early", "4bit", "with changes"):
        assert words not in other


def test_what_is_on_the_hub_is_linked_and_what_is_not_is_not(run_dir):
    files = changed(read(run_dir), model={"base": "someone/base-1B"})
    data = {
        "demonstrations": {**files.data["demonstrations"], "source": "someone/demonstrations"},
        "prompts": {**files.data["prompts"], "source": "data/prompts.jsonl"},
        "eval": {**files.data["eval"], "source": "someone/only-evaluated"},
    }
    files = dataclasses.replace(files, data=data)
    for adapter, relation in ((True, "adapter"), (False, "finetune")):
        head = ModelCard(card(files, "policy", adapter=adapter)).data
        assert head.base_model == "someone/base-1B"
        assert head.to_dict()["base_model_relation"] == relation
        assert head.datasets == ["someone/demonstrations"]


def test_directories_of_this_machine_are_nobody_s_business(run_dir):
    files = changed(
        read(run_dir),
        output_dir="/home/jane/secret/run",
        model={"base": "/home/jane/models/base-1B", "sft": "~/jane/sft"},
        eval={"scorer": "python:/home/jane/scores.py:score", "prompts": "https://jane.org/x/y"},
    )
    source = {"source": "/home/jane/data/tasks.jsonl", "rows": 3, "used": 3, "dropped": {}}
    files = dataclasses.replace(files, data={"demonstrations": source})
    text = card(files, "policy", adapter=False)
    assert "home" not in text
    assert text.count("jane") == 1  # the address is public
    for words in ("`base-1B`", "`sft`", "tasks.jsonl", "python:scores.py:score", "//jane.org/x/y"):
        assert words in text


def test_hostile_names_stay_text(run_dir):
    files = changed(read(run_dir), name="x\n```\n<script>")
    files.run["name"] = "<script>alert(1)</script> | # x"
    rows = [{**row, "group": "a|b <img src=x>\n[c](d)"} for row in files.results["rows"]]
    files = dataclasses.replace(files, results={**files.results, "groups": [], "rows": rows})
    text = card(files, "policy", adapter=False)
    page = html(text)
    assert "<script>" not in page
    assert "<img" not in page
    measured = tables(text)[0]
    assert {len(row) for row in measured} == {9}
    assert {row[2] for row in measured[1:]} == {"a|b &lt;img src=x&gt; [c](d)"}


@pytest.mark.parametrize("absent", ["results", "audit", "data", "ppo"])
def test_a_part_that_is_missing_is_said_to_be(run_dir, absent):
    files = read(run_dir)
    files = dataclasses.replace(files, **{absent: [] if absent == "ppo" else None})
    text = card(files, "policy", adapter=False)
    words = {"results": "Nothing was measured", "audit": "Left out", "data": "Not recorded"}
    if absent in words:
        assert words[absent] in text
    assert re.findall(r"<h2>(.*?)</h2>", html(text)) == HEADS
    assert "None" not in text.replace("null", "")


def test_the_same_files_give_the_same_card(run_dir):
    before = {p: p.read_bytes() for p in run_dir.rglob("README.md")}
    assert sorted(write_cards(run_dir)) == sorted(before)
    assert {p: p.read_bytes() for p in before} == before


def test_no_run_no_cards(tmp_path, run_dir):
    with pytest.raises(RunDirError, match="Give the directory that"):
        write_cards(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert write_cards(tmp_path) == []
