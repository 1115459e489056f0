"""Whatever would fail after an hour, found before a model is loaded; everything at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from huggingface_hub import constants

from srppo.errors import ConfigError, DataError, SrppoError
from srppo.eval.benchmarks import BENCHMARKS, TASKS, Benchmark, load_questions
from srppo.eval.results import require_free
from srppo.eval.subjects import Subject, names_of

if TYPE_CHECKING:
    from srppo.eval.ask import Reader
    from srppo.eval.judge import Judge
    from srppo.eval.references import References
    from srppo.eval.tasks import Task

T = TypeVar("T")

PACKAGES = {"ifeval": ("lm_eval", "langdetect", "immutabledict", "nltk")}
"""What a task imports; others lm_eval alone."""
PUNKT = "tokenizers/punkt_tab/english/"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    tasks: tuple[str, ...]
    limit: int | None = None
    """Questions of each task, the first so many; None: all."""
    max_tokens: int | None = None
    """Of a response; None: as the task says."""
    seed: int = 0
    """Orders GPQA's choices, decides what IFEval's scorer draws, and bootstraps."""
    data_dir: Path | None = None
    """Where questions lie; what is not there comes from the hub or its cache."""
    chat_template: str = "auto"
    batch_tokens: int = 16384
    """Tokens, padding included, per forward pass; memory and speed only."""
    dtype: str = "float32"
    device: str = "auto"
    shard: bool = False
    """Of several processes each holds a share of every model's layers..."""
    shard_sampling: bool = False
    """...while they decode, too."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(
                    f"task {task!r} is not known: nothing would be measured. Tasks: "
                    f"{', '.join(TASKS)}."
                )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"--tasks {','.join(self.tasks)}: name each task once.")

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        kept = {**asdict(self), "data_dir": self.data_dir and str(self.data_dir)}
        return {k: v for k, v in kept.items() if not k.startswith("shard")}  # decide no number


@dataclass(frozen=True)
class Check:
    """Something that was looked at."""

    what: str
    state: Literal["ok", "note", "problem"]
    says: str
    """What was found; of a problem also consequence and cure."""


@dataclass
class Plan:
    """What the checks have made ready."""

    checks: list[Check] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    references: References | None = None
    """AlpacaEval's, as many as are asked."""
    subjects: list[Subject] = field(default_factory=list)

    @property
    def problems(self) -> list[Check]:
        """What stands in the way."""
        return [check for check in self.checks if check.state == "problem"]

    def require(self) -> None:
        """Raises ConfigError with every problem and its cure."""
        if found := self.problems:
            lines = [f"  {i}. {check.says}" for i, check in enumerate(found, start=1)]
            raise ConfigError(
                f"{len(found)} problem(s), found before anything was loaded:\n" + "\n".join(lines)
            )

    def requests(self, task: str, reader: Reader, max_tokens: int | None) -> list[Any]:
        """What a model is asked: lm-eval's instances, one after the other."""
        from srppo.eval.ask import alpaca_requests

        if task in self.tasks:
            return self.tasks[task].requests(reader.conversation if reader.chat else None)
        assert self.references  # or the checks found a problem
        return alpaca_requests(self.references.outputs[: len(self.references)], reader, max_tokens)

    def tried(self, what: str, make: Callable[[], T], says: Callable[[T], str]) -> T | None:
        """What `make` gives, noted as in order; or None, and its error as a problem."""
        try:
            made = make()
        except SrppoError as e:
            self.checks.append(Check(what, "problem", str(e)))
            return None
        self.checks.append(Check(what, "ok", says(made)))
        return made


def prepare(
    models: Sequence[str],
    settings: Settings,
    *,
    judge: Judge | None = None,
    out: Path | None = None,
    go_on: bool = False,
) -> Plan:
    """Every check, and what it made ready; `out` where results are to be written."""
    plan = Plan()
    for task in settings.tasks:
        if task in BENCHMARKS:
            _prepare_task(plan, BENCHMARKS[task], settings)
        else:
            _prepare_alpaca(plan, settings, judge)
    named = plan.tried("models", lambda: names_of(models), lambda n: f"{len(n)} to evaluate")
    for name, source in named or []:
        find: Callable[[], Sequence[Subject]] = partial(
            Subject.find, name, source, settings.chat_template
        )
        subjects = plan.tried(f"model {name}", find, _describe)
        plan.subjects += subjects or []
    for subject in plan.subjects:
        _check_prompts(plan, subject, settings)
        if out is not None:
            path = out / subject.name
            free = partial(require_free, path, subject.identity, settings.record(), go_on=go_on)
            plan.tried(f"{subject.name}: output", free, lambda _, path=path: str(path))  # type: ignore[misc]
    return plan


def prepare_stored(task: str, settings: Settings) -> Plan:
    """The checks for a task whose responses are there already: no example goes into a prompt."""
    plan = Plan()
    _prepare_task(plan, BENCHMARKS[task], settings, shots=False)
    return plan


def require_packages(task: str) -> list[str]:
    """Raises ConfigError where one of the task's is not installed."""
    wanted = PACKAGES.get(task, ("lm_eval",))
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} is not installed: {task} cannot be scored. "
            "Run: pip install 'srppo[eval]'"
        )
    return list(wanted)


def require_punkt(data_dir: Path | None) -> Path:
    """nltk's tokenizer, which IFEval counts sentences with: in nltk's places, in
    `data_dir`/nltk_data, or downloaded if online.

    Raises:
        DataError: none of these.
    """
    import nltk

    own = data_dir / "nltk_data" if data_dir else None
    if own and own.is_dir() and str(own.absolute()) not in nltk.data.path:
        nltk.data.path.insert(0, str(own.absolute()))
    try:
        return Path(str(nltk.data.find(PUNKT)))
    except LookupError as e:
        if constants.HF_HUB_OFFLINE or not nltk.download("punkt_tab", quiet=True):
            raise DataError(
                "nltk's punkt_tab is not there: IFEval could not count sentences, after all "
                "responses are made. Run `python -m nltk.downloader punkt_tab` where there is a "
                "network; else copy tokenizers/punkt_tab into DIR/nltk_data and give --data-dir "
                "DIR, or set NLTK_DATA to that nltk_data."
            ) from e
    return Path(str(nltk.data.find(PUNKT)))


def _prepare_task(plan: Plan, benchmark: Benchmark, settings: Settings, shots: bool = True) -> None:
    name, seed = benchmark.name, settings.seed
    packages = plan.tried(f"{name}: packages", lambda: require_packages(name), ", ".join)
    punkt: Path | None = None
    if name == "ifeval" and packages:
        punkt = plan.tried(f"{name}: nltk data", lambda: require_punkt(settings.data_dir), str)
    if not packages:
        return
    questions = plan.tried(
        f"{name}: questions",
        lambda: load_questions(benchmark, settings.data_dir, seed, shots),
        lambda q: f"{len(q.docs)} of {q.source}" + (f", {len(q.shots)} examples" * bool(q.shots)),
    )
    if questions is None or (name == "ifeval" and punkt is None):
        return
    from srppo.eval.tasks import Task  # imports lm-eval, which for IFEval asks for punkt_tab

    try:
        plan.tasks[name] = Task(
            benchmark,
            questions.first(settings.limit),
            seed=seed,
            shots=shots,
            max_tokens=settings.max_tokens,
        )
    except SrppoError as e:
        plan.checks.append(Check(f"{name}: questions", "problem", str(e)))


def _prepare_alpaca(plan: Plan, settings: Settings, judge: Judge | None) -> None:
    from srppo.eval.annotate import problems
    from srppo.eval.references import gamed_file, load_references

    offline = constants.HF_HUB_OFFLINE
    found = problems(settings.data_dir, offline, judge)
    if judge is None:
        found.append(
            "alpaca_eval without a judge: nobody would compare the responses. Give --judge-url and "
            "--judge-model, or --judge DIR, or --tasks without it."
        )
    plan.checks += [Check("alpaca_eval", "problem", text) for text in found]
    if not found:
        references = load_references(settings.data_dir, offline)
        plan.checks.append(
            Check("alpaca_eval", "ok", f"{len(references)} instructions; the judge answers")
        )
        plan.references = references.first(settings.limit)
        try:
            gamed_file(settings.data_dir, offline)
        except DataError as e:
            text = f"no length-controlled win rate: {e}"
            plan.checks.append(Check("alpaca_eval: length control", "note", text))


def _describe(subjects: Sequence[Subject]) -> str:
    context = subjects[0].context
    ways = " and ".join(subject.template for subject in subjects)
    return f"{ways} prompts, {context or 'an unknown number of'} positions"


def _check_prompts(plan: Plan, subject: Subject, settings: Settings) -> None:
    """Notes where a model's context shortens prompts or responses."""
    for name in settings.tasks:
        if name not in plan.tasks and not (name == "alpaca_eval" and plan.references):
            continue
        from srppo.eval.ask import Reader, shortened  # imports lm-eval

        reader = Reader(subject.tokenizer, subject.chat)
        requests = plan.requests(name, reader, settings.max_tokens)
        short = shortened(requests, reader, subject.context)
        check = Check(f"{subject.name}: {name}", "note" if short else "ok", short or "prompts fit")
        plan.checks.append(check)
