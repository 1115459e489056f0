"""A model of a run gets its card: README.md, as the hub shows it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srppo.errors import RunDirError
from srppo.report import provenance, results
from srppo.report.numbers import duration, fixed, plain
from srppo.report.read import Json, RunFiles, mapping, number, read, sequence

REPOSITORY = "OWNER/NAME"
"""Stands in the card's example where the hub name goes; `srppo push` puts it there."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow|txt|ya?ml)(\.gz)?$")
_DIRECTORY = re.compile(r"""(?:^|(?<=[\s:="'(\[]))~?/(?!/)(?:[^/\s"':,]+/)*""")
"""The directory in front of a file: a card's reader has not got it, and it may name its owner."""


def write_cards(run_dir: Path) -> list[Path]:
    """Write README.md into every model directory of a run, from what there is by now; none is
    written where run.json is missing.

    Raises:
        RunDirError: no run, a corrupt file in it, or a card cannot be written.
    """
    files = read(run_dir)
    if not _recipe(files):
        return []
    written = []
    for name in ("sft", "policy", *(f"controls/{c}" for c in mapping(_recipe(files), "controls"))):
        directory = run_dir / name
        if not directory.is_dir():
            continue
        target, aside = directory / "README.md", directory / "README.md.part"
        try:
            aside.write_text(card(files, name, adapter=_is_adapter(directory)), encoding="utf-8")
            os.replace(aside, target)
        except OSError as e:
            raise RunDirError(
                f"{target} cannot be written ({e}): the model has no card. Free some space or make "
                "the directory writable, then run `srppo report` again."
            ) from e
        written.append(target)
    return written


def card(files: RunFiles, name: str, *, adapter: bool, merged: bool = False) -> str:
    """The card of the model in the run's directory `name`, as Markdown with a YAML head.

    `adapter`: a LoRA adapter; `merged`: a whole model that was one. The same files give the same
    card. Directories of this machine are left out.
    """
    run, recipe = files.run or {}, _recipe(files)
    facts = provenance.view(files)
    control = mapping(mapping(recipe, "controls"), name.removeprefix("controls/"))
    by_ppo = name != "sft" and (not control or control.get("ppo") is not None)
    by_sft = name == "sft" or control.get("sft") is not None
    data = [row for row in facts.data if by_ppo or row[0] != "prompts"] if facts else []
    text = _ENVIRONMENT.get_template("card.md.j2").render(
        metadata=_metadata(recipe, data, adapter).to_yaml(),
        title=f"{run.get('name') or files.name}: {name.removeprefix('controls/')}",
        by_ppo=by_ppo,
        by_sft=by_sft,
        control=control,
        adapter=adapter,
        merged=merged,
        quantize=mapping(recipe, "model").get("quantize"),
        recipe=recipe,
        settings=provenance.flat({k: v for k, v in recipe.items() if k != "output_dir"}),
        steps=plain(len(files.ppo)) if files.ppo else None,
        repository=REPOSITORY,
        model=name.removeprefix("controls/"),
        headline=_headline(files),
        measured=_measured(files, name.removeprefix("controls/")),
        nll=[(m, fixed(number(v), 2)) for m, v in mapping(files.results, "held_out_nll").items()],
        audit=_audit(files.audit) if by_ppo else None,
        data=data,
        notes=facts.data_notes if facts and by_ppo else [],
        run=run,
        hardware=_hardware(mapping(run, "hardware")),
        versions=mapping(run, "versions"),
        time=_time(run),
        stopped=mapping(run, "stopped").get(name),
        changes=provenance.changes(run),
    )
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _metadata(recipe: Json, data: list[tuple[str, str, str, str, str]], adapter: bool) -> Any:
    """The YAML head. Only what the hub can resolve: local models and files are in the text."""
    base = str(mapping(recipe, "model").get("base"))
    sources = dict.fromkeys(source for name, source, *_ in data if name not in ("eval", "curve"))
    datasets = [s for s in sources if _on_hub(s)]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if _on_hub(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _on_hub(base) else None,
        datasets=datasets or None,
        tags=["srppo", "self-rewarding-ppo", "arxiv:2510.21090"],
    )


def _on_hub(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name) and not _FILE.search(name) and not Path(name).exists())


def _headline(files: RunFiles) -> str | None:
    """The report's sentence on top; None if nothing was measured."""
    if not results.table(files.results):
        return None
    found = results.headline(files)
    parts = "; ".join(
        f"{group}: {figures}" if group else figures for group, figures, _ in found.parts
    )
    return f"{found.before} {parts}."


def _measured(files: RunFiles, model: str) -> dict[str, Any] | None:
    """The result table, a row for each model, decoding and group; of the controls, only this."""
    table = results.table(files.results)
    if not table:
        return None
    titles = list(dict.fromkeys(title for *_, own in table.heads for title in own))
    reward = {(m, d, g): value for m, d, g, _, value in table.other}
    rows, others, current = [], [], ""
    for shown, decoding, groups in table.rows:
        current = shown or current
        if current not in (*results.MODELS, model):
            others.append(current)
            continue
        for (group, n, own), cells in zip(table.heads, groups, strict=True):
            values = dict(zip(own, cells, strict=True))
            rows.append(
                [
                    f"{current} (this)" if current == model else current,
                    *(decoding, group, n),
                    *(_with_interval(values[t]) if t in values else "–" for t in titles),
                    reward.get((current, decoding, group), "–"),
                ]
            )
    return {"titles": [*titles, "reward"], "rows": rows, "others": list(dict.fromkeys(others))}


def _with_interval(cell: results.Cell) -> str:
    return f"{cell.value} ± {cell.pm}" if cell.pm else cell.value


def _audit(audit: Json | None) -> dict[str, Any] | None:
    if not audit:
        return None
    curve, separation = mapping(audit, "curve"), mapping(audit, "separation")
    rewards = mapping(audit, "reward")
    return {
        "prompts": plain(number(audit.get("prompts"))),
        "reward": [
            (name, fixed(number(mapping(rewards, name).get("mean")), 2, sign=True))
            for name in rewards
        ],
        "sft_auc": fixed(number(separation.get("sft_vs_base_auc")), 2),
        "demonstrations_auc": fixed(number(separation.get("demonstrations_vs_base_auc")), 2),
        **{key: plain(number(curve.get(key))) for key in ("lam_star", "lam_recipe")},
        **{key: fixed(number(curve.get(key)), 2) for key in ("nll_sft", "nll_recipe")},
        "warnings": [str(w) for w in sequence(audit, "warnings")],
    }


def _time(run: Json) -> str | None:
    stages = mapping(run, "stages")
    seconds = [number(mapping(stages, name).get("seconds")) for name in stages]
    known = [s for s in seconds if s is not None]
    return duration(sum(known)) if known else None


def _hardware(hardware: Json) -> str:
    cores, memory = number(hardware.get("cores")), number(hardware.get("memory_gib"))
    parts = [
        hardware.get("gpu"),
        cores and f"{plain(cores)} cores",
        memory and f"{plain(memory)} GiB memory",
    ]
    return ", ".join(str(part) for part in parts if part)


def _recipe(files: RunFiles) -> Json:
    return mapping(files.run, "recipe")


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _public(text: object) -> str:
    """One line, without directories of this machine."""
    return " ".join(_DIRECTORY.sub("", str(text)).split())


def _cell(text: object) -> str:
    """Text that stays text in a Markdown table, and shows `<eos>` instead of swallowing it."""
    return _public(text).translate({ord(c): f"\\{c}" for c in "\\|<*_`["})


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # Markdown: `text` and `public` are its escapes
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"text": _cell, "public": _public}
