"""Judges say which of two outputs is better; they are asked in alpaca-eval's own words.

Only a judge can call a draw: an answer that cannot be read is asked for again, and then the pair
is without a verdict.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, Protocol

from srppo.data.schemas import Message
from srppo.eval.references import REFERENCE_JUDGE, require_alpaca_eval, sha256_of

LETTER = "alpaca_eval_letter"
"""Ours, for a judge without log-probabilities: the reference's question, and m or M as answer."""
RANKING = "gpt-3.5-turbo-1106_ranking"
"""alpaca-eval's evaluator for a judge that does neither: it writes down which one is first."""
FORMS = (REFERENCE_JUDGE, LETTER, RANKING)
"""In the order in which they are tried."""
STUMBLES = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError)
"""What reading an answer raises where something else was sent. A SyntaxError is alpaca-eval's."""


@dataclass(frozen=True)
class Verdict:
    """What came of a question."""

    preference: float | None
    """1: the output shown first is better, 2: the other; between them a probability."""
    asked: int
    """How often the question was put."""
    answer: dict[str, Any] | None = None
    """The choice of the chat API that the preference was read from."""
    reason: str | None = None
    """Why there is no preference."""


@dataclass(frozen=True)
class Form:
    """How a judge is asked and its answer read, by alpaca-eval's templates and parsers."""

    name: str
    template: list[Message]
    options: dict[str, Any]
    """Of a request: max_tokens, temperature, logprobs, top_logprobs."""
    parser: Callable[[Any], list[float]]
    reads_logprobs: bool

    @staticmethod
    @cache
    def of(name: str) -> Form:
        """One of FORMS, as it comes with alpaca-eval. Raises ConfigError without the package."""
        require_alpaca_eval()
        from alpaca_eval import completion_parsers, constants, utils

        if name == LETTER:
            letters = {1: r"^\W*m\W*$", 2: r"^\W*M\W*$"}
            return replace(
                Form.of(REFERENCE_JUDGE),
                name=LETTER,
                options={"max_tokens": 5, "temperature": 0},
                parser=partial(completion_parsers.regex_parser, outputs_to_match=letters),
                reads_logprobs=False,
            )
        folder = constants.EVALUATORS_CONFIG_DIR
        config = utils.load_configs(name, relative_to=folder)[name]
        template = (folder / config["prompt_template"]).read_text(encoding="utf-8")
        parser = getattr(completion_parsers, config["fn_completion_parser"])
        return Form(
            name=name,
            template=utils.prompt_to_chatml(template),
            options={k: v for k, v in config["completions_kwargs"].items() if k != "model_name"},
            parser=partial(parser, **config.get("completion_parser_kwargs", {})),
            reads_logprobs=config.get("completion_key") == "completions_all",
        )

    @cached_property
    def sha256(self) -> str:
        """Of the template."""
        return sha256_of(json.dumps(self.template))

    def question(self, instruction: str, first: str, second: str) -> list[Message]:
        """The template filled in. Marks of the template or of a chat within the texts are text."""
        texts = {"instruction": instruction, "output_1": first, "output_2": second}
        marks = re.compile("{(" + "|".join(texts) + ")}")
        return [
            message | {"content": marks.sub(lambda mark: texts[mark[1]], message["content"])}
            for message in self.template
        ]

    def read(self, choice: dict[str, Any]) -> float:
        """The preference in an answer. Raises one of STUMBLES where there is none."""
        from alpaca_eval.utils import DisableLogger

        with DisableLogger():  # the parsers log what they cannot read
            found = self.parser(choice if self.reads_logprobs else choice["message"]["content"])
        (preference,) = map(float, found)
        if not 1 <= preference <= 2:  # NaN, too
            raise ValueError(f"preference {preference}")
        return preference


Note = Callable[[int, Verdict], None]
"""Takes the number of a question and its verdict, as soon as there is one."""


class Judge(Protocol):
    """Somebody to ask."""

    @property
    def record(self) -> dict[str, Any]:
        """Who it is, for files: what its verdicts depend on, and no secrets."""
        ...

    def label(self, form: Form) -> str:
        """Its name in results."""
        ...

    def problems(self) -> list[str]:
        """Why it cannot be asked, each with its cure."""
        ...

    def form(self) -> Form:
        """How it can be asked. Raises JudgeError where it cannot."""
        ...

    def ask(self, form: Form, questions: Sequence[list[Message]], note: Note) -> Counter[str]:
        """Notes a verdict on each question, in any order. What went over the wire, counted.

        Raises:
            JudgeError: it cannot be asked any more.
        """
        ...
