"""The result table and the sentence on top of the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from srppo.report import figures
from srppo.report.curves import series
from srppo.report.numbers import fixed, plain, wilson
from srppo.report.read import Json, RunFiles, mapping, number, sequence

MODELS = ("base", "sft", "policy")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of the table; `pm` is the half width of its interval, `note` the exact bounds."""

    value: str
    pm: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows model x decoding; for each group its scores, mean length and EOS rate."""

    heads: list[tuple[str, str, list[str]]]
    """(group, its number of responses, its column titles)."""
    rows: list[tuple[str, str, list[list[Cell]]]]
    """(model, decoding, cells of each group); the model is empty where it repeats."""
    unbounded: list[str]
    """Scores that are not shares, so that they have no interval."""
    other: list[tuple[str, str, str, str, str]]
    """(model, decoding, group, n, reward)."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The main result in one sentence: `before`, then the parts, then `after`."""

    before: str
    parts: list[tuple[str, str, Markup | None]] = field(default_factory=list)
    """(group or empty, figures, picture of the shares with their intervals)."""
    after: str = ""
    shown: list[str] = field(default_factory=list)
    """The models in the pictures; empty where there are none."""


def table(results: Json | None) -> Table | None:
    """The table of results.json; None if it has no rows."""
    rows = _rows(results)
    if not rows:
        return None
    groups = _groups(results, rows)
    shares = {name: _is_share(rows, name) for name in _score_names(rows)}
    heads, names = [], {}
    for group in groups:
        own = [row for row in rows if row["group"] == group]
        names[group] = _score_names(own)
        counts = {plain(number(row.get("n"))) for row in own}
        count = counts.pop() if len(counts) == 1 else "varies"
        titles = [name.replace("_", " ") for name in names[group]]
        heads.append((group, count, [*titles, "length", "EOS"]))
    lines = []
    previous = ""
    for model, decoding in dict.fromkeys((row["model"], row["decoding"]) for row in rows):
        found = {r["group"]: r for r in rows if (r["model"], r["decoding"]) == (model, decoding)}
        cells = [_cells(found.get(group, {}), names[group], shares) for group in groups]
        lines.append(("" if model == previous else model, decoding, cells))
        previous = model
    other = [
        (
            row["model"],
            row["decoding"],
            row["group"],
            plain(number(row.get("n"))),
            fixed(number(row.get("reward")), 2),
        )
        for row in rows
        if number(row.get("reward")) is not None
    ]
    unbounded = [name.replace("_", " ") for name, share in shares.items() if not share]
    return Table(heads=heads, rows=lines, unbounded=unbounded, other=other)


def headline(files: RunFiles) -> Headline:
    """The strongest statement that the files support: scores, else reward, else held-out NLL,
    else what the training curves end at."""
    rows = _rows(files.results)
    primary = (files.results or {}).get("primary")
    names = _score_names(rows)
    score = primary if primary in names else next(iter(names), None)
    found = (score and _of_scores(files, rows, score)) or _of_rewards(files, rows)
    nll = mapping(files.results, "held_out_nll")
    values = [(model, number(nll.get(model))) for model in MODELS]
    if found is None and any(value is not None for _, value in values):
        known = [(model, plain(value)) for model, value in values if value is not None]
        found = Headline(
            before="Negative log-likelihood of held-out demonstrations, in nats per response, "
            f"{_arrow([m for m, _ in known])}:",
            parts=[("", _arrow([v for _, v in known]), None)],
        )
    return found or _of_curves(files)


def _of_scores(files: RunFiles, rows: Sequence[Json], score: str) -> Headline | None:
    decoding, models = _decoding([row for row in rows if _score(row, score) is not None])
    if not models:
        return None
    share = _is_share(rows, score)
    parts, widest = [], 0.0
    for i, group in enumerate(_groups(files.results, rows)):
        own = {r["model"]: r for r in rows if (r["group"], r["decoding"]) == (group, decoding)}
        points, texts = [], []
        for model in models:
            value, n = _score(own.get(model, {}), score), number(own.get(model, {}).get("n"))
            texts.append(fixed(100 * value, 1) if share and value is not None else plain(value))
            if share and value is not None and n and n > 0:
                low, high = wilson(value, n)
                widest = max(widest, value - low, high - value)
                points.append((model, value, low, high))
        words = _arrow(texts) + (" %" if share else "")
        label = f"{score} on {group}, {_arrow(models)}: {words}"
        strip = figures.strip(f"strip-{i}", label, points) if points else None
        parts.append((group, words, strip))
    how = "sampled at " if decoding.startswith("T=") else "with decoding "
    title = score.replace("_", " ").capitalize()
    after = f"Bars are 95 % intervals; the widest reaches ±{fixed(100 * widest, 1)} points."
    return Headline(
        before=f"{title}, {how}{decoding}, {_arrow(models)}:",
        parts=parts,
        after=after if widest else "",
        shown=models if widest else [],
    )


def _of_rewards(files: RunFiles, rows: Sequence[Json]) -> Headline | None:
    rows = [row for row in rows if number(row.get("reward")) is not None]
    decoding, models = _decoding(rows)
    if not models:
        return None
    values = {
        (r["model"], r["group"]): number(r["reward"]) for r in rows if r["decoding"] == decoding
    }
    return Headline(
        before=f"Mean reward in nats per response, decoding {decoding}, {_arrow(models)}:",
        parts=[
            (group, _arrow([fixed(values.get((model, group)), 2) for model in models]), None)
            for group in _groups(files.results, rows)
        ],
    )


def _of_curves(files: RunFiles) -> Headline:
    steps, reward = series(files.ppo, "reward")
    if reward:
        kl = series(files.ppo, "kl_sft")[1]
        distance = f", at {plain(kl[-1])} nats of KL to sft" if kl else ""
        return Headline(
            before=f"Over {plain(steps[-1])} PPO steps the mean reward of a response went from",
            parts=[("", f"{plain(reward[0])} to {plain(reward[-1])} nats{distance}", None)],
        )
    steps, loss = series(files.sft, "loss")
    if loss:
        return Headline(
            before=f"Over {plain(steps[-1])} SFT steps the loss went from",
            parts=[("", f"{plain(loss[0])} to {plain(loss[-1])} nats per token", None)],
        )
    return Headline(before="This run has no result yet.")


def _cells(row: Json, names: Sequence[str], shares: dict[str, bool]) -> list[Cell]:
    cells = []
    for name in names:
        value, n = _score(row, name), number(row.get("n"))
        if value is None or not shares[name]:
            cells.append(Cell(value=plain(value)))
        else:
            cells.append(_share(value, n))
    length, eos = number(row.get("response_length")), number(row.get("eos_rate"))
    percent = Cell(value="–") if eos is None else Cell(value=fixed(100 * eos, 1))
    return [*cells, Cell(value=fixed(length, 1)), percent]


def _share(value: float, n: float | None) -> Cell:
    """A proportion in per cent; ± is the longer arm of its Wilson interval."""
    if n is None or n <= 0:
        return Cell(value=fixed(100 * value, 1))
    low, high = wilson(value, n)
    return Cell(
        value=fixed(100 * value, 1),
        pm=fixed(100 * max(value - low, high - value), 1),
        note=f"{fixed(100 * low, 1)} to {fixed(100 * high, 1)} %, n = {plain(n)}",
    )


def _rows(results: Json | None) -> list[Json]:
    rows = [row for row in sequence(results, "rows") if isinstance(row, dict)]
    keys = ("model", "decoding", "group")
    return [{**row, **{key: str(row.get(key, "–")) for key in keys}} for row in rows]


def _groups(results: Json | None, rows: Sequence[Json]) -> list[str]:
    named = [str(group) for group in sequence(results, "groups")]
    present = {row["group"] for row in rows}
    listed = [group for group in dict.fromkeys(named) if group in present]
    return listed + sorted(present - set(listed))


def _score_names(rows: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in mapping(row, "scores")))


def _score(row: Json, name: str) -> float | None:
    return number(mapping(row, "scores").get(name))


def _is_share(rows: Sequence[Json], name: str) -> bool:
    values = [_score(row, name) for row in rows]
    return all(value is None or 0 <= value <= 1 for value in values)


def _decoding(rows: Sequence[Json]) -> tuple[str, list[str]]:
    """The decoding to speak of, T=1 if it was run, and which of base, sft, policy it has."""
    decodings = list(dict.fromkeys(row["decoding"] for row in rows))
    decoding = "T=1" if "T=1" in decodings else next(iter(decodings), "")
    present = {row["model"] for row in rows if row["decoding"] == decoding}
    return decoding, [model for model in MODELS if model in present]


def _arrow(words: Sequence[str]) -> str:
    return " → ".join(words)
