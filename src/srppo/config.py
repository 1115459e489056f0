"""The recipe: everything that decides what a run does, checked once and then frozen.

`load_recipe("recipes/miniature.yaml", ["ppo.kl_coef=0.5"])` reads YAML, applies the overrides and
checks the result. "paper" marks values from arXiv:2510.21090, "ours" what we chose ourselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from srppo.config_checkpoint import CheckpointConfig
from srppo.config_controls import ControlConfig
from srppo.config_data import DataConfig
from srppo.config_eval import EvalConfig
from srppo.config_model import LoRAConfig as LoRAConfig
from srppo.config_model import ModelConfig as ModelConfig
from srppo.config_rollout import RolloutConfig
from srppo.errors import ConfigError
from srppo.validation import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveOrAuto,
    Schedule,
    Section,
    Seed,
    in_one_line,
    validate,
)


class SFTConfig(Section):
    """Stage 1: minimise -log pi(y|x) over response tokens, EOS included."""

    loss: Literal["nll", "dft", "iw", "iw_step"] = "nll"
    """What each token's -log pi is weighted with: `nll` nothing (paper); `dft` its probability
    (arXiv:2508.05629); `iw` the response's probability ratio to the model that training starts
    from, per token; `iw_step` the token's own (arXiv:2507.12856). docs/baselines.md."""
    epochs: Positive = 2
    """Passes over the demonstrations (paper)."""
    batch_size: Positive = 128
    """Demonstrations per optimizer step (paper)."""
    micro_batch_size: Positive = 8
    """Demonstrations per forward pass; memory only."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products; weights are float32. bfloat16 is refused on a CPU without
    products in it."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass: activations
    take a fraction of the memory, the pass about a third more time."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate (paper: one of 1e-5, 5e-6, 1e-6, 5e-7)."""
    lr_schedule: Schedule = "linear"
    """Decay to zero over the run, or none (ours)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps over which the learning rate rises (ours); in the first of them it is 0,
    as everywhere in transformers."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has momentum 0.9. See docs/LOG.md for what the optimizer does to the reward."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw, L2 for sgd."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""

    @model_validator(mode="after")
    def _possible(self) -> SFTConfig:
        if self.batch_size > self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size}: optimizer steps would see another number of "
                f"demonstrations than asked for. Try micro_batch_size="
                f"{math.gcd(self.batch_size, self.micro_batch_size)}."
            )
        return self


class PPOConfig(Section):
    """Stage 2: maximise E[r(x,y) - kl_coef KL(pi_theta || pi_ref)] on prompts alone."""

    estimator: Literal["ppo", "rloo", "all_action"] = "ppo"
    """`ppo`: critic and GAE. `rloo`: leave-one-out over responses of one prompt, no critic; the
    whole response then has one advantage, whatever credit, gamma and gae_lambda say. `all_action`:
    the reward of every token of the vocabulary instead of the sampled one's, no critic; credit,
    gae_lambda and whiten_advantages have no meaning there."""
    sampled_share: Fraction = 0.5
    """all_action: share of the sampled token's own reward in its gradient; 0 is the pure
    all-action gradient, 1 that of sampled rewards (docs/math.md)."""
    steps: Positive | None = None
    """Updates of the policy; null: one pass over the prompts."""
    rollouts_per_step: Positive = 1024
    """Responses sampled before each update (paper)."""
    responses_per_prompt: Positive = 1
    """Responses to each prompt of a step; rloo needs at least 2."""
    epochs: Positive = 1
    """Passes over the rollouts of a step (ours)."""
    minibatch_size: Positive = 128
    """Responses per optimizer step (ours); the last one of a pass may be smaller."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Matrix products of the update, on a GPU of sampling, too; otherwise as in `sft`. With
    model.shard it holds for all of the policy, scored before the update, too. The reward's own
    precision is model.dtype."""
    max_tokens_per_batch: Positive = 16384
    """Tokens, padding included, per forward pass; memory and speed only."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass: activations
    take a fraction of the memory, the pass about a third more time."""

    kl_coef: PositiveOrAuto = 0.2
    """beta, the KL coefficient (paper: 0.2 or 0.5). `auto`: the one that aims where the audit finds
    held-out demonstrations likeliest (ours)."""
    kl_ref: Literal["sft", "base"] = "sft"
    """pi_ref (ours; the paper's choice could not be read)."""
    credit: Literal["eos", "token"] = "eos"
    """The reward's place: whole at the last response token, or each token its own term."""
    reward: Literal["sum", "mean"] = "sum"
    """The log-ratio summed over the response (paper), or its mean per token."""
    token_clip: PositiveFloat | None = None
    """Bound in nats on each token's log-ratio; the bounded fraction is logged (ours)."""
    plausibility: Annotated[float, Field(gt=0, le=1)] | None = None
    """A token less likely under pi_sft than this share of its likeliest one pays for that instead
    of earning its log-ratio; such tokens' share is logged (ours; docs/evidence.md measures 0.1)."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Nats taken from responses that were cut off at max_response_tokens."""

    learning_rate: PositiveFloat = 1e-6
    """AdamW, policy (ours)."""
    lr_schedule: Schedule = "constant"
    """Over the steps (ours)."""
    max_grad_norm: PositiveFloat = 1.0
    """For policy and critic each."""
    clip: PositiveFloat = 0.2
    """PPO's epsilon (ours)."""
    whiten_advantages: bool = True
    """Zero mean, unit variance over all response tokens of a step."""
    gamma: Fraction = 1.0
    """Discount (ours)."""
    gae_lambda: Fraction = 1.0
    """GAE's lambda (ours): below 1, credit at EOS fades on its way to the early tokens."""
    value_learning_rate: PositiveFloat = 1e-3
    """AdamW, critic (ours)."""
    value_clip: PositiveFloat = 0.2
    """How far a value may move per step, in standard deviations of the returns (ours)."""
    value_warmup_steps: NonNegative = 0
    """ppo: first steps in which only the critic learns; they come on top of `steps`."""
    update_kl_limit: PositiveFloat | None = None
    """A step's remaining minibatches are left out once KL(old||new) exceeds this, nats a token.
    0.01 kept learning rates that are high from losing responses for good (docs/LOG.md)."""
    max_kl: PositiveFloat = 50.0
    """Training stops once KL(pi_theta||pi_ref) exceeds this, nats a response (ours)."""
    on_bad_numbers: Literal["stop", "skip"] = "stop"
    """What to do with a step that teaches nothing: NaN or Inf in logits, rewards or gradients, all
    responses cut off, no entropy left, one reward for all; `skip` leaves it out."""

    @model_validator(mode="after")
    def _possible(self) -> PPOConfig:
        if self.estimator == "rloo" and self.responses_per_prompt < 2:
            raise ValueError(
                f"responses_per_prompt={self.responses_per_prompt} with estimator=rloo: leaving "
                "one of one out leaves no baseline. Set ppo.responses_per_prompt=4."
            )
        if self.estimator == "all_action" and self.reward == "mean":
            raise ValueError(
                "reward=mean with estimator=all_action: the length that it divides by is not known "
                "before the response ends, so no single token has a reward. Set ppo.reward=sum."
            )
        bounded_from_base = self.is_bounded and self.kl_ref == "base"
        if self.kl_coef == "auto" and (self.reward == "mean" or bounded_from_base):
            raise ValueError(
                "kl_coef=auto with reward=mean, or with kl_ref=base and a bound on tokens: the "
                "audit's curve is of sums, and bounded it begins at the SFT model, so its beta "
                "would not be this reward's. Set ppo.kl_coef=0.5, say."
            )
        left_over = self.rollouts_per_step % self.responses_per_prompt
        if left_over:
            fitting = max(self.rollouts_per_step - left_over, self.responses_per_prompt)
            raise ValueError(
                f"rollouts_per_step={self.rollouts_per_step} is not a multiple of "
                f"responses_per_prompt={self.responses_per_prompt}: one prompt would get fewer "
                f"responses than the others. Try ppo.rollouts_per_step={fitting}."
            )
        return self

    @property
    def beta(self) -> float:
        """`kl_coef` as a number, which `auto` is not before the audit."""
        assert self.kl_coef != "auto"
        return self.kl_coef

    @property
    def is_bounded(self) -> bool:
        """Whether a single token's part of the reward is."""
        return self.token_clip is not None or self.plausibility is not None


class AuditConfig(Section):
    """The reward audit that stage 2 starts with."""

    prompts: Positive = 200
    """Held-out demonstrations looked at, at most."""


class Recipe(Section):
    """One run, whole."""

    name: str
    """Shown in the report."""
    output_dir: str
    """The run directory; `{seed}` is replaced."""
    seed: Seed = 0
    """Decides every random number of the run; below 2^32."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    audit: AuditConfig = AuditConfig()
    ppo: PPOConfig = PPOConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    controls: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.@-]*$")], ControlConfig] = Field(
        {}
    )
    """Name: control. Each is trained and evaluated beside the run's own models; null: none."""

    @field_validator("controls", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if not self.data.demonstrations and not self.model.sft:
            raise ValueError(
                "neither data.demonstrations nor model.sft is set: there is nothing to learn the "
                "reward from. Set one of them."
            )
        if not self.data.demonstrations and not self.data.prompts:
            raise ValueError(
                "neither data.prompts nor data.demonstrations is set: stage 2 has no prompts. "
                "Set data.prompts."
            )
        if self.model.offload and self.uses_all_action:
            raise ValueError(
                "model.offload with ppo.estimator=all_action: the update needs the output heads of "
                "the frozen models at every chunk, so they would move all the time. Set "
                "ppo.estimator=ppo, or model.offload=false."
            )
        best = self.checkpoint.keep_best or ""
        if best.startswith(("eval/", "bench/")) and not self.eval.every:
            raise ValueError(
                f"checkpoint.keep_best={best} is measured during stage 2 only with eval.every, "
                "which is not set: no policy would be kept. Set eval.every."
            )
        if self.model.shard and self.uses_all_action:
            raise ValueError(
                "model.shard with ppo.estimator=all_action: the update needs the output heads of "
                "the frozen models at every chunk, and each process another number of chunks. Set "
                "ppo.estimator=ppo, or model.shard=false."
            )
        if self.rollout.engine == "continuous" and self.model.shard:
            raise ValueError(
                "rollout.engine=continuous with model.shard: transformers' continuous batching "
                "knows no weights in pieces. Set rollout.engine=transformers or vllm."
            )
        if self.rollout.weight_transfer == "nccl" and self.model.lora:
            raise ValueError(
                "rollout.weight_transfer=nccl with model.lora: the server reads adapters from a "
                "directory only. Leave weight_transfer out."
            )
        for name, control in self.controls.items():
            if name in ("base", "sft", "policy"):
                raise ValueError(
                    f"controls.{name}: the run's own model has that name, so the table could not "
                    "tell them apart. Choose another."
                )
            if control.on_demonstrations and not self.data.demonstrations:
                raise ValueError(
                    f"controls.{name}.{control.on_demonstrations} trains on demonstrations, and "
                    "data.demonstrations is not set. Set it, or leave the control out."
                )
            if control.extrapolate_weights and self.model.lora:
                raise ValueError(
                    f"controls.{name}.extrapolate_weights with model.lora: pi_sft's weights are "
                    "those of the base and an adapter. Leave the control out, or model.lora."
                )
            for section in ("sft", "ppo"):
                if changes := getattr(control, section):
                    kind, merged = self._changed(section, changes)
                    validate(kind, merged, prefix=("controls", name, section))
            if control.ppo is not None and self._has_no_curve(control):
                raise ValueError(
                    f"controls.{name} with kl_coef=auto: the audit is of the run's reward, not of "
                    f"this one's. Set controls.{name}.ppo.kl_coef to a number."
                )
        return self

    def _has_no_curve(self, control: ControlConfig) -> bool:
        """Whether it takes its beta from an audit of another reward than its own."""
        own = self.with_control(control).ppo
        bounds = {(p.token_clip, p.plausibility) for p in (self.ppo, own)}
        return own.kl_coef == "auto" and (control.against == "halfway" or len(bounds) > 1)

    def _changed(self, section: str, changes: dict[str, Any]) -> tuple[type[Section], Any]:
        settings = getattr(self, section)
        return type(settings), {**settings.model_dump(), **changes}

    def with_control(self, control: ControlConfig) -> Recipe:
        """This recipe as the control would run it."""
        recipe = self
        for section in ("sft", "ppo"):
            if changes := getattr(control, section):
                kind, merged = self._changed(section, changes)
                recipe = recipe.model_copy(update={section: kind.model_validate(merged)})
        return recipe

    @property
    def uses_all_action(self) -> bool:
        """Whether stage 2 or a control's does."""
        changed = (control.ppo or {} for control in self.controls.values())
        return "all_action" in {self.ppo.estimator, *(c.get("estimator") for c in changed)}

    @property
    def finds_beta(self) -> bool:
        """Whether stage 2 or a control's takes its beta from the audit."""
        return any(
            self.with_control(control).ppo.kl_coef == "auto"
            for control in [ControlConfig(ppo={}), *self.controls.values()]
        )

    @property
    def run_dir(self) -> Path:
        """`output_dir` with the seed filled in."""
        return Path(self.output_dir.replace("{seed}", str(self.seed))).expanduser()


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, impossible combination.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for item in overrides or []:
        if "=" not in item or item.startswith("="):
            raise ConfigError(
                f"override {item!r} is not of the form key=value: nothing can be set. "
                "Write, for example, ppo.kl_coef=0.5."
            )
    try:
        tree = OmegaConf.load(path)
        if isinstance(tree, DictConfig):
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides or []))
        plain = OmegaConf.to_container(tree, resolve=True)
    except OSError as e:
        raise ConfigError(
            f"recipe {str(path)!r} cannot be read ({e.strerror or e}): nothing to run. "
            "Give the path of a YAML file; recipes/miniature.yaml is one."
        ) from e
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as e:
        raise ConfigError(
            f"recipe {str(path)!r} is not readable YAML, or an override does not fit it: "
            f"{in_one_line(e)}. Mend that line; recipes/miniature.yaml shows the form. Data are "
            "named in a recipe: data.demonstrations=FILE."
        ) from e
    if not isinstance(plain, dict):
        raise ConfigError(
            f"recipe {str(path)!r} holds no settings. Start from recipes/miniature.yaml."
        )
    return parse_recipe(plain)


def parse_recipe(tree: dict[Any, Any]) -> Recipe:
    """Check a nested dictionary of settings.

    Raises:
        ConfigError: every problem found, one per line.
    """
    recipe: Recipe = validate(Recipe, tree)
    return recipe


def parse_data(tree: dict[str, Any]) -> DataConfig:
    """Check the settings of the section `data` alone; ConfigError as above."""
    settings: DataConfig = validate(DataConfig, tree, prefix=("data",))
    return settings
