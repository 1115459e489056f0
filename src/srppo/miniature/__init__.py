"""The embedded world of the demo.

world.py      twelve task families, the three splits, row generators, the scorer
corpus.py     what a document of the pretraining text looks like
tokenizer.py  74 words and characters, and the chat template
pretrain.py   trains the base model from scratch, checks the packaged one
base/         the packaged base model: seed 0 of pretrain.py, with its manifest
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""Directory of the packaged base model, in Hugging Face format."""
