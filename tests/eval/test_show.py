"""What stands below the scores in a terminal."""

import io

import pytest
from rich.console import Console

from srppo.eval.show import show_results


def record(**sizes: int) -> dict:
    """A model's results, without any score."""
    metric = {"value": 0.5, "low": None, "high": None}
    unknown = dict.fromkeys(
        ("mean_length", "eos_rate", "truncated_responses", "empty", "truncated_prompts")
    )
    tasks = {
        task: {"metrics": {"score": metric | {"n": n}}, "notes": [], **unknown}
        for task, n in sizes.items()
    }
    return {"model": {"name": "mine"}, "tasks": tasks, "failed": {}}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record(gsm8k=12)], "With 12 questions a difference below 40.0 points can be chance (95%"),
        ([record(gsm8k=1)], "With 1 question a difference below 100.0 points can be chance (95%"),
        (
            [record(ifeval=541, gsm8k=1319), record(gpqa=448)],
            "With 448 questions a difference below 6.5 points can be chance, with 1319 one below "
            "3.8 (95%",
        ),
        ([record()], ""),
    ],
)
def test_what_can_be_chance_is_said_of_the_sizes_at_hand(records, said):
    """1.96 sqrt(0.5 / n): 0.400 of 12, 0.0655 of 448, 0.0382 of 1319."""
    out = io.StringIO()
    show_results(records, Console(file=out, width=300))
    assert said in out.getvalue()
    assert ("chance" in out.getvalue()) == bool(said)
