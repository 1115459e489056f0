"""The run directory: one run, its parts written whole or not at all.

run.json  recipe.yaml  data.json  metrics/*.jsonl  checkpoints/STAGE/  sft/  audit.json  policy/
controls/NAME/  best/NAME/  results.json  samples.jsonl  report.html  README.md in each model
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.config import Recipe
from srppo.errors import RunDirError
from srppo.models.roles import Role
from srppo.models.save import as_trained, save
from srppo.provenance import now
from srppo.train.files import flush, make_folder, read_json, write_text, writing
from srppo.train.lock import FILE as LOCK
from srppo.train.lock import Lock, own

OVER = "set output_dir to a new directory, or start over with --fresh, which keeps the old one"
CODE = ("srppo_version", "commit", "versions")
"""What of a record says by which code a run is made."""


class RunDir:
    """A directory that belongs to one recipe and one process. Stages that are done stay done.

    Of several processes the first one owns it and writes; all of them call alike.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: Lock | None) -> None:
        self.path = path
        self.record = record
        """What run.json holds."""
        self._lock = lock

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Raises RunDirError if a new run could not be opened there; nothing is written."""
        path = recipe.run_dir.absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise RunDirError(
                f"cannot write {path}, for {there} is not a directory that you may write to: the "
                "run would be lost. Set output_dir to a directory that you may write to."
            )
        if there == path:
            with writing(path):
                _found(path)

    @staticmethod
    def began(recipe: Recipe) -> str | None:
        """When the run that is there was started, ISO 8601; None where none can be gone on with."""
        try:
            started = read_json(recipe.run_dir / "run.json")["started"]
            return str(datetime.fromisoformat(started).isoformat())
        except (RunDirError, LookupError, TypeError, ValueError):
            return None  # `open` says what is wrong

    @staticmethod
    def open(
        recipe: Recipe,
        provenance: dict[str, Any],
        inputs: dict[str, str] | None = None,
        *,
        allow_change: bool = False,
    ) -> RunDir:
        """Create the directory, or go on with it if it was made by the same recipe from the same
        inputs by the same code.

        Args:
            inputs: what is read, by name, and a hash of it.
            allow_change: go on all the same; run.json then says what changed, and when.

        Raises:
            RunDirError: it holds something else, another process runs it, or it cannot be written.
        """
        path = recipe.run_dir
        if not distributed.is_first():
            record: dict[str, Any] = distributed.from_first(dict)
            if not (path / "run.json").is_file():
                raise RunDirError(
                    f"{path} is not the same directory for {distributed.name()} as for the first "
                    "one: models that one writes could not be read by all. Set output_dir to a "
                    "directory that all machines share."
                )
            if record["inputs"] != (inputs or {}):
                raise RunDirError(
                    f"{distributed.name()} reads other data or models than the first one: they "
                    "would train on different things. Give all machines the same files."
                )
            return RunDir(path, record, None)
        wanted = {**provenance, "recipe": recipe.model_dump(mode="json"), "inputs": inputs or {}}
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            found = _found(path)
        lock = own(path)
        if found:
            run = RunDir(path, read_json(path / "run.json"), lock)
            run._go_on(wanted, allow_change)
        else:
            run = RunDir(path, {**wanted, "stages": {}}, lock)
            run.save_record()
        run.write_text("recipe.yaml", _yaml(wanted["recipe"]))
        distributed.from_first(lambda: run.record)
        return run

    def _go_on(self, wanted: dict[str, Any], allow_change: bool) -> None:
        """Check that this is the same run; remember what is not, where that is allowed."""
        if not isinstance(self.record, dict) or not {"recipe", "stages"} <= self.record.keys():
            raise RunDirError(
                f"{self.path}/run.json was not written by srppo: going on could overwrite "
                "somebody's files. Set output_dir to a new directory."
            )
        changed = self._changes(wanted)
        if changed and not allow_change:
            raise RunDirError(
                f"{self.path} already holds another run: {'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}. Going on would mix the two. Undo the "
                f"change, {OVER}; or go on all the same with --allow-change: what is done stays "
                "as it is."
            )
        if changed:
            self.record.setdefault("changes", []).append({"at": now(), "changed": changed})
            self.record |= {key: wanted[key] for key in CODE if key in wanted}
            self.record |= {"finished": None, "inputs": wanted["inputs"]}
        if changed or self.record["recipe"] != wanted["recipe"]:
            self.record["recipe"] = wanted["recipe"]
            self.save_record()

    def _changes(self, wanted: dict[str, Any]) -> list[str]:
        """What is not as the run began: settings, contents of inputs, code; in words.

        How often it is saved and where a server is may change, and so may the code once everything
        is done.
        """
        began = self.record.get("inputs", {})
        old, new = (_lasting(r["recipe"]) for r in (self.record, wanted))
        old_code, new_code = ({key: r.get(key) for key in CODE} for r in (self.record, wanted))
        return [
            *_differences(old, new),
            *(
                f"{name} holds something else than when the run began"
                for name, digest in wanted["inputs"].items()
                if began.get(name, digest) != digest
            ),
            *(_differences(old_code, new_code) if self.record.get("finished") is None else []),
        ]

    def save_record(self) -> None:
        """Write run.json."""
        self.write_json("run.json", self.record)

    def require(self) -> None:
        """Raises RunDirError if the directory was removed: what is done is to be read from it."""
        if distributed.is_first():
            with writing(self.path):
                make_folder(self.path, self.path)

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
        if distributed.is_first():
            write_text(self.path / name, text, self.path)

    def remove(self, name: str) -> None:
        """A directory of the run, if it is there."""
        with writing(self.path / name):
            if distributed.is_first() and (self.path / name).exists():
                shutil.rmtree(self.path / name)

    def read_json(self, name: str) -> Any:
        """A JSON file of the run. Raises RunDirError if it is missing or unreadable."""
        return distributed.from_first(lambda: read_json(self.path / name))

    def save_model(
        self, name: str, model: Role | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Path:
        """A Hugging Face model directory, written aside and renamed into place."""
        longest = self.record["recipe"]["data"]["max_response_tokens"]
        target = self.path / name
        weights = Role.of(model).whole_weights()
        distributed.from_first(lambda: self._save_model(target, model, tokenizer, longest, weights))
        return target

    def _save_model(
        self,
        target: Path,
        model: Role | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        weights: dict[str, Tensor] | None,
    ) -> None:
        aside = target.with_name(target.name + ".part")
        with writing(target):
            make_folder(target.parent, self.path)
            shutil.rmtree(aside, ignore_errors=True)  # of a crash
            try:
                save(model, tokenizer, aside, as_trained(tokenizer, longest), weights)
                flush(aside)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(aside, target)
                flush(target.parent, deep=False)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def _found(path: Path) -> list[str]:
    """Files of a run directory. Raises RunDirError if they are of something else."""
    # run.json.part is what an interrupted first write leaves behind.
    found = sorted({p.name for p in path.iterdir()} - {"run.json.part", LOCK})
    if found and "run.json" not in found:
        raise RunDirError(
            f"{path} holds files that are not a run of srppo ({found[0]!r} first): writing "
            "there could overwrite them. Set output_dir to a new directory."
        )
    return found


def move_aside(recipe: Recipe) -> Path | None:
    """Make room for a fresh start: the run that is there gets another name, which is returned.

    Raises:
        RunDirError: it is being run, it is none of srppo's, or it cannot be renamed.
    """
    path = recipe.run_dir
    if not (path / "run.json").is_file():
        return None
    lock = own(path)
    taken = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    aside = next(p for p in taken if not p.exists())
    with writing(aside):
        os.rename(path, aside)
    del lock
    return aside


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


def _lasting(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that stay as they were when a run goes on."""
    rollout = recipe.get("rollout") or {}
    return {**recipe, "checkpoint": None, "rollout": {**rollout, "url": None}}


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
