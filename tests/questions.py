"""Small benchmarks of our own invention, in the benchmarks' columns."""

from __future__ import annotations

import json
from pathlib import Path

IFEVAL = [
    {
        "key": 1,
        "prompt": "Describe a pond, in lower case and without a comma.",
        "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    },
    {
        "key": 2,
        "prompt": "Use the word heron twice, at least.",
        "instruction_id_list": ["keywords:frequency"],
        "kwargs": [{"keyword": "heron", "frequency": 2, "relation": "at least"}],
    },
    {
        "key": 3,
        "prompt": "Write a line in which # occurs at least once.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "#", "let_frequency": 1, "let_relation": "at least"}],
    },
]
"""The last is scored at random: # is no letter."""

GSM8K = [
    ("Ann has 5 pens and buys 13. How many has she?", "5 + 13 = <<5+13=18>>18 pens.\n#### 18"),
    ("A shed holds 617 bales twice over. How many?", "2 * 617 = 1234 bales.\n#### 1,234"),
    ("Two ducks lay 3 eggs each. How many eggs?", "2 * 3 = 6.\n#### 6"),
    ("Tom had 9 nuts and lost 4. How many are left?", "9 - 4 = 5.\n#### 5"),
]

GPQA = [
    {
        "Question": f"Of the invented metals, which one melts at {k} degrees?",
        "Correct Answer": f"metal number {k}",
        **{f"Incorrect Answer {i}": f"metal number {k}{i}" for i in (1, 2, 3)},
    }
    for k in range(10, 22)
]


ALPACA = [
    {"instruction": f"Name {n} ponds.", "output": ", ".join("pond" for _ in range(n)),
     "generator": "gpt4_1106_preview", "dataset": "own"}
    for n in (2, 3, 5)
]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
