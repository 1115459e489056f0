"""Where rows come from: files, folders, globs, the Hugging Face hub, a Python generator, mixtures.

data.jsonl  .json  .csv  .parquet  .arrow     a local file (a file is one split)
folder  folder/*.jsonl  folder/**/*.parquet   its files, by split; all that match
owner/name  owner/name:config@revision        `datasets.load_dataset`
tulu-v2-mix  alpaca  ...                      a preset (see `presets`)
alpaca=WHERE                                  the preset's columns, kept somewhere else
python:package.module:function                function(seed=..., split=...) yields rows
"""

import glob
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srppo.config_data import SourceConfig
from srppo.data.files import READERS, Rows, read_file
from srppo.data.mixture import Part, Source
from srppo.data.presets import PRESETS, Preset
from srppo.data.schemas import Reading
from srppo.data.store import OnDisk
from srppo.errors import DataError, SrppoError

SHUFFLE_BUFFER = 10_000
"""Rows of a stream among which each one is drawn."""


def open_source(
    configs: str | Sequence[SourceConfig],
    *,
    seed: int,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> Source:
    """The rows that a setting names; a string stands for a source without further settings.

    `seed` reaches generators and streams; `split` is without effect on files that are named, and
    like `columns` holds where a source has none of its own.

    Raises:
        DataError: a source does not exist, cannot be reached, is of an unknown kind, or is one of
            several and has no rows.
    """
    if isinstance(configs, str):
        configs = [SourceConfig(source=configs)]
    found = [_open(config, seed, split, columns or {}) for config in configs]
    numbered = len(found) == 1 and len(found[0].files) == 1
    for part in found if len(found) > 1 else ():
        if not len(part):
            raise DataError(
                f"{part.name}: has no readable rows, so the mixture would be one without it. Give "
                "a source with rows, or leave it out."
            )
    parts = [replace(part, numbered=numbered) for part in found]
    return Source(", ".join(part.name for part in parts), parts)


def _open(config: SourceConfig, seed: int, split: str, columns: Mapping[str, str]) -> Part:
    split, columns = config.split or split, columns if config.columns is None else config.columns
    preset, where = _preset(config.source)
    if preset is not None:
        columns = config.columns or {}  # a preset knows its own
        split = preset.splits.get(split, split)
    reading = Reading(preset.schema if preset and not columns else None, columns)
    if config.stream:
        files = [(where, _stream(where, split, seed, config.limit or 0))]
    else:
        files = _files(where, split, seed)
    return Part(config.source, files, reading, config.limit, config.weight)


def _preset(source: str) -> tuple[Preset | None, str]:
    """The preset that a source names, and where its rows are."""
    name, _, elsewhere = source.partition("=")
    preset = PRESETS.get(name)
    if preset is None or (not elsewhere and Path(source).exists()):
        return None, source
    return preset, elsewhere or preset.source


def _files(where: str, split: str, seed: int) -> list[tuple[str, Rows]]:
    """Label and rows of each file of a source."""
    if where.startswith("python:"):
        return [(where, Rows.of(_generate(where, seed, split), OnDisk()))]
    path = Path(where).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if not path.exists() and glob.has_magic(where):
        names = sorted(n for n in glob.glob(str(path), recursive=True) if Path(n).is_file())
        if not names:
            raise DataError(
                f"{where}: no file matches, seen from {Path.cwd()}. Mend the pattern; ** stands "
                "for any folders."
            )
        return [(name, read_file(Path(name))) for name in names]
    if path.is_file() or path.suffix.lower() in READERS:
        return [(where, read_file(path))]
    return [(where, _hub(where, split))]


def _folder(path: Path, split: str) -> list[tuple[str, Rows]]:
    """What `save_to_disk` wrote, or data files, whose names say their split as on the hub."""
    import datasets  # late: seconds to import, and single text files do without
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    saved = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    if any(saved):
        found = datasets.load_from_disk(str(path))
        splits = found if isinstance(found, datasets.DatasetDict) else {split: found}
        _require_split(path, split, splits)
        return [(str(path), Rows(splits[split], range(1, len(splits[split]) + 1)))]
    if _names_its_files(path / "README.md"):
        return [(str(path), _hub(str(path), split))]
    try:
        patterns = get_data_patterns(str(path.resolve()))
    except EmptyDatasetError as error:
        raise DataError(
            f"{path}: holds no data files. Give a folder of {', '.join(READERS)}."
        ) from error
    splits = {str(name): found for name, found in patterns.items()}
    _require_split(path, split, splits)
    names = DataFilesList.from_patterns(splits[split], base_path=str(path.resolve()))
    readable = sorted(n for n in names if Path(n).suffix.lower() in READERS)
    if not readable:
        raise DataError(
            f"{path}: none of the files of split {split!r} can be read, {min(names)} first. "
            f"Save them as {', '.join(READERS)}."
        )
    within = [Path(name).relative_to(path.resolve()) for name in readable]
    return [(str(path / name), read_file(path / name)) for name in within]


def _names_its_files(card: Path) -> bool:
    """Whether a data set card says which files are which split; then `datasets` reads them."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return False
    return text.startswith("---") and "configs:" in text.split("\n---", 1)[0]


def _require_split(path: Path, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise DataError(
            f"{path}: has no split {split!r}; it has {', '.join(splits)}. Set the source's split "
            "to one of them."
        )


def _hub(where: str, split: str) -> Rows:
    rows = _load_dataset(where, split)
    return Rows(rows, range(1, len(rows) + 1))


def _stream(where: str, split: str, seed: int, limit: int) -> Rows:
    """`limit` rows of a stream, each drawn from SHUFFLE_BUFFER; numbered as drawn."""
    path = Path(where).expanduser()
    if path.is_file() or where.startswith("python:"):
        raise DataError(
            f"{where}: stream=true is for the hub; this is read in place anyway. Leave it out."
        )
    rows = _load_dataset(where, split, streaming=True)
    try:
        drawn = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(limit)
        return Rows.of(drawn, OnDisk())
    except SrppoError:
        raise
    except Exception as error:  # the network may fail at any row
        raise DataError(_cannot_load(where, split, error)) from error


def _load_dataset(where: str, split: str, **options: Any) -> Any:
    """`datasets.load_dataset` of `name:config@revision`."""
    import datasets  # late, as above

    name, _, revision = where.partition("@")
    name, _, config = name.partition(":")
    if revision:
        options["revision"] = revision
    try:
        return datasets.load_dataset(name, config or None, split=split, **options)
    except Exception as error:  # the hub client, the network and each file format raise their own
        raise DataError(_cannot_load(where, split, error)) from error


def _cannot_load(where: str, split: str, error: Exception) -> str:
    return (
        f"{where}: split {split!r} cannot be loaded ({type(error).__name__}: {error}). Check the "
        "name (owner/name:config@revision; config where there are several, revision to pin one), "
        f"the split and the network, or give a preset ({', '.join(PRESETS)}) or a local file that "
        f"ends in {', '.join(READERS)}."
    )


def _generate(where: str, seed: int, split: str) -> Iterator[Any]:
    module_name, _, function_name = where.removeprefix("python:").partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise DataError(
            f"{where}: cannot be imported ({type(error).__name__}: {error}). Write "
            "python:package.module:function and put the folder of the package on PYTHONPATH."
        ) from error
    try:
        yield from function(seed=seed, split=split)
    except SrppoError:
        raise
    except Exception as error:  # the user's code can raise anything
        raise DataError(
            f"{where}: failed ({type(error).__name__}: {error}). It is called as "
            "function(seed=int, split=str) and yields rows, each a dictionary."
        ) from error
