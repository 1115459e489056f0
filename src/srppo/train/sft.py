"""Stage 1: supervised fine-tuning by TRL's SFTTrainer, on ids and masks of our data layer."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from srppo import distributed
from srppo.config import SFTConfig
from srppo.data.demonstrations import Example
from srppo.errors import ConfigError, ModelError
from srppo.models.batching import Sequences
from srppo.models.memory import Budget, activation_checkpointing
from srppo.models.scoring import rounding, score
from srppo.progress import Advance, Reporter
from srppo.train.health import Ailment
from srppo.train.metrics import MetricsLog
from srppo.train.state import Tree, load_optimizer, load_tensors, optimizer_state
from srppo.train.steps import Keeper, Steps
from srppo.train.update import add_gradients, clip
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
    keeper: Keeper | None = None,
    title: str = "SFT",
) -> PreTrainedModel:
    """Minimise -log pi(y|x) over response tokens (EOS included). Trains `model` in place: what of
    it requires gradients, all or its adapter; on from the last checkpoint of `keeper`.

    The loss of an optimizer step is the mean over the response tokens of its batch, each weighted
    as `config.loss` says.
    Source: arXiv:2510.21090, stage 1.
    """
    micro, accumulation = batching(config, len(examples))
    steps = config.epochs * math.ceil(len(examples) / (micro * accumulation * distributed.size()))
    rows = [_row(e) for e in examples]
    if config.loss in WEIGHTS_OF:
        for row, logprobs in zip(rows, reference_logprobs(model, examples), strict=True):
            row["reference_logprobs"] = logprobs
    first = examples[0]
    scored = score(model, Sequences.of([first.prompt_ids], [first.response_ids]), max_tokens=1)[0]
    if isinstance(model, FSDPModule):
        model.reshard()  # what is trained are the pieces
        vars(model)["_is_accelerate_prepared"] = True  # not to be wrapped for several once more
    trained = [p for p in model.parameters() if p.requires_grad]
    with TemporaryDirectory() as scratch, warnings.catch_warnings(), _own_router(model):
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
            # Text alone gives the tower of a model that sees or hears no gradient.
            ddp_find_unused_parameters=model.config.get_text_config() is not model.config,
            router_aux_loss_coef=0.0,  # equation (1) has no term that balances experts
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process, one GPU; the trainer would split batches over all
        if model.device.type == "cuda" and not distributed.is_joined():
            torch.cuda.set_device(model.device)  # the trainer would take the first
            vars(arguments)["_setup_devices"] = model.device
        # SFTTrainer prints each log line to stdout; ours go through the reporter.
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = _Trainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                data_collator=WithReference(pad_token_id=tokenizer.eos_token_id),
                optimizer_cls_and_kwargs=_optimizer(config),
                rows=Budget(micro, reporter.line),
            )
            _check_loss(trainer, first, scored)
            model.train()
            trainer.weights_of = WEIGHTS_OF.get(config.loss)
            for p in trained:
                if p.dtype != torch.float32:  # the trainer makes adapters on quantised weights so
                    p.data = p.data.float()
            with (
                Steps(keeper, trainer, log) as place,
                reporter.bar(title, steps, "steps", place.done) as advance,
                activation_checkpointing(model, config.gradient_checkpointing),
            ):
                trainer.place, place.more = place, trainer.more_files
                trainer.add_callback(_Report(trainer, place, log, reporter, advance, title))
                found = keeper and keeper.found
                trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    return model.eval()


@contextlib.contextmanager
def _own_router(model: PreTrainedModel) -> Iterator[None]:
    """TRL writes into the configuration that experts are not to be balanced; inside only."""
    config = model.config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef")
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


@torch.no_grad()
def _check_loss(trainer: _Trainer, example: Example, scored: Tensor) -> None:
    """Raises ModelError unless the loss is of what is scored: TRL has an output head of its own,
    and knows some architectures' only."""
    model, n = trainer.model, len(example.response_ids)
    inputs = {k: torch.tensor([x], device=model.device) for k, x in _row(example).items()}
    trained = model(**inputs, fused_lm_head=True).log_probs[0, -n:].float().cpu()
    if isinstance(model, FSDPModule):
        model.reshard()  # a pass without its way back leaves the head whole
    off = float((trained - scored).abs().mean())
    if not off <= rounding(model):
        raise ModelError(
            f"{type(model).__name__} cannot be fine-tuned here: the log-probabilities in the loss "
            f"are {off:.2g} nats a token away from those that are scored, so another model would "
            "be trained. Take a model of another architecture."
        )


def batching(config: SFTConfig, n: int) -> tuple[int, int]:
    """Demonstrations per forward pass of one process, and passes per optimizer step, with n in all.

    All processes together take `batch_size` a step. They divide the last batch of an epoch with
    the help of demonstrations from its beginning, where it cannot be divided otherwise.

    Raises:
        ConfigError: they cannot take as many.
    """
    size = distributed.size()
    if config.batch_size % size:
        raise ConfigError(
            f"sft.batch_size={config.batch_size} cannot be divided among {size} processes: steps "
            "would see another number of demonstrations than asked for. Try sft.batch_size="
            f"{size * math.ceil(config.batch_size / size)}."
        )
    each = math.ceil(min(config.batch_size, n) / size)
    fitting = range(1, min(config.micro_batch_size, each) + 1)
    micro = max(m for m in fitting if each % m == 0)
    return micro, each // micro


def _row(example: Example) -> dict[str, list[Any]]:
    prompt, response = example.prompt_ids, example.response_ids
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def _optimizer(config: SFTConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD, {**common, "momentum": 0.9}
    return torch.optim.AdamW, common


class _Trainer(ImportanceWeighted, SFTTrainer):
    """Goes on from our checkpoints: its own would be unpickled.

    A checkpoint holds a file of the trainer's beside ours, by which it finds its place in the data.
    """

    place: Steps
    rows: Budget
    """Per forward pass."""
    before: Tree | None = None
    """What it goes on from."""
    random: Tree
    """Generators as the last step left them: dropout draws from them."""

    def __init__(self, *args: Any, rows: Budget, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL's loss divides by the tokens of the whole step, whatever the model's own would do.
        self.model_accepts_loss_kwargs = True
        self.rows = rows
        self.inputs: list[dict[str, Any]] = []
        """Of the step so far: when memory runs out, its gradients are made anew."""

    def _send_telemetry(self) -> None:
        """TRL would tell its authors the kind of model, hardware and data."""

    def end_step(self) -> None:
        """Note what the next one starts from."""
        device = self.model.device
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.random = {"cpu": torch.get_rng_state(), "device": on_device}
        self.inputs.clear()

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Add the gradients of one microbatch, in smaller ones once memory has run out."""
        self.inputs.append(inputs)
        undone: list[dict[str, Any]] = []

        def work(rows: int) -> torch.Tensor:
            for earlier in undone:
                self._add(model, earlier, num_items_in_batch, rows)
            return self._add(model, inputs, num_items_in_batch, rows)

        def undo() -> None:
            model.zero_grad()
            self._metrics["train"].clear()
            undone[:] = self.inputs[:-1]

        return self.rows.fit(work, undo)

    def _add(
        self, model: PreTrainedModel, inputs: dict[str, Any], n_tokens: Any, rows: int
    ) -> torch.Tensor:
        parts = zip(*(x.split(rows) for x in inputs.values()), strict=True)
        losses = [
            super(_Trainer, self).training_step(
                model, dict(zip(inputs, part, strict=True)), n_tokens
            )
            for part in parts
        ]
        return torch.stack(losses).sum()

    def autocast_smart_context_manager(self, *args: Any) -> contextlib.AbstractContextManager[Any]:
        """accelerate puts it around models that it prepares."""
        ours = isinstance(self.model, FSDPModule)
        return self.accelerator.autocast() if ours else super().autocast_smart_context_manager()

    def _clip_grad_norm(self, model: PreTrainedModel) -> Any:
        if not isinstance(model, FSDPModule):
            return super()._clip_grad_norm(model)
        weights = self._weights()
        for p in weights:
            if p.grad is not None:
                p.grad /= distributed.size()  # the loss was multiplied, for means over processes
        add_gradients(weights)
        return float(clip(weights, self.args.max_grad_norm))

    def _get_grad_norm(self, model: PreTrainedModel, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            step = self.state.global_step + 1
            ailment = Ailment(f"the norm of its gradient is {norm}")
            self.place.bad(step, ailment, {"inputs": self.inputs}, {})
        return norm

    def state_dict(self) -> Tree:
        """As it was after the last step."""
        return {
            "weights": self._weights(),
            "optimizer": optimizer_state(self.optimizer.optimizer),
            "random": {
                k: x if x is None else distributed.of_all(x) for k, x in self.random.items()
            },
            "rows_per_pass": self.rows.size,
        }

    def load_state_dict(self, state: Tree) -> None:
        """The weights; the rest when the trainer asks for it."""
        load_tensors(self._weights(), state["weights"])
        self.rows.size = min(self.rows.size, state["rows_per_pass"])
        self.before = state

    def more_files(self) -> dict[str, str]:
        """The trainer's own place, as it reads it."""
        state = replace(self.state, log_history=[])
        return {TRAINER_STATE_NAME: json.dumps(asdict(state), indent=1)}

    def _weights(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Done by `load_state_dict`."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.before is None:
            return
        load_optimizer(self.optimizer.optimizer, self.before["optimizer"])
        step, schedule = self.state.global_step, self.lr_scheduler
        peaks = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule.last_epoch, schedule._step_count = step, step + 1
        schedule._last_lr = [peak * factor(step) for peak, factor in peaks]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.before is None:
            return
        place = distributed.rank()  # among more processes than before some draw alike
        saved = {k: x for k, x in self.before["random"].items() if x is not None}
        # torch reads a generator's state from the start of its storage: rows are copied.
        random = {k: x[place % len(x)].clone() for k, x in saved.items()}
        torch.set_rng_state(random["cpu"])
        if "device" in random:
            torch.cuda.set_rng_state(random["device"], self.model.device)


class _Report(TrainerCallback):
    """Passes the trainer's steps on to `Steps`, and its log to ours."""

    def __init__(
        self,
        trainer: _Trainer,
        place: Steps,
        log: MetricsLog,
        reporter: Reporter,
        advance: Advance,
        title: str,
    ) -> None:
        self.trainer, self.place = trainer, place
        self.log, self.reporter, self.advance, self.title = log, reporter, advance, title
        self.started = time.monotonic()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.place.begin_update()

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
        self.trainer.end_step()
        self.place.complete(state.global_step, values)
