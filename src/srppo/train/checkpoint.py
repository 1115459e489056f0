"""The run directory: one run, its parts written whole or not at all.

run.json  recipe.yaml  data.json  metrics/*.jsonl  sft/  audit.json  policy/  controls/NAME/
results.json  samples.jsonl  report.html  README.md in each model directory
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.config import Recipe
from srppo.errors import RunDirError
from srppo.models.roles import Role
from srppo.models.save import as_trained, save


class RunDir:
    """A directory that belongs to one recipe. Stages that are done stay done."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        """What run.json holds."""

    @staticmethod
    def open(recipe: Recipe, provenance: dict[str, Any]) -> RunDir:
        """Create the directory, or go on with it if it was made by the same recipe.

        Raises:
            RunDirError: it holds something else, or it cannot be written.
        """
        path = recipe.run_dir
        wanted = recipe.model_dump(mode="json")
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            # run.json.part is what an interrupted first write leaves behind.
            found = sorted(p.name for p in path.iterdir() if p.name != "run.json.part")
        if "run.json" in found:
            record = read_json(path / "run.json")
            if not isinstance(record, dict) or not {"recipe", "stages"} <= record.keys():
                raise RunDirError(
                    f"{path}/run.json was not written by srppo: going on could overwrite "
                    "somebody's files. Set output_dir to a new directory."
                )
            changed = _differences(record["recipe"], wanted)
            if changed:
                raise RunDirError(
                    f"{path} already holds another run: {'; '.join(changed[:3])}"
                    f"{' ...' if len(changed) > 3 else ''}. Going on would mix the two. "
                    "Set output_dir to a new directory, or delete this one."
                )
            run = RunDir(path, record)
        elif found:
            raise RunDirError(
                f"{path} holds files that are not a run of srppo ({found[0]!r} first): writing "
                "there could overwrite them. Set output_dir to a new directory."
            )
        else:
            run = RunDir(path, {"recipe": wanted, **provenance, "stages": {}})
            run.save_record()
        run.write_text("recipe.yaml", _yaml(wanted))
        return run

    def save_record(self) -> None:
        """Write run.json."""
        self.write_json("run.json", self.record)

    def is_done(self, stage: str, **facts: Any) -> bool:
        """Whether the stage ran to its end, with these facts."""
        found = self.record["stages"].get(stage, {})
        return found.get("status") == "done" and all(found.get(k) == v for k, v in facts.items())

    def mark_done(self, stage: str, seconds: float, **facts: Any) -> None:
        """Remember that the stage ran to its end."""
        self.record["stages"][stage] = {"status": "done", "seconds": round(seconds, 2), **facts}
        self.save_record()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write one JSON object per line, whole or not at all."""
        self.write_text(name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    def write_text(self, name: str, text: str) -> None:
        """Write a file aside, then rename it into place."""
        target = self.path / name
        aside = target.with_name(target.name + ".part")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, target)

    def read_json(self, name: str) -> Any:
        """A JSON file of the run. Raises RunDirError if it is missing or unreadable."""
        return read_json(self.path / name)

    def save_model(
        self, name: str, model: Role | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Path:
        """A Hugging Face model directory, written aside and renamed into place."""
        longest = self.record["recipe"]["data"]["max_response_tokens"]
        target = self.path / name
        aside = target.with_name(target.name + ".part")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                save(model, tokenizer, aside, as_trained(tokenizer, longest))
                if target.exists():
                    shutil.rmtree(target)
                os.replace(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return target


def model_in(path: str) -> str:
    """A run directory stands for its policy; anything else is unchanged.

    Raises:
        RunDirError: the run has no policy.
    """
    run = Path(path).expanduser()
    if not (run / "run.json").is_file():
        return path
    if not (run / "policy").is_dir():
        raise RunDirError(
            f"{path} has no policy yet: there is no aligned model to use. Finish it with the "
            f"command that began it, or give {run / 'sft'} once that is there."
        )
    return str(run / "policy")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names path and cure."""
    try:
        yield
    except RunDirError:
        raise
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise RunDirError(
            f"cannot write {path} ({reason}): this part of the run is lost, what was written "
            "before is whole. Free space or set output_dir to a directory that you may write to, "
            "then run the same command again."
        ) from e


def read_json(path: Path) -> Any:
    """Raises RunDirError if the file is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RunDirError(
            f"cannot read {path} ({e}): the run cannot be continued or shown. "
            "Delete the run directory and run again."
        ) from e


def _yaml(tree: dict[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for k in sorted(old.keys() | new.keys())
            for line in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)
        ]
    return [] if old == new else [f"{key} was {old!r} and is now {new!r}"]
