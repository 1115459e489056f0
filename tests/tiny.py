"""Tiny real models and tokenizers, and a plain forward pass to hold everything against."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from srppo.miniature import BASE
from srppo.models.batching import Sequences

EOS, VOCAB = 0, 24
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def _gpt2() -> PreTrainedModel:
    """Learned positions, tied embeddings, and dropout that must stay off."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )


ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gpt2": _gpt2,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    # A window shorter than the sequences: what lies outside depends on true positions.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
}


def model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]().eval()


def sequences(seed: int = 0, n: int = 9, longest: int = 8) -> Sequences:
    """Prompts and responses of mixed lengths, EOS at the end of every other response."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()

    responses = [draw()[: longest - 1] + [EOS] * (i % 2) for i in range(n)]
    return Sequences.of([draw() for _ in range(n)], responses)


def row(y: Sequences, i: int) -> tuple[list[int], list[int]]:
    """Prompt and response of one row, without padding."""
    return y.prompt_ids[i], y.response_ids[i][y.mask[i]].tolist()


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """(T,) log-probabilities of a response, alone and unpadded; Hugging Face and torch only."""
    logits = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).squeeze(1)


def tokenizer(words: str = "a b c d e f g h", eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One id a word; 0 is EOS, 1 is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words.split()])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token=eos, unk_token="<unk>")


def copy_of_miniature(to: Path) -> Path:
    """The packaged base model in a directory that a test may damage."""
    shutil.copytree(BASE, to)
    return to
