"""The tokenizer and the pretraining text it has to agree with."""

from collections import Counter
from random import Random

import pytest

from srppo.miniature import corpus, world
from srppo.miniature.tokenizer import build_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def render(tokenizer, prompt: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )


def test_vocabulary_has_no_duplicates():
    assert len(set(vocabulary())) == len(vocabulary())


def test_special_tokens_are_special(tokenizer):
    tokens = vocabulary()
    assert tokenizer.bos_token_id == tokens.index("<bos>")
    assert tokenizer.eos_token_id == tokens.index("<eos>")
    assert tokenizer.pad_token_id == tokens.index("<pad>")
    assert tokenizer.decode(range(len(tokens)), skip_special_tokens=True).startswith("\n a b c")


def test_every_prompt_and_response_round_trips(tokenizer):
    rows = [*world.demonstrations(0), *world.evaluation(0, "validation")]
    texts = [row[column] for row in rows for column in ("prompt", "response")]
    texts += [row["prompt"] for row in world.prompts(0)]
    for text in texts:
        ids = encode(tokenizer, text)
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_all_ids_round_trip_through_text(tokenizer):
    ids = list(range(len(vocabulary())))
    assert encode(tokenizer, tokenizer.decode(ids)) == ids


def test_the_newline_is_a_token_with_or_without_spaces(tokenizer):
    newline = vocabulary().index("\n")
    assert encode(tokenizer, "a\nb") == encode(tokenizer, "a \n b")
    assert encode(tokenizer, "a\nb")[1] == newline
    assert tokenizer.decode(encode(tokenizer, "a \n b")) == "a \n b"


def test_a_rendered_prompt_is_the_beginning_of_a_pretraining_document(tokenizer):
    """Exactly its ids: one BOS, the question, the newline."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    rng = Random(1)
    for _ in range(300):
        document = corpus.document(rng)
        question = document[: document.index("\n") + 1]
        rendered = render(tokenizer, " ".join(question[1:-1]))
        assert encode(tokenizer, rendered) == [ids[token] for token in question]


def test_prompt_and_response_can_be_joined_as_text(tokenizer):
    prompt, response = render(tokenizer, "reverse : a b c"), "answer : [ c b a ]"
    assert encode(tokenizer, prompt + response) == encode(tokenizer, prompt) + encode(
        tokenizer, response
    )


def test_a_whole_conversation_is_a_whole_document(tokenizer):
    conversation = [
        {"role": "user", "content": "sort : b a c"},
        {"role": "assistant", "content": "answer : [ a b c ]"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    expected = "<bos> sort : b a c \n answer : [ a b c ] <eos>"
    assert tokenizer.decode(encode(tokenizer, text)) == expected


def test_documents_ask_only_train_prompts_in_known_words():
    rng = Random(0)
    known = set(vocabulary())
    for _ in range(3000):
        document = corpus.document(rng)
        assert set(document) <= known
        assert len(document) <= corpus.WINDOW
        question = " ".join(document[1 : document.index("\n")])
        assert world.split_of(question) == "train"


def test_the_target_format_is_as_rare_as_the_weights_say():
    """In documents that end with it: 6% for in-domain prompts, 1% elsewhere."""
    rng = Random(0)
    seen: Counter[tuple[bool, bool]] = Counter()
    for _ in range(20000):
        document = corpus.document(rng)
        response = document[document.index("\n") + 1 :]
        target = response[:3] == ["answer", ":", "["] and response[-2:] == ["]", "<eos>"]
        seen[document[2] == ":", target] += 1
    in_domain = seen[True, True] / (seen[True, True] + seen[True, False])
    elsewhere = seen[False, True] / (seen[False, True] + seen[False, False])
    assert in_domain == pytest.approx(0.06, abs=0.01)
    assert elsewhere == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize("group", world.GROUPS)
def test_weights_are_probabilities(group):
    assert len(corpus.WEIGHTS[group]) == len(corpus.MANNERS)
    assert sum(corpus.WEIGHTS[group]) == pytest.approx(1.0)
