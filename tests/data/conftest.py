"""Tiny real tokenizers, each with a trait that breaks naive token handling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Answer: 12",
    "What is the answer? The answer is 12 .",
    "hello world hello there\n\nhow are you\n\n",
    "<|user|>\nhello\n<|assistant|>\nhello there",
] * 4
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
)


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level() -> PreTrainedTokenizerFast:
    """Llama 3's kind: BOS put before plain text, pieces that span spaces and newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>")


def chatml() -> PreTrainedTokenizerFast:
    """The same with a template that writes BOS and control tokens itself."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space put before any text, bytes for unknown characters."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab += [chr(code) for code in range(33, 127)]
    model = models.BPE(
        {piece: i for i, piece in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """Whole words, the specials among them: `</s>` in a text can only be spelt as EOS."""
    names = ["<unk>", "</s>", "say", "hello", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level, "chatml": chatml, "sentencepiece": sentencepiece}


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    from srppo.data.chat import apply_template

    tokenizer = TOKENIZERS[request.param]()
    apply_template(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    from srppo.data.chat import apply_template

    tokenizer = byte_level()
    apply_template(tokenizer)
    return tokenizer


@pytest.fixture
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """A tokenizer of its own, by name, that a test may change."""
    return lambda name: (TOKENIZERS | {"words": words})[name]()


@pytest.fixture
def strict_template() -> str:
    return STRICT


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Writes rows as JSONL and returns the path."""

    def write(rows: list[Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models beside the repository; the tests that want them skip elsewhere."""
    path = Path(__file__).resolve().parents[3] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder `shared` beside the repository: real data sets and a model")
    return path
