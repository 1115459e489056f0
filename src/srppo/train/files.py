"""Files that are whole or as they were, also after a crash, and errors that name path and cure."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from srppo.errors import RunDirError


def write_text(target: Path, text: str, run_dir: Path) -> None:
    """Write a file of a run aside, flush it to the disk and rename it into place."""
    aside = target.with_name(target.name + ".part")
    with writing(target):
        make_folder(target.parent, run_dir)
        aside.write_text(text, encoding="utf-8")
        flush(aside)
        os.replace(aside, target)
        flush(target.parent, deep=False)


def make_folder(folder: Path, run_dir: Path) -> None:
    """`mkdir -p`, but for the run directory itself: if that is gone, so is the run.

    Raises:
        FileNotFoundError: it is gone.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the run directory was removed", str(run_dir))
    inner = folder.relative_to(run_dir).parts
    for i in range(len(inner)):  # not mkdir(parents=True): it may be removed at this very moment
        run_dir.joinpath(*inner[: i + 1]).mkdir(exist_ok=True)


def flush(path: Path, deep: bool = True) -> None:
    """To the disk: a file, or a directory with all that it holds; not `deep`: its names only."""
    for inner in path.iterdir() if deep and path.is_dir() else ():
        flush(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names path and cure."""
    try:
        yield
    except RunDirError:
        raise
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        misplaced = isinstance(e, FileExistsError | NotADirectoryError | PermissionError)
        raise RunDirError(
            f"cannot write {path} ({reason}): this part of the run is lost, what was written "
            f"before is whole. {'S' if misplaced else 'Free space or s'}et output_dir to a "
            "directory that you may write to, then run the same command again."
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
