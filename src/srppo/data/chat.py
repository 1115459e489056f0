"""From a conversation to token ids: the same ids in stage 1, in the reward and in the rollouts.

What is guaranteed about control tokens (BOS, EOS, `<|im_end|>`: the tokenizer's special tokens):
they come from the template and from `encode`'s closing EOS alone. Their strings in the text of a
turn are encoded as ordinary text; where the tokenizer can spell one with control tokens only, the
row is refused. Not guaranteed:

- Role markers that are ordinary text to the tokenizer, such as `<|user|>` of the default template,
  cannot be told from the same words in a turn.
- A turn that holds such a string is encoded in pieces, cut at the template's control tokens. A
  tokenizer that puts a space before any text may put one at each cut.
- A normalizer that turns other text of a *prompt* into a control token is not found out.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from srppo.data.schemas import Message, RowError
from srppo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""TULU's format: a marker line with the role, then the content; EOS closes each assistant turn."""


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Ends with EOS, its only one; a truncated response has none, for the model did not end."""
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The row's other scalar columns: group, answer, ..."""
    final: bool = True
    """The last demonstration of its conversation; those before it come first in the list."""
    user: str = ""
    """What users say in the prompt: what overlap is measured on."""


def apply_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer without chat template the default one, so that checkpoints carry it.

    Where the tokenizer itself begins plain text with BOS, the template begins with BOS too.
    """
    if tokenizer.chat_template is not None:
        return
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + DEFAULT_TEMPLATE


def set_date(tokenizer: "PreTrainedTokenizerBase", date: datetime) -> None:
    """What `strftime_now` of its template says: a run that goes on another day has the prompts that
    it began with."""
    _dates[tokenizer] = date


_dates: WeakKeyDictionary[Any, datetime] = WeakKeyDictionary()
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def _dated(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Its template with `set_date`'s date written in; None: as it is. (transformers hands no
    function of ours to a template.)"""
    template, date = tokenizer.chat_template, _dates.get(tokenizer)
    if date is None or not isinstance(template, str):
        return None
    return _NOW.sub(lambda found: repr(date.strftime(found[2])), template)


def is_default_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's template is the one that `apply_template` gives."""
    return str(tokenizer.chat_template).endswith(DEFAULT_TEMPLATE)


def closing(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A note where the template closes assistant turns otherwise than a response ends; or "".

    Such a model reads one end in earlier turns and learns another: mostly a base model with the
    template of its chat sibling.
    """
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program, and can fail in any way
        return ""  # each row is refused with its reason
    end = text.rpartition("answer")[2]
    if end.strip().startswith(str(tokenizer.eos_token)):
        return ""
    return (
        f"the chat template closes an assistant turn with {end!r}, and responses end with the "
        f"tokenizer's EOS {tokenizer.eos_token!r}. If the model should end its turns as the "
        "template does, set tokenizer.eos_token to that token."
    )


def prompt_text(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    """The prompt as the model reads it: the template filled in, up to where the response starts.

    Raises:
        ModelError: the tokenizer has no chat template.
        RowError: the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, so a conversation "
            "cannot become text. Call apply_template(tokenizer) first."
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=_dated(tokenizer),
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception as error:  # a template is a program, and can fail in any way
        raise RowError(f"refused by the chat template ({error})") from error


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[int]:
    """Ids of `prompt_text`; nothing is added to what the template says, so BOS never doubles.

    Raises: as `prompt_text`; RowError where text can only be spelt with control tokens.
    """
    return _encode(tokenizer, messages, "")


def encode(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], response: str) -> Example:
    """Ids of a prompt and its response, closed by one EOS (`tokenizer.eos_token_id`).

    Prompt and response are encoded in one pass. Where a merge over their boundary would change the
    prompt, the response is encoded by itself: `prompt_ids` stay what rollouts start from.

    Raises:
        ModelError: the tokenizer has no EOS token, or no chat template.
        RowError: the template refuses the conversation, or text needs control tokens.
    """
    require_eos(tokenizer)
    prompt = prompt_ids(tokenizer, messages)
    both = _encode(tokenizer, messages, response)
    one_pass = both[: len(prompt)] == prompt
    ids = both[len(prompt) :] if one_pass else _encode_alone(tokenizer, response)
    _require_no_control(tokenizer, ids)
    return Example(prompt, [*ids, tokenizer.eos_token_id])


def require_eos(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ModelError where the tokenizer has no EOS token."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so a response could never "
            "end and the reward would have no last token. Set tokenizer.eos_token to a token of "
            "its vocabulary and save it with the model."
        )


def _encode(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], response: str
) -> list[int]:
    """Ids of the filled-in template and the response after it, text kept free of control tokens.

    Control strings within the text are swapped for characters that occur nowhere, the template is
    filled in, and what lies between the control tokens of the template is encoded as plain text.
    """
    control = _control(tokenizer)
    texts = [*(message["content"] for message in messages), response]
    found = sorted({string for text in texts for string in control.pattern.findall(text)})
    if not found:
        return _ids(tokenizer, prompt_text(tokenizer, messages) + response)

    stand_ins = dict(zip(found, _unused_characters("".join(texts), len(found)), strict=True))

    def hide(text: str) -> str:
        return control.pattern.sub(lambda match: stand_ins[match[0]], text)

    hidden = [message | {"content": hide(message["content"])} for message in messages]
    ids: list[int] = []
    for piece in control.pattern.split(prompt_text(tokenizer, hidden) + hide(response)):
        if piece in control.ids:
            ids.append(control.ids[piece])
            continue
        for string, stand_in in stand_ins.items():
            piece = piece.replace(stand_in, string)
        plain = _ids(tokenizer, piece, split_special_tokens=True) if piece else []
        _require_no_control(tokenizer, plain)
        ids += plain
    return ids


def _encode_alone(tokenizer: "PreTrainedTokenizerBase", response: str) -> list[int]:
    """Ids of a response by itself, without the space that some tokenizers put before any text.

    An anchor takes that space; it is dropped again where it stayed a token of its own.
    """
    for anchor in ("\n", "a"):
        head = _ids(tokenizer, anchor, split_special_tokens=True)
        ids = _ids(tokenizer, anchor + response, split_special_tokens=True)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return _ids(tokenizer, response, split_special_tokens=True)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


@dataclass(frozen=True)
class _Control:
    """A tokenizer's special tokens."""

    ids: dict[str, int]
    """Id of each, by its string."""
    pattern: re.Pattern[str]
    """Finds any of them, the longest first, as one group."""
    forbidden: frozenset[int]
    """What plain text must not become: all but unk; unk, too, where it is EOS."""


_controls: WeakKeyDictionary[Any, tuple[Any, _Control]] = WeakKeyDictionary()


def _control(tokenizer: "PreTrainedTokenizerBase") -> _Control:
    """Worked out once for each tokenizer and set of special tokens: some have hundreds."""
    state = (len(tokenizer), tuple(tokenizer.all_special_ids))
    known = _controls.get(tokenizer)
    if known is None or known[0] != state:
        known = _controls[tokenizer] = (state, _find_control(tokenizer))
    return known[1]


def _find_control(tokenizer: "PreTrainedTokenizerBase") -> _Control:
    ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    strings = "|".join(re.escape(string) for string in sorted(ids, key=len, reverse=True))
    allowed = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    forbidden = frozenset(ids.values()) - allowed
    return _Control(ids, re.compile(f"({strings or '(?!)'})"), forbidden)


def _require_no_control(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> None:
    """RowError where plain text became a control token."""
    if not _control(tokenizer).forbidden.isdisjoint(ids):
        raise RowError("text that the tokenizer can only spell with control tokens")


def _unused_characters(text: str, count: int) -> list[str]:
    """`count` private-use characters that do not occur in `text`."""
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    return [next(free) for _ in range(count)]
