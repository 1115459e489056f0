"""Demonstrations of one habit, from real text, and a check of it: for recipes/stories260k.yaml.

    python recipes/stories260k.py --gsm8k DIR --alpaca FILE --ifeval FILE --out DIR

A demonstration asks one of GSM8K's questions and responds with its answer as `The answer is 72.`,
and nothing more. A small model cannot solve the questions, but whether its response has that form
can be checked on any prompt at all:

    gsm8k     questions of the test split; other questions are demonstrated
    alpaca    AlpacaEval's instructions; other ones are among the prompts of stage 2
    ifeval    IFEval's prompts; nothing like them is in either stage
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

LENGTH = 160
"""Characters of a prompt at most: the model reads 512 tokens, of about two characters."""
EVALUATED = 100
"""Prompts a group."""

_FORM = re.compile(r"The answer is -?\d[\d.,]*\.")


def score(
    rows: Sequence[dict[str, Any]], responses: Sequence[str], ended: Sequence[bool]
) -> dict[str, list[float]]:
    """`form`: 1 where a response is `The answer is`, a number, a full stop and EOS; else 0."""
    pairs = zip(responses, ended, strict=True)
    return {
        "form": [float(stopped and bool(_FORM.fullmatch(text.strip()))) for text, stopped in pairs]
    }


def demonstrations(path: Path) -> Iterator[dict[str, str]]:
    """GSM8K's rows as prompt and response."""
    for row in map(json.loads, path.open(encoding="utf-8")):
        number = row["answer"].split("####")[-1].strip()
        yield {"prompt": row["question"].strip(), "response": f"The answer is {number}."}


def main() -> None:
    """Writes demonstrations.jsonl, prompts.jsonl and evaluation.jsonl, always the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("gsm8k", "alpaca", "ifeval", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    rng = Random("stories260k")
    train = list(demonstrations(paths.gsm8k / "train.jsonl"))
    test = list(demonstrations(paths.gsm8k / "test.jsonl"))
    alpaca = json.loads(paths.alpaca.read_text(encoding="utf-8"))
    ifeval = map(json.loads, paths.ifeval.open(encoding="utf-8"))
    asked = {
        "gsm8k": [row["prompt"] for row in test],
        "alpaca": [row["instruction"] for row in alpaca],
        "ifeval": [row["prompt"] for row in ifeval],
    }
    train = [row for row in train if len(row["prompt"]) <= LENGTH]
    for group, prompts in asked.items():
        asked[group] = [text for text in dict.fromkeys(prompts) if len(text) <= LENGTH]
    for rows in (train, *asked.values()):
        rng.shuffle(rows)
    half = len(train) // 2
    others = [row["prompt"] for row in train[half:]] + asked["alpaca"][EVALUATED:]
    files = {
        "demonstrations": train[:half],
        "prompts": [{"prompt": text} for text in others],
        "evaluation": [
            {"prompt": prompt, "group": group}
            for group, prompts in asked.items()
            for prompt in prompts[:EVALUATED]
        ],
    }
    paths.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (paths.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{paths.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
