"""Sizes of what a recipe may name and this machine may not have: models, data sets, GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32}
_QWEN_2 = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2}
_SMOLLM = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
_MISTRAL_7B = {"model_type": "mistral", "num_attention_heads": 32, **_8B}

MODELS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B
    | {"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096},
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B
    | {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None},
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3 | _8B | {"max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": _LLAMA_3 | _8B | {"max_position_embeddings": 131072},
    "meta-llama/Llama-3.1-70B": _LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "meta-llama/Llama-3.2-1B": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN_2
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-1.5B": _QWEN_2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM
    | {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
    },
}
"""What of a config.json decides sizes. The model's own file, where it is there, counts instead."""

ROWS = {
    "allenai/tulu-v2-sft-mixture": 326_154,
    "openbmb/UltraFeedback": 63_967,
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,
    "HuggingFaceH4/ultrachat_200k": 207_865,
    "tatsu-lab/alpaca": 52_002,
    "databricks/databricks-dolly-15k": 15_011,
    "openai/gsm8k:main": 7_473,
    "Anthropic/hh-rlhf": 160_800,
}
"""Rows of the split that is trained on, as the data sets' cards say; none is dropped yet."""


@dataclass(frozen=True)
class Device:
    """What a plan reckons with."""

    name: str
    memory: float
    """Bytes."""
    float32: float
    """Operations per second of matrix products; dense."""
    bfloat16: float
    bandwidth: float
    """Bytes per second, of its memory."""
    link: float = 32e9
    """Bytes per second that it sends to others in its machine, and receives meanwhile; by default
    those of 16 lanes of PCIe 4."""
    measured: bool = False
    """On this machine, rather than as the vendor states."""
    gpu: bool = True


GPUS = {
    "H200": Device("H200", 141e9, 67e12, 989e12, 4.8e12, link=450e9),
    "H100": Device("H100", 80e9, 67e12, 989e12, 3.35e12, link=450e9),
    "A100": Device("A100", 80e9, 19.5e12, 312e12, 2.04e12, link=300e9),
    "L40S": Device("L40S", 48e9, 91.6e12, 362e12, 0.864e12),
    "4090": Device("4090", 24e9, 82.6e12, 165e12, 1.01e12),
    "A10": Device("A10", 24e9, 31.2e12, 125e12, 0.6e12),
}
"""From the vendors' data sheets: SXM where there is one, float32 without TF32, no sparsity; links
in one direction."""

NETWORK = 50e9
"""Bytes per second that a GPU sends to other machines: 400 Gbit/s for each, as in machines made for
training."""
