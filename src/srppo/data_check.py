"""`srppo data check`: data as a run would use it, looked at before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.config import load_recipe, parse_data
from srppo.config_data import DataConfig, SourceConfig
from srppo.data.chat import apply_template, closing
from srppo.data.demonstrations import read_demonstrations
from srppo.data.describe import CLOSE, OPEN, describe, describe_all
from srppo.data.load import read_data
from srppo.data.prompts import read_prompts
from srppo.data.reporting import Report, sorted_places
from srppo.data.sources import open_source
from srppo.errors import ConfigError, RunDirError
from srppo.models.load import has_tokenizer, load_tokenizer
from srppo.models.start import check_context
from srppo.progress import VISIBLE, stdout


def check(
    source: str,
    settings: dict[str, Any],
    column_map: Sequence[str] = (),
    overrides: list[str] | None = None,
    **options: Any,
) -> None:
    """`check_source`, or `check_recipe` for a YAML file.

    Args:
        settings: those of the recipe's `data` section that matter.
        column_map: `KNOWN=OWN` for each column that is not recognised.
        overrides: `key.sub=value`, settings on top of a recipe.
        options: further ones of `check_source`.
    """
    if source.endswith((".yaml", ".yml")):
        given = {name: value for name, value in options.items() if value}
        if column_map:
            given["column-map"] = column_map
        for name in given:
            raise ConfigError(
                f"--{name} with the recipe {source!r}: the recipe decides, so it would have no "
                "effect. Set it in the recipe, or give the source itself."
            )
        check_recipe(source, overrides)
        return
    if overrides:
        raise ConfigError(
            f"{overrides[0]!r} with {source!r}: settings go on top of a recipe, so this would have "
            "no effect. Give the recipe in the place of the source, or an option of this command."
        )
    columns = dict(_column(pair) for pair in column_map)
    check_source(source, settings=parse_data(settings | {"columns": columns}), **options)


def check_recipe(path: str, overrides: list[str] | None = None) -> None:
    """All that a recipe's run would read, as the run says it, the overlap included.

    Raises:
        ConfigError: the recipe cannot be read, or asks for more than the model has positions for.
        DataError: a source cannot be read, or nothing would be trained.
    """
    recipe = load_recipe(path, overrides)
    check_context(recipe.model, recipe.data)
    sft = recipe.model.sft
    tokenizer = load_tokenizer(sft if sft and has_tokenizer(sft) else recipe.model.base)
    apply_template(tokenizer)
    _say(describe_all(read_data(recipe, tokenizer).reports))


def check_source(
    source: str,
    *,
    model: str | None = None,
    prompts: bool = False,
    settings: DataConfig | None = None,
    limit: int | None = None,
    dropped: Path | None = None,
) -> Report:
    """What a run would use of `source`, as demonstrations or as `prompts`, and what not.

    Args:
        model: whose tokenizer and template count; None: lengths are in UTF-8 bytes, under the
            default template, and nothing is too long.
        settings: split, columns, turns and longest lengths.
        limit: stop after so many usable rows.
        dropped: a file for the place and reason of every row that is left out.

    Raises:
        DataError: the source cannot be read, or nothing would be trained.
    """
    settings = settings or DataConfig()
    tokenizer = load_tokenizer(model) if model else _bytes()
    given = SourceConfig(source=source)
    found = open_source([given], seed=0, split=settings.split, columns=settings.columns)
    limits: dict[str, Any] = {
        "max_prompt_tokens": settings.max_prompt_tokens if model else 2**31,
        "limit": limit,
        "seed": 0,
    }
    if prompts:
        _, report = read_prompts(found, tokenizer, **limits)
    else:
        limits["max_response_tokens"] = settings.max_response_tokens if model else 2**31
        _, report = read_demonstrations(found, tokenizer, turns=settings.assistant_turns, **limits)
    _say(describe(report.to_json(), "tokens" if model else "bytes"))
    if model and (note := closing(tokenizer)):
        _say(f"note: {note}")
    if dropped:
        _write(dropped, report)
    report.require_used("prompts" if prompts else "demonstrations", found)
    return report


def _column(pair: str) -> tuple[str, str]:
    known, _, own = pair.partition("=")
    if not known or not own:
        raise ConfigError(
            f"--column-map {pair!r} is not of the form KNOWN=OWN: no column can be mapped. "
            "Write, for example, --column-map prompt=Question --column-map response=Answer."
        )
    return known, own


def _say(text: str) -> None:
    """On stdout, control characters made visible; in a terminal, what is trained on in green."""
    styled = Text(text.translate(VISIBLE))
    styled.highlight_regex(rf"(?s){OPEN}.*?{CLOSE}", "green")
    stdout().print(styled, soft_wrap=True)


def _write(path: Path, report: Report) -> None:
    """One line a row: place, tab, reason."""
    reasons = {where: reason for reason, w in report.dropped_rows.items() for where in w}
    lines = (f"{where}\t{reasons[where]}\n" for where in sorted_places(reasons))
    try:
        path.write_text("".join(lines))
    except OSError as error:
        raise RunDirError(
            f"{path} cannot be written ({error}): the dropped rows are not listed. Give --dropped "
            "a path that you may write to."
        ) from error


def _bytes() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the bytes of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")
