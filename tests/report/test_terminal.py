"""The table that a run ends with."""

import io

from rich.console import Console

from srppo.report.terminal import result_table


def text_of(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def row(model, group, scores, reward=0.5, length=4.0, eos=1.0):
    return {
        "model": model,
        "decoding": "T=1",
        "group": group,
        "n": 3,
        "scores": scores,
        "response_length": length,
        "eos_rate": eos,
        "reward": reward,
    }


def test_models_are_rows_groups_are_columns_and_scores_share_a_cell():
    rows = [
        row("sft", "a", {"accuracy": 0.25, "format": 0.5}, length=4.0, eos=1.0),
        row("sft", "b", {"accuracy": 0.75, "format": 1.0}, length=6.0, eos=0.5),
        row("policy", "b", {"accuracy": 0.9, "format": 0.95}),
        row("policy", "a", {"accuracy": 0.8, "format": 0.85}),
    ]
    lines = text_of(result_table({"groups": ["a", "b"], "rows": rows})).splitlines()
    assert any("accuracy/format" in line for line in lines)
    cells = {line.split()[0]: line.split()[1:] for line in lines if "T=1" in line}
    # length and EOS are means over the groups
    assert cells["sft"] == ["T=1", "0.25/0.50", "0.75/1.00", "5.0", "75%"]
    assert cells["policy"] == ["T=1", "0.80/0.85", "0.90/0.95", "4.0", "100%"]


def test_without_scores_the_reward_stands_in():
    table = text_of(result_table({"groups": ["all"], "rows": [row("base", "all", {}, -1.5)]}))
    assert "reward" in table
    assert "-1.50" in table
