"""The models, tokenizer and prompts of a case, on disk; and the clock that every engine reports by.

    python bench/workload.py DIR '{"width": 256}'

writes DIR/case.json, DIR/prompts.json and the models DIR/base and DIR/sft. Both environments run
this file: torch and transformers only.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from case import Case

disable_progress_bar()

EOS, PAD = 0, 1
GROUP = 4
"""Responses to one prompt, where an engine compares them."""
HAZARD = 1 / 64
"""Of the end, per response token."""
LOGIT_STD = 2.0
"""Nats: logits of a trained model differ more than a fresh one's, and so does their rounding."""
SFT_CHANGE = 0.1
"""How far SFT moves each weight, in standard deviations of the weights."""


def build(case: Case, directory: Path) -> None:
    """Write base, sft (base, slightly moved), each with its tokenizer, and the prompts."""
    torch.manual_seed(0)
    base = random_llama(case)
    sft = LlamaForCausalLM(base.config)
    sft.load_state_dict(base.state_dict())
    with torch.no_grad():
        for weight in sft.parameters():
            if weight.dim() == 2:
                weight += SFT_CHANGE * weight.std() * torch.randn_like(weight)
    prompts = torch.randint(2, case.vocab, (case.prompts, case.prompt_tokens))
    for name, model in {"base": base, "sft": sft}.items():
        set_ends(model, case, prompts[:16])
        model.save_pretrained(directory / name)
        words_as_tokens(case.vocab).save_pretrained(directory / name)
    (directory / "prompts.json").write_text(json.dumps(prompts.tolist()))
    (directory / "case.json").write_text(json.dumps(asdict(case)))


def random_llama(case: Case) -> PreTrainedModel:
    """Random weights."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocab,
            hidden_size=case.width,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.heads,
            max_position_embeddings=max(256, case.prompt_tokens + case.response_tokens),
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    with torch.no_grad():
        model.lm_head.weight *= LOGIT_STD / (model.lm_head.weight.std() * math.sqrt(case.width))
    return model.eval()


@torch.no_grad()
def set_ends(model: PreTrainedModel, case: Case, prompts: Tensor) -> None:
    """EOS with a chance of 1 in 64 in the mean over sampled responses, or never; padding never.

    It is in the weights, where every engine finds it: channel 0 of the residual stream becomes a
    constant that no layer reads or writes, and EOS and padding get their logits from it alone.
    """
    trunk, head = model.model, model.lm_head.weight
    inputs: list[Tensor] = []
    hook = trunk.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    trunk(prompts)
    hook.remove()
    trunk.embed_tokens.weight[:, 0] = 4 * inputs[0].square().mean().sqrt()
    for layer in trunk.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 0.0
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[0] = 0.0
    head[:, 0] = 0.0
    head[[EOS, PAD]] = 0.0
    never = -50.0 / trunk(prompts).last_hidden_state[..., 0].mean()
    head[[EOS, PAD], 0] = never
    if case.early:
        ids = model.generate(
            prompts, max_new_tokens=case.response_tokens, do_sample=True, top_k=0, temperature=1.0
        )
        hidden = trunk(ids).last_hidden_state[:, case.prompt_tokens :]
        others = (hidden @ head[2:].T).logsumexp(-1)
        low, high = 0.0, -float(never)
        while high - low > 1e-4:
            head[EOS, 0] = middle = (low + high) / 2
            hazard = (middle * hidden[..., 0] - others).sigmoid().mean()
            low, high = (low, middle) if hazard > HAZARD else (middle, high)


def words_as_tokens(vocab: int) -> PreTrainedTokenizerFast:
    """Text and ids say the same: token 17 is the word `t17`."""
    words = {"<eos>": EOS, "<pad>": PAD} | {f"t{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )


def load(directory: Path, name: str) -> PreTrainedModel:
    """base or sft, float32, for evaluation."""
    return AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()


def load_case(directory: Path) -> tuple[Case, list[list[int]]]:
    """The case and its prompts, token ids."""
    case = Case(**json.loads((directory / "case.json").read_text()))
    return case, json.loads((directory / "prompts.json").read_text())


@dataclass
class StepClock:
    """CPU and wall seconds of each step but the first, and the lengths of all responses."""

    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Response tokens, EOS included, of every step."""
    last: tuple[float, float] | None = None

    def tick(self) -> None:
        """A step is done."""
        now = time.process_time(), time.perf_counter()
        if self.last:
            self.cpu_seconds.append(now[0] - self.last[0])
            self.wall_seconds.append(now[1] - self.last[1])
        self.last = now

    def report(self) -> dict[str, object]:
        """What every measurement says."""
        return {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "mean_length": sum(self.lengths) / len(self.lengths),
            "peak_mb": peak_mb(),
        }


def peak_mb() -> float:
    """Largest resident memory of this process so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    build(Case(**json.loads(sys.argv[2])), Path(sys.argv[1]))
