"""The page itself."""

import contextlib
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srppo.errors import RunDirError
from srppo.report import audit, curves, provenance, results, samples
from srppo.report.numbers import duration
from srppo.report.read import RunFiles, mapping, number, read

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def build(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html, one page that needs nothing else, and returns its path.

    Every file of the run directory may be missing; its part is then left out with a note. The
    page holds no script and loads nothing. All text of the run, model output first of all, is
    escaped. The same files give the same bytes.

    Raises:
        RunDirError: no run in `run_dir`, a corrupt file in it, or the page cannot be written.
    """
    page = render(read(Path(run_dir)))
    target = Path(run_dir) / "report.html"
    partial = target.with_name(".report.html.partial")
    try:
        partial.write_bytes(page.encode("utf-8"))
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunDirError(
            f"{target} cannot be written ({error}): there is no report of this run. "
            "Free some space or make the directory writable, then run `srppo report` again."
        ) from error
    return target


def render(files: RunFiles) -> str:
    """The page as text. Lone surrogates, which JSON can hold and UTF-8 cannot, become U+FFFD."""
    main, further = curves.panels(files)
    run = files.run or {}
    stages = mapping(run, "stages")
    seconds = [number(mapping(stages, name).get("seconds")) for name in stages]
    page = _ENVIRONMENT.get_template("template.html.j2").render(
        name=str(run.get("name") or files.name),
        headline=results.headline(files),
        duration=duration(sum(s for s in seconds if s is not None)) if any(seconds) else None,
        provenance=provenance.view(files),
        table=results.table(files.results),
        panels=main,
        further=further,
        audit=audit.view(files.audit),
        samples=samples.view(files.samples),
        levels=samples.LEVELS,
        notes=files.notes,
    )
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
