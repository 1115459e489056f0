"""The miniature's tokenizer: one token for each word or character between spaces.

The newline is a token of its own and needs no spaces around it, so that a prompt, which ends with
one, and a response can be joined as text. Decoding puts a single space between tokens: text written
with single spaces, as all text of the world is, comes back as it was.
"""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srppo.miniature.corpus import BOS, EOS, FILLER, NEWLINE
from srppo.miniature.world import DIGITS, FAMILIES, LETTERS

PAD, UNK = "<pad>", "<unk>"
WORDS = "what is : ? answer [ ] um i think maybe well , we take so it ."

POSITIONS = 64
"""Longest sequence of the model; pretraining documents end at `corpus.WINDOW`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token }}{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] }}{{ eos_token }}"
    "{% else %}"
    "{{ raise_exception('The miniature knows the roles user and assistant only.') }}"
    "{% endif %}"
    "{% endfor %}"
)
"""A question is a document's beginning; the newline that ends it is the generation prompt."""


def vocabulary() -> list[str]:
    """All tokens, by id."""
    names = [family.name for family in FAMILIES]
    characters = [*LETTERS, *LETTERS.upper(), "0", *DIGITS]
    return [PAD, BOS, EOS, UNK, NEWLINE, *characters, *names, *WORDS.split(), *FILLER]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that is saved with the base model. It adds no special token by itself."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(NEWLINE, behavior="isolated"),
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
