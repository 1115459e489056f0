"""Data sets by a short name: where they are, what their splits are called, how rows are read."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A known data set."""

    source: str
    """On the Hugging Face hub."""
    schema: str
    """How its rows are read: a key of `schemas.SCHEMAS`. Other rows are dropped, and counted."""
    splits: dict[str, str] = field(default_factory=dict)
    """What it calls the splits train and test, if otherwise."""


PRESETS = {
    "tulu-v2-mix": Preset("allenai/tulu-v2-sft-mixture", "messages"),
    "ultrafeedback": Preset("openbmb/UltraFeedback", "instruction + completions"),
    "ultrafeedback-binarized": Preset(
        "HuggingFaceH4/ultrafeedback_binarized",
        "messages",
        {"train": "train_prefs", "test": "test_prefs"},
    ),
    "ultrachat-200k": Preset(
        "HuggingFaceH4/ultrachat_200k", "messages", {"train": "train_sft", "test": "test_sft"}
    ),
    "alpaca": Preset("tatsu-lab/alpaca", "instruction + output"),
    "dolly": Preset("databricks/databricks-dolly-15k", "instruction + response"),
    "gsm8k": Preset("openai/gsm8k:main", "question + answer"),
    "hh-rlhf": Preset("Anthropic/hh-rlhf", "chosen"),
}
