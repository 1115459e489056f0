"""AlpacaEval's instructions and the outputs to compare with, and which row is about which."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from srppo.errors import ConfigError, DataError

Row = dict[str, Any]

REFERENCE_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
"""alpaca-eval's name for the judge and its prompt that AlpacaEval 2 is defined by."""
HUB = "tatsu-lab/alpaca_eval"
REFERENCES = ("reference_outputs_gpt4_1106_preview.json", "alpaca_eval_gpt4_baseline.json")
"""GPT-4 Turbo's responses, under their name here and on the hub."""
GAMED = ("df_gamed.csv",)
"""What the length control is fitted with: the difficulty of the instructions, and how GPT-4 Turbo
fares when told to be verbose or concise."""


@dataclass(frozen=True)
class References:
    """The benchmark: instructions in their order, each with the output to compare with."""

    outputs: list[Row]
    """`instruction`, `output`, `generator`."""
    sha256: str | None
    """Of all outputs; None where their order is not known to be AlpacaEval's."""
    limit: int | None = None
    """Only the first so many are asked for."""

    def __len__(self) -> int:
        return len(self.outputs[: self.limit])

    @cached_property
    def places(self) -> dict[str, int]:
        """Number of each instruction, from 0; blanks around it do not count."""
        return {row["instruction"].strip(): i for i, row in enumerate(self.outputs)}

    def first(self, n: int | None) -> References:
        """The first n, or all; their numbers stay."""
        return replace(self, limit=n)


@dataclass(frozen=True)
class Placed:
    """Rows under their instruction's number, ascending; and what became of the others."""

    rows: dict[int, Row]
    notes: list[str]


def load_references(data_dir: Path | None, offline: bool) -> References:
    """GPT-4 Turbo's responses, from `data_dir`, or from the hub or its cache.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = _find(data_dir, REFERENCES, offline)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        pairs = json.dumps([[row["instruction"], row["output"]] for row in rows])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(
            f"{path} is no list of objects with instruction and output ({type(e).__name__}: {e}): "
            f"there is nothing to compare with. Get {REFERENCES[1]} of {HUB} anew."
        ) from e
    return References(rows, sha256_of(pairs))


def gamed_file(data_dir: Path | None, offline: bool) -> Path:
    """What the length control needs. Raises DataError where it is not to be had."""
    return _find(data_dir, GAMED, offline)


def place(rows: Sequence[Row], references: References) -> Placed:
    """Matches rows to instructions by their `instruction` or `prompt`.

    Raises:
        DataError: a row has neither, or no row fits.
    """
    found: dict[int, Row] = {}
    unknown, again = [], []
    for number, row in enumerate(rows, start=1):
        text = instruction_of(row, number)
        i = references.places.get(text.strip())
        if i is None:
            unknown.append(text)
        elif i in found:
            again.append(text)
        elif i < len(references):
            found[i] = row
    if not found:
        raise DataError(
            f"none of {len(rows)} row(s) is about one of AlpacaEval's {len(references)} "
            f"instructions: there is nothing to score{named(unknown)}. Give responses to the "
            "instructions of AlpacaEval itself."
        )
    wanted = references.outputs[: references.limit]
    missing = [row["instruction"] for i, row in enumerate(wanted) if i not in found]
    kinds = {
        f"of {len(references)} instructions have no row": missing,
        "rows are about no instruction of AlpacaEval and are left out": unknown,
        "rows repeat an instruction and are left out, the first of each counts": again,
    }
    notes = [f"{len(texts)} {what}{named(texts)}" for what, texts in kinds.items() if texts]
    return Placed(dict(sorted(found.items())), notes)


def instruction_of(row: Row, number: int) -> str:
    """The instruction that a row is about. Raises DataError where it has none."""
    text = row.get("instruction", row.get("prompt"))
    if isinstance(text, str):
        return text
    raise DataError(
        f"row {number} has no text under `instruction` or `prompt` (its columns: "
        f"{', '.join(row) or 'none'}): nobody can tell what it is about. Name that column so."
    )


def own_references(rows: Sequence[Row]) -> References:
    """The instructions of the annotations themselves."""
    own: dict[str, Row] = {}
    for number, row in enumerate(rows, start=1):
        text = instruction_of(row, number)
        own.setdefault(text.strip(), {"instruction": text, "output": row.get("output_1", "")})
    return References(list(own.values()), None)


def require_alpaca_eval() -> None:
    """Raises ConfigError, with the cure, where alpaca-eval cannot be imported."""
    try:
        with warnings.catch_warnings(action="ignore"):  # setuptools', about alpaca-eval
            import alpaca_eval.metrics.glm_winrate  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            f"alpaca_eval cannot be imported ({e}): AlpacaEval is scored by it. "
            "Run: pip install 'srppo[eval]'"
        ) from e


def _find(data_dir: Path | None, names: Sequence[str], offline: bool) -> Path:
    """The first of the files that lies in `data_dir`, or the last of them from the hub."""
    for folder in (data_dir / "alpaca_eval", data_dir) if data_dir else ():
        for name in names:
            if (folder / name).is_file():
                return folder / name
    require_alpaca_eval()
    from alpaca_eval.metrics.glm_winrate import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repo_id=HUB, filename=names[-1], repo_type="dataset", local_files_only=offline
            )
        )
    except (OSError, ValueError, NetworkError) as e:
        raise DataError(
            f"{names[0]} is neither in {data_dir or '--data-dir'} nor to be had from the hub "
            f"({type(e).__name__}). Put {names[-1]} of the data set {HUB} into "
            "DIR/alpaca_eval and give --data-dir DIR."
        ) from e


def named(texts: Sequence[str]) -> str:
    """`: ` and the first few, quoted; nothing where there are none."""
    some = ", ".join(repr(text if len(text) < 60 else text[:57] + "...") for text in texts[:3])
    return f": {some}{', ...' if len(texts) > 3 else ''}" if texts else ""


def sha256_of(text: str) -> str:
    """Of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
