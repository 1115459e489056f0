"""Settings checked once: every problem with key, value, consequence and cure."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from srppo.errors import ConfigError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrAuto = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(lambda value: "word" if value == "auto" else "number"),
]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    """Frozen, strictly typed, unknown keys rejected."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


def validate(kind: type[Section], tree: Any, prefix: tuple[str, ...] = ()) -> Any:
    """`tree` as a `kind`; `prefix` is where it stands in the recipe.

    Raises:
        ConfigError: every problem found, one per line.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        lines = [_explain(kind, error, prefix) for error in e.errors()]
        raise ConfigError("\n".join(lines)) from e


def _explain(kind: type[Section], error: Any, prefix: tuple[str, ...]) -> str:
    """One pydantic error as: key, value, consequence, cure."""
    place = [part for part in error["loc"] if part != "number"]  # not a key: a Tag of the above
    key = ".".join(str(part) for part in (*prefix, *place)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
        return f"{key}: no such setting; it would have no effect. {hint}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default. Add it to the recipe."
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return text if key == "recipe" or key in text else f"{key}: {text}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}={error['input']!r}: a group of settings, not a value. Set {key}.something."
    said = error["msg"][:1].lower() + error["msg"][1:]
    said += " or 'auto'" * (error["loc"][-1] == "number")
    return (
        f"{key}={error['input']!r}: {said}, so that nothing can be run with it. Change it in the "
        "recipe, or on the command line."
    )


def _known_keys(kind: type[Section], path: tuple[Any, ...]) -> list[str]:
    """Settings of the section at `path`; a part that is no setting is a name, as of a control, or
    a place in a list."""
    for part in path:
        if str(part) in kind.model_fields:
            kind = _section_in(kind.model_fields[str(part)].annotation) or kind
    return list(kind.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section in `Section`, `list[Section]` or `dict[str, Section] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def in_one_line(error: Exception) -> str:
    """What YAML says, and whether it means a tab: that is not to be seen."""
    text = ", ".join(line.strip() for line in str(error).splitlines()).rstrip(".")
    mark = getattr(error, "problem_mark", None)
    if mark is None or not Path(mark.name).is_file():  # an override
        return text
    content = Path(mark.name).read_text(encoding="utf-8")
    is_tab = content[mark.index : mark.index + 1] == "\t"  # at its end there is nothing
    return f"{text}: a tab, and YAML is indented with blanks" if is_tab else text
