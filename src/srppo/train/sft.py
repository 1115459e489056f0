"""Stage 1: supervised fine-tuning by TRL's SFTTrainer, on ids and masks of our data layer."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from srppo.config import SFTConfig
from srppo.data.demonstrations import Example
from srppo.models.memory import activation_checkpointing
from srppo.progress import Advance, Reporter
from srppo.train.metrics import MetricsLog
from srppo.train.weighted import WEIGHTS_OF, ImportanceWeighted, WithReference, reference_logprobs

IGNORED = -100  # label of tokens without loss: the prompt


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: SFTConfig,
    *,
    seed: int,
    log: MetricsLog,
    reporter: Reporter,
    title: str = "SFT",
) -> PreTrainedModel:
    """Minimise -log pi(y|x) over response tokens (EOS included). Trains `model` in place: what of
    it requires gradients, all or its adapter.

    The loss of an optimizer step is the mean over the response tokens of its batch, each weighted
    as `config.loss` says.
    Source: arXiv:2510.21090, stage 1.
    """
    micro = min(config.micro_batch_size, config.batch_size, len(examples))
    accumulation = math.ceil(min(config.batch_size, len(examples)) / micro)
    steps = config.epochs * math.ceil(len(examples) / (micro * accumulation))
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [_row(e) for e in examples]
    if config.loss in WEIGHTS_OF:
        for row, logprobs in zip(rows, reference_logprobs(model, examples), strict=True):
            row["reference_logprobs"] = logprobs
    model.train()
    with (
        TemporaryDirectory() as scratch,
        reporter.bar(title, steps, "steps") as advance,
        warnings.catch_warnings(),
    ):
        # TRL's own default of this setting already goes through its deprecated name.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
        arguments = TRLConfig(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_schedule
            if config.warmup_fraction == 0 or config.lr_schedule != "constant"
            else "constant_with_warmup",
            warmup_steps=round(config.warmup_fraction * steps),
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            seed=seed,
            data_seed=seed,
            use_cpu=model.device.type == "cpu",
            bf16=config.compute == "bfloat16",
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            remove_unused_columns=False,
            loss_type="dft" if config.loss == "dft" else "nll",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process, one GPU; the trainer would split batches over all
        # SFTTrainer prints each log line to stdout; ours go through the reporter.
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = _Trainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                data_collator=WithReference(pad_token_id=tokenizer.eos_token_id),
                optimizer_cls_and_kwargs=_optimizer(config),
                callbacks=[_Report(log, reporter, advance, title)],
            )
            trainer.weights_of = WEIGHTS_OF.get(config.loss)
            for p in trained:
                p.data = p.data.float()  # the trainer makes adapters on quantised weights bfloat16
            with activation_checkpointing(model, config.gradient_checkpointing):
                trainer.train()
    return model.eval()


class _Trainer(ImportanceWeighted, SFTTrainer):
    """TRL's, which has `nll` and `dft`."""


def _row(example: Example) -> dict[str, list[Any]]:
    prompt, response = example.prompt_ids, example.response_ids
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def _optimizer(config: SFTConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD, {**common, "momentum": 0.9}
    return torch.optim.AdamW, common


class _Report(TrainerCallback):
    """Passes the trainer's log on to ours."""

    def __init__(self, log: MetricsLog, reporter: Reporter, advance: Advance, title: str) -> None:
        self.log, self.reporter, self.advance, self.title = log, reporter, advance, title
        self.started = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        kept = ("loss", "epoch", "learning_rate", "grad_norm", "entropy", "mean_token_accuracy")
        values = {k: float(logs[k]) for k in kept if k in logs}
        values["time/seconds"] = time.monotonic() - self.started
        self.log.log(state.global_step, values)
        self.advance(1)
        every = max(1, state.max_steps // 5)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.reporter.line(
                f"{self.title} step {state.global_step}/{state.max_steps}  "
                f"loss {values['loss']:.3f} nats/token  lr {values['learning_rate']:.2g}"
            )
