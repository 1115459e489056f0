"""One text, one list of ids: in stage 1, in the reward and in the prompts of rollouts.

Tiny random models of seven architectures, tokenizers of five kinds; what the models are called
with is recorded, so nothing depends on what the code between says that it does.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loading import demonstrations, prompts
from srppo.config import SFTConfig
from srppo.data.chat import Example
from srppo.errors import DataError
from srppo.models.batching import Sequences
from srppo.models.scoring import score
from srppo.progress import Reporter
from srppo.train.metrics import MetricsLog
from srppo.train.sft import train_sft

# --- seven architectures --------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**GROUPED, **k)),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8, **k)),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**GROUPED, **k)),
    "gemma": lambda **k: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8, **k)),
    "phi": lambda **k: PhiForCausalLM(PhiConfig(**SHAPE, **k)),
    "gpt_neox": lambda **k: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, **k)),
    "gpt2": lambda **k: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3, **k)
    ),
}

# --- five tokenizers ------------------------------------------------------------------------------

CORPUS = ["What is 12? The answer is 12.", "hello world, how are you?\n\n", "<|user|>\nhello"] * 8
NEWLINE_AFTER_EOS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    """BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(dict.fromkeys(["<s>", *special.values()])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE over characters, bytes for those that are unknown; a space before any text."""
    vocab = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab += [chr(code) for code in range(33, 127)]
    model = models.BPE(
        {piece: i for i, piece in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def characters() -> PreTrainedTokenizerFast:
    """BPE without byte fallback: what it has not seen is <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=NEWLINE_AFTER_EOS, **special
    )


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other model; EOS pads."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def eos_pads() -> PreTrainedTokenizerFast:
    """GPT-2's kind: one special token for everything; its template puts a newline after it."""
    end = "<|endoftext|>"
    tokenizer = byte_level(bos_token=end, eos_token=end, unk_token=end, pad_token=end)
    tokenizer.chat_template = NEWLINE_AFTER_EOS
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level, no template, no pad": lambda: byte_level(eos_token="</s>"),
    "byte level, pad = EOS, newline after EOS": eos_pads,
    "byte fallback, no template, no pad": byte_fallback,
    "no byte fallback, newline after EOS": characters,
    "unigram, no template, pad = EOS": unigram,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


# --- conversations --------------------------------------------------------------------------------

LIMITS: dict[str, Any] = {"max_prompt_tokens": 500, "limit": None, "seed": 0}
PIECES = [
    "hello",
    "12",
    " ",
    "\n",
    "Answer: ",
    "é",
    "日本",
    "🙂",
    "</s>",
    "<|endoftext|>",
    "<|user|>",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


@st.composite
def conversation(draw: st.DrawFn) -> dict[str, Any]:
    """Perhaps a system turn, then user and assistant in turn, with a user turn at the end."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    roles += ["user"] * draw(st.booleans())
    return {"messages": [{"role": role, "content": draw(TEXT)} for role in roles]}


ROWS = [
    {"prompt": "What is 12?", "response": "12"},
    {"prompt": "hello", "response": "hello world, how are you?"},
    {"prompt": "hello world " * 4, "response": "The answer is 12.\n\n12"},
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "12."},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "how are you?"},
        ]
    },
]


ANSWER = {"role": "assistant", "content": "12"}


def load(rows: list[Any], tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Any:
    """Demonstrations and prompts of the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        limits = LIMITS | settings
        examples, _ = demonstrations(str(path), tokenizer, **limits, max_response_tokens=400)
        found, _ = prompts(str(path), tokenizer, **limits)
    return examples, found


def load_prompt(turns: list[Any], tokenizer: PreTrainedTokenizerFast) -> list[int] | None:
    """Ids that a rollout of these turns starts from."""
    try:
        _, (prompt,) = load([{"messages": [*turns, ANSWER]}], tokenizer)
    except DataError:
        return None
    return prompt.ids


# --- properties of the ids ------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(conversation())
def test_stage_1_and_stage_2_start_from_the_same_ids_and_responses_end_with_eos(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
):
    try:
        examples, (prompt,) = load([row], tokenizer)
    except DataError:
        return  # no text, or none that this tokenizer can spell
    turns = row["messages"]
    rollouts = [
        load_prompt(turns[:i], tokenizer) for i, t in enumerate(turns) if t["role"] == "assistant"
    ]
    for example in examples:
        assert example.prompt_ids in rollouts
        assert example.response_ids[-1] == tokenizer.eos_token_id
        assert example.response_ids.count(tokenizer.eos_token_id) == 1
    # A turn may be left out, such as `</s>`, which some can only spell as EOS: then not its prompt.
    if turns[-1]["role"] == "assistant" and len(examples) == len(rollouts):
        assert examples[-1].prompt_ids == prompt.ids
    own = tokenizer.apply_chat_template(
        turns[: len(turns) - (turns[-1]["role"] == "assistant")],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.text == own


def spelt(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_masks_cover_exactly_the_response(tokenizer: PreTrainedTokenizerFast):
    examples, _ = load(ROWS, tokenizer)
    answers = {"12", "hello world, how are you?", "The answer is 12.\n\n12", "12.", "how are you?"}
    y = sequences(examples)
    assert len(y) == 5
    for i, example in enumerate(examples):
        masked = y.response_ids[i][y.mask[i]].tolist()
        assert masked == example.response_ids
        assert masked[-1] == tokenizer.eos_token_id
        text = spelt(tokenizer, masked[:-1]).lstrip(" ")
        assert text in answers or (tokenizer.unk_token_id in masked and "\n" not in text)


def test_the_pad_token_changes_nothing(tokenizer: PreTrainedTokenizerFast):
    before, _ = load(ROWS, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.pad_token = None if other.pad_token else other.eos_token
    after, _ = load(ROWS, other)
    assert [(e.prompt_ids, e.response_ids) for e in before] == [
        (e.prompt_ids, e.response_ids) for e in after
    ]


# --- what the models are called with --------------------------------------------------------------


def sequences(examples: list[Example]) -> Sequences:
    return Sequences.of([e.prompt_ids for e in examples], [e.response_ids for e in examples])


def tiny(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return ARCHITECTURES[name](vocab_size=len(tokenizer), **special).eval()


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of each call of the model."""
    calls: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    yield calls
    hook.remove()


def attended(call: dict[str, Any]) -> list[tuple[int, ...]]:
    """Each row's ids without padding."""
    pairs = zip(call["input_ids"].tolist(), call["attention_mask"].tolist(), strict=True)
    return [tuple(i for i, there in zip(ids, mask, strict=True) if there) for ids, mask in pairs]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_model_as_base_and_sft_gives_a_reward_of_exactly_0(
    architecture: str, tokenizer: PreTrainedTokenizerFast
):
    examples, _ = load(ROWS, tokenizer)
    base, y = tiny(architecture, tokenizer), sequences(examples)
    sft = copy.deepcopy(base)
    with recorded(base.base_model) as calls:
        logprobs = score(base, y, max_tokens=150)
    read = [call["input_ids"] for call in calls if call.get("input_ids") is not None]
    batches = [ids.tolist() for ids in read if ids.numel() > 1]  # the head alone reads one id
    assert len(batches) > 1
    seen = sorted(row for batch in batches for row in batch)
    # All but the last token is read, which is predicted only; rows are padded on the right.
    inputs = [(e.prompt_ids + e.response_ids)[:-1] for e in examples]
    widths = {len(row) for row in seen}
    padded = [ids + [0] * (width - len(ids)) for ids in inputs for width in widths]
    assert len(seen) == len(inputs)
    assert all(row in padded for row in seen)
    assert all(any(row[: len(ids)] == ids for row in seen) for ids in inputs)
    assert (logprobs[y.mask] < 0).all()
    assert torch.equal(score(sft, y, max_tokens=150) - logprobs, torch.zeros_like(logprobs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stage_1_reads_the_ids_that_are_scored_and_learns_the_response(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    examples, _ = load(ROWS, tokenizer)
    model = tiny(architecture, tokenizer)
    config = SFTConfig(epochs=1, batch_size=len(examples), learning_rate=1e-9)
    with MetricsLog(tmp_path, "sft") as log, recorded(model) as calls:
        train_sft(
            model, tokenizer, examples, config, seed=0, log=log, reporter=Reporter(quiet=True)
        )
    y = sequences(examples)
    wanted = {tuple(e.prompt_ids + e.response_ids): i for i, e in enumerate(examples)}
    seen = []
    batches = [call for call in calls if "attention_mask" in call]  # before them one row is checked
    for call in batches:
        labels = call["labels"].tolist()
        for ids, learnt in zip(attended(call), labels, strict=True):
            i = wanted[ids]
            seen.append(i)
            start = len(examples[i].prompt_ids)
            trained = [place for place, label in enumerate(learnt) if label != -100]
            assert trained == list(range(start, start + int(y.lengths[i])))
            assert [learnt[place] for place in trained] == examples[i].response_ids
    assert sorted(seen) == list(range(len(examples)))
