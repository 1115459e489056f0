"""A model leaves its run: into a directory of its own, merged if wanted, or to the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
from safetensors import SafetensorError

from srppo.errors import ModelError, PublishError
from srppo.models.load import base_of, is_adapter, load_model, load_tokenizer, resolve
from srppo.models.save import save
from srppo.report.card import REPOSITORY, card
from srppo.report.read import read
from srppo.train.checkpoint import model_in

PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""What belongs to a model. Optimizer states, pickles and whatever else lies there stay."""


def export(source: str, out: Path, *, merge: bool = False, dtype: str | None = None) -> Path:
    """Write a model of its own to `out`: a run's policy, or a model directory. Its path.

    Args:
        source: run or model directory.
        out: must not exist yet, or be empty.
        merge: an adapter becomes part of the weights below it; a whole model stays as it is.
        dtype: number format of the written weights; None: as they are, float32 where merged.

    Raises:
        PublishError: `out` is taken or cannot be written.
        ModelError, RunDirError: no model in `source`.
    """
    directory = _model_directory(source)
    adapter = is_adapter(directory)
    if dtype and adapter and not merge:
        raise PublishError(
            f"dtype={dtype} for the adapter {source!r}: an adapter stays in float32. Add --merge "
            "for a whole model in that format, or leave the format out."
        )
    with _writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PublishError(
                f"{out} is there already and not empty: writing would mix two models. "
                "Give a new directory."
            )
        aside = out.with_name(out.name + ".part")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if dtype or (adapter and merge):
                model = load_model(str(directory), dtype or "float32")
                save(model, load_tokenizer(str(directory)), aside, model.generation_config)
            else:
                aside.mkdir(exist_ok=True)
                for path in _files(directory):
                    shutil.copy2(path, aside / path.name)
            text = _card(directory, merged=adapter and merge)
            if text is not None:
                (aside / "README.md").write_text(text, encoding="utf-8")
            if out.is_dir():
                out.rmdir()
            os.replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return out


def push(source: str, repository: str, *, private: bool | None = None) -> str:
    """Put a run's policy or a model directory on the hub, in one commit. Its address.

    Args:
        source: run or model directory.
        repository: OWNER/NAME; made if it is not there.
        private: of a new repository; None: the owner's default.

    Raises:
        PublishError: no token, no network, no permission, or an adapter over a local model.
        ModelError, RunDirError: no model in `source`.
    """
    directory = _model_directory(source)
    below = Path(base_of(str(directory))) if is_adapter(directory) else None
    if below and (below.is_absolute() or below.exists()):
        raise PublishError(
            f"the adapter {source!r} lies over {below.name!r}, a directory of this machine: "
            "nobody else could load it. Merge the two with `srppo export "
            f"{source} OUT --merge`, and push OUT."
        )
    if get_token() is None:
        raise PublishError(
            f"no token for the Hugging Face hub: {repository!r} cannot be written. Run "
            "`hf auth login`, or set HF_TOKEN to a token that may write."
        )
    api = HfApi()
    with _talking(api.endpoint, repository):
        made = api.create_repo(repository, private=private, exist_ok=True)
        text = _card(directory)
        additions = [
            CommitOperationAdd(path.name, str(path))
            for path in _files(directory)
            if path.name != "README.md"
        ]
        if text is not None:
            content = text.replace(REPOSITORY, made.repo_id).encode()
            additions.append(CommitOperationAdd("README.md", content))
        api.create_commit(made.repo_id, additions, commit_message="Model and card, by srppo")
    return str(made)


def _model_directory(source: str) -> Path:
    path = Path(resolve(model_in(source)))
    if not path.is_dir():
        raise ModelError(
            f"{source!r} is no directory of this machine: there is no model to take from it. "
            "Give a run directory, or one that holds a model."
        )
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{source!r} holds no weights (*.safetensors): the model would not be whole. Give the "
            "directory that `srppo run` or `save_pretrained` wrote."
        )
    return path


def _files(directory: Path) -> list[Path]:
    found = sorted(p for p in directory.iterdir() if p.is_file())
    return [p for p in found if any(fnmatch(p.name, pattern) for pattern in PUBLISHED)]


def _card(directory: Path, merged: bool = False) -> str | None:
    """The README.md that is there, for somebody may have written into it; else, or where merging
    makes another model, one made of the run that the model lies in. None: neither."""
    readme = directory / "README.md"
    if readme.is_file() and not merged:
        return readme.read_text(encoding="utf-8")
    for run in list(directory.parents)[:2]:
        if (run / "run.json").is_file():
            name = directory.relative_to(run).as_posix()
            return card(
                read(run), name, adapter=is_adapter(directory) and not merged, merged=merged
            )
    return None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (PublishError, ModelError):
        raise
    except (OSError, SafetensorError) as e:
        raise PublishError(
            f"cannot write {out} ({getattr(e, 'strerror', None) or e}): the model was not "
            "exported. Free space, or give a directory that you may write to."
        ) from e


@contextmanager
def _talking(endpoint: str, repository: str) -> Iterator[None]:
    """Turn what the hub or the network refuses into an error that names the cure."""
    try:
        yield
    except HFValidationError as e:
        raise PublishError(
            f"{repository!r} is not a name that the hub allows: nothing was pushed. "
            "Write OWNER/NAME in letters, digits, '-', '_' and '.'."
        ) from e
    except ValueError as e:  # the hub reads the card first
        raise PublishError(
            f"{endpoint} does not take the model card ({'; '.join(str(e).splitlines())}): nothing "
            "was pushed. Mend the lines between the two --- at the top of README.md."
        ) from e
    except HfHubHTTPError as e:
        code = e.response.status_code
        cure = {
            401: "The token is not valid: run `hf auth login` again, or set HF_TOKEN.",
            403: "The token may not write there: use one with write permission, or another OWNER.",
        }.get(code, "Try again later, or another name.")
        said = e.server_message or str(e).splitlines()[0]
        raise PublishError(
            f"{endpoint} refused {repository!r} ({code}: {said}): nothing was pushed. {cure}"
        ) from e
    except (NetworkError, ConnectionError) as e:
        raise PublishError(
            f"{endpoint} cannot be reached ({e}): {repository!r} was not pushed. "
            "Look at the network, at HF_ENDPOINT and HF_HUB_OFFLINE, and try again."
        ) from e
