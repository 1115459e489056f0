from collections.abc import Callable
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from srppo.data.chat import (
    apply_template,
    closing,
    encode,
    prompt_ids,
    prompt_text,
    set_date,
)
from srppo.data.schemas import RowError
from srppo.errors import ModelError

Make = Callable[[str], PreTrainedTokenizerFast]

SPECIALS = ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<unk>", "<|assistant|>", "<<s>/s>"]
PIECES = st.sampled_from(
    [*SPECIALS, "hello", " ", "\n", "12", "Answer:", "é", "日本", "🙂", "\U000f0000"]
)
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: text.strip() and "▁" not in text)  # ▁ is SentencePiece's space
TURNS = st.lists(TEXTS, min_size=1, max_size=3).map(
    lambda texts: [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(texts[: len(texts) - 1 + len(texts) % 2])
    ]
)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@settings(max_examples=60)
@given(TURNS, TEXTS)
def test_ids_are_those_of_rollouts_and_spell_the_text(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], response: str
):
    example = encode(tokenizer, messages, response)
    assert example.prompt_ids == prompt_ids(tokenizer, messages)
    assert example.response_ids[-1] == tokenizer.eos_token_id
    assert example.response_ids.count(tokenizer.eos_token_id) == 1
    options = {"clean_up_tokenization_spaces": False}
    prompt = tokenizer.decode(example.prompt_ids, **options)
    answer = tokenizer.decode(example.response_ids[:-1], **options)
    for message in messages:
        assert message["content"] in prompt
    assert response in (answer, " " + answer)  # a leading space may be the decoder's to strip


@settings(max_examples=40)
@given(TEXTS)
def test_control_tokens_come_from_the_template_alone(tokenizer: PreTrainedTokenizerFast, text: str):
    """As many control tokens as with a harmless text: nothing in a turn becomes one."""

    def controls(content: str) -> list[int]:
        ids = encode(tokenizer, user(content), content)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        return [i for i in ids.prompt_ids + ids.response_ids if i in special]

    assert controls(text) == controls("hello")


def test_ids_equal_transformers_own_where_no_text_looks_like_a_control_token(
    tokenizer: PreTrainedTokenizerFast,
):
    messages = [*user("What is 12?"), {"role": "assistant", "content": "A."}, *user("And 3?")]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, messages) == own


@pytest.mark.parametrize("name", ["byte_level", "chatml"])
def test_bos_stands_once(make_tokenizer: Make, name: str):
    tokenizer = make_tokenizer(name)
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id  # adds it by itself
    apply_template(tokenizer)
    ids = prompt_ids(tokenizer, user("hello </s>"))
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_default_template(make_tokenizer: Make):
    tokenizer = make_tokenizer("sentencepiece")
    apply_template(tokenizer)
    messages = [
        {"role": "system", "content": "s"},
        *user("u"),
        {"role": "assistant", "content": "a"},
    ]
    text = prompt_text(tokenizer, messages + user("v"))
    assert text == "<|system|>\ns\n<|user|>\nu\n<|assistant|>\na</s>\n<|user|>\nv\n<|assistant|>\n"
    assert tokenizer.eos_token_id in prompt_ids(tokenizer, messages + user("v"))


def test_the_date_that_a_template_writes_can_be_set(make_tokenizer: Make):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    assert prompt_text(tokenizer, user("q")).startswith(datetime.now().strftime("%Y-%m-%d"))
    set_date(tokenizer, datetime(1999, 12, 31))
    assert prompt_text(tokenizer, user("q")).startswith("1999-12-31")


def test_template_of_the_tokenizer_is_kept(make_tokenizer: Make):
    tokenizer = make_tokenizer("chatml")
    before = tokenizer.chat_template
    apply_template(tokenizer)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize(
    ("template", "response"),
    [
        ("{{ messages[0]['content'] }} Answer: ", "12"),
        ("{{ messages[0]['content'] + '\n' }}", "\nhow"),
    ],
)
def test_merge_over_the_boundary_leaves_the_prompt_alone(
    make_tokenizer: Make, template: str, response: str
):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    prompt = prompt_ids(tokenizer, user("hello"))
    whole = prompt_text(tokenizer, user("hello")) + response
    one_pass = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert one_pass[: len(prompt)] != prompt, (
        "the tokenizer must merge here, else nothing is tested"
    )
    example = encode(tokenizer, user("hello"), response)
    assert example.prompt_ids == prompt
    assert tokenizer.decode(prompt + example.response_ids[:-1]) == whole


def test_response_encoded_by_itself_gets_no_leading_space(make_tokenizer: Make):
    """`</s>` in the response cuts the text in pieces, whose spaces would change the prompt."""
    tokenizer = make_tokenizer("sentencepiece")
    tokenizer.chat_template = "{{ bos_token + messages[0]['content'] + ':' }}"
    example = encode(tokenizer, user("hello"), "yes </s>")
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["<s>", *"hello:"]
    tokens = tokenizer.convert_ids_to_tokens(example.response_ids)
    assert tokens == [*"yes", "▁", *"</s>", "</s>"]


def test_text_that_only_control_tokens_can_spell_is_refused(make_tokenizer: Make):
    tokenizer = make_tokenizer("words")
    apply_template(tokenizer)
    assert encode(tokenizer, user("say unknown"), "hello").response_ids == [3, 1]
    with pytest.raises(RowError, match="control tokens"):
        encode(tokenizer, user("say"), "hello </s>")
    with pytest.raises(RowError, match="control tokens"):
        prompt_ids(tokenizer, user("say </s>"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RowError, match="control tokens"):
        encode(tokenizer, user("say"), "hello </S>")


def test_template_refusal_is_a_reason(make_tokenizer: Make, strict_template: str):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = strict_template
    with pytest.raises(RowError, match=r"refused by the chat template \(roles must alternate\)"):
        prompt_ids(tokenizer, user("a") + user("b"))


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ 'a'.index('b') }}"]
)
def test_templates_that_fail_are_a_reason(make_tokenizer: Make, template: str):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(RowError, match=r"refused by the chat template \(."):
        prompt_ids(tokenizer, user("a"))
    assert closing(tokenizer) == ""


def test_missing_eos_and_template_name_the_cure(make_tokenizer: Make):
    tokenizer = make_tokenizer("byte_level")
    with pytest.raises(ModelError, match="Call apply_template"):
        prompt_ids(tokenizer, user("a"))
    apply_template(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"Set tokenizer\.eos_token"):
        encode(tokenizer, user("a"), "b")
