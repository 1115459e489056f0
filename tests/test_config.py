"""Recipes: what is read, what it defaults to, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from srppo.config import (
    AuditConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PPOConfig,
    Recipe,
    SFTConfig,
    load_recipe,
    parse_recipe,
)
from srppo.errors import ConfigError

PAPER = {
    "sft.loss": "nll",
    "sft.epochs": 2,
    "sft.batch_size": 128,
    "sft.learning_rate": 1e-5,  # the largest of the four that the paper tries
    "ppo.rollouts_per_step": 1024,
    "ppo.kl_coef": 0.2,  # the other is 0.5
    "ppo.reward": "sum",
}
"""Every default for which the paper gives a value."""

MINIMAL = {
    "name": "test",
    "output_dir": "runs/test-{seed}",
    "model": {"base": "some/model"},
    "data": {"demonstrations": "data.jsonl"},
}


def recipe(**changes) -> Recipe:
    return parse_recipe({**MINIMAL, **changes})


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Write a recipe file; returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def minimal(write):
    return write(
        "name: test\noutput_dir: runs/test-{seed}\nmodel: {base: some/model}\n"
        "data: {demonstrations: data.jsonl}\n"
    )


# --- defaults ------------------------------------------------------------------------------------


def test_defaults_are_the_papers_where_the_paper_gives_them():
    made = recipe().model_dump()
    found = {key: made[key.split(".")[0]][key.split(".")[1]] for key in PAPER}
    assert found == PAPER


def test_what_is_marked_as_the_papers_is_exactly_that_list():
    marked = {
        f"{section}.{key}"
        for section, kind in {"sft": SFTConfig, "ppo": PPOConfig}.items()
        for key, field in kind.model_fields.items()
        if "(paper" in field.description
    }
    assert marked == set(PAPER)


def test_nothing_is_added_to_the_papers_reward_unless_asked_for():
    ppo = recipe().ppo
    assert ppo.token_clip is None
    assert ppo.missing_eos_penalty == 0
    assert ppo.credit == "eos"
    assert ppo.gamma == 1


def test_every_setting_says_what_it_means():
    sections = [SFTConfig, PPOConfig, ModelConfig, DataConfig, AuditConfig, EvalConfig]
    fields = [(k, f) for section in sections for k, f in section.model_fields.items()]
    assert [key for key, field in fields if not field.description] == []


# --- reading -------------------------------------------------------------------------------------


def test_a_minimal_recipe(minimal):
    made = load_recipe(minimal)
    assert made == recipe()
    assert (made.seed, made.controls) == (0, {})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("ppo.kl_coef=0.5", "kl_coef", 0.5),
        ("ppo.learning_rate=1e-5", "learning_rate", 1e-5),  # YAML 1.1 reads this as text
        ("ppo.learning_rate=1E-5", "learning_rate", 1e-5),
        ("ppo.learning_rate=2.e-6", "learning_rate", 2e-6),
        ("ppo.kl_coef=1", "kl_coef", 1.0),
        ("ppo.kl_coef=auto", "kl_coef", "auto"),
        ("ppo.steps=3", "steps", 3),
        ("ppo.steps=null", "steps", None),
        ("ppo.whiten_advantages=false", "whiten_advantages", False),
    ],
)
def test_overrides(override, key, value, minimal):
    assert getattr(load_recipe(minimal, [override]).ppo, key) == value


def test_scientific_notation_without_a_dot_in_a_file(write):
    path = write(
        "name: a\noutput_dir: b\nmodel: {base: c}\ndata: {demonstrations: d}\n"
        "sft: {learning_rate: 5e-6}\n"
    )
    assert load_recipe(path).sft.learning_rate == 5e-6


def test_the_last_of_two_overrides_wins_and_the_file_stays_as_it_is(minimal):
    before = minimal.read_bytes()
    assert load_recipe(minimal, ["seed=1", "seed=2"]).seed == 2
    assert minimal.read_bytes() == before


def test_an_override_can_hold_an_equals_sign_a_colon_and_a_list(minimal):
    made = load_recipe(
        minimal, ["name=a=b", "data.prompts=openai/gsm8k:main", "eval.temperatures=[0, 0.5]"]
    )
    assert (made.name, made.data.prompts[0].source) == ("a=b", "openai/gsm8k:main")
    assert made.eval.temperatures == [0.0, 0.5]


def test_the_seed_goes_into_the_run_directory(minimal):
    assert load_recipe(minimal, ["seed=7"]).run_dir == Path("runs/test-7")
    assert load_recipe(minimal, ["output_dir=~/a-{seed}/b-{seed}"]).run_dir == (
        Path.home() / "a-0" / "b-0"
    )


def test_a_recipe_read_back_from_its_own_dump_is_the_same():
    made = recipe(controls={"more": {"sft": {"epochs": 5}}}, ppo={"kl_coef": 0.5})
    assert parse_recipe(made.model_dump(mode="json")) == made


# --- controls ------------------------------------------------------------------------------------


def test_a_control_changes_what_it_says_and_nothing_else():
    made = recipe(
        sft={"learning_rate": 3e-4}, controls={"more": {"sft": {"epochs": 20}}}, ppo={"steps": 3}
    )
    changed = made.with_control(made.controls["more"])
    assert (changed.sft.epochs, changed.sft.learning_rate) == (20, 3e-4)
    assert changed.ppo == made.ppo
    assert made.sft.epochs == 2


def test_null_controls_are_none_at_all(minimal):
    made = load_recipe(minimal, ["controls.more.sft.epochs=5"])
    assert list(made.controls) == ["more"]
    assert recipe(controls=None).controls == {}
    assert load_recipe(minimal, ["controls=null"]).controls == {}


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"x": {"sft": {"epoch": 5}}}, "controls.x.sft.epoch: no such setting; it would have no"),
        ({"x": {"sft": {"epoch": 5}}}, "Did you mean 'epochs'?"),
        ({"x": {"pp": {"steps": 5}}}, "controls.x.pp: no such setting"),
        ({"x": {"pp": {"steps": 5}}}, "Did you mean 'ppo'?"),
        ({"x": {"sft": {"epochs": "two"}}}, "controls.x.sft.epochs='two'"),
        ({"x": {"ppo": {"estimator": "rloo"}}}, "Set ppo.responses_per_prompt=4."),
        ({"x": {}}, "Give exactly one of sft, ppo, pairs, extrapolate, extrapolate_weights"),
        ({"x": {"pairs": {"loss": "dpo"}}}, "controls.x.pairs.loss='dpo'"),
        ({"x": {"pairs": {"round": 2}}}, "Did you mean 'rounds'?"),
        ({"x": {"pairs": {"shift": float("nan")}}}, "controls.x.pairs.shift=nan"),
        ({"x": {"extrapolate_weights": -1.0}}, "controls.x.extrapolate_weights=-1.0"),
        ({"x": {"sft": {"loss": "iwsft"}}}, "controls.x.sft.loss='iwsft'"),
        ({"x": {"sft": {}, "against": "halfway"}}, "against=halfway changes the reward of stage 2"),
        ({"x": {"sft": {}, "extrapolate": 2.0}}, "gives sft and extrapolate"),
        ({"x": {"extrapolate": 0.0}}, "controls.x.extrapolate=0.0"),
        ({"x": 5}, "controls.x=5: a group of settings, not a value"),
        ({"policy": {"extrapolate": 2.0}}, "controls.policy: the run's own model has that name"),
        ({"../x": {"extrapolate": 2.0}}, "should match pattern"),
    ],
)
def test_controls_that_are_refused(controls, words):
    assert words in refusal(controls=controls)


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"sft": {}}, "controls.x.sft trains on demonstrations"),
        ({"pairs": {}}, "controls.x.pairs trains on demonstrations"),
        ({"ppo": {}, "against": "halfway"}, "controls.x.against trains on demonstrations"),
    ],
)
def test_controls_that_need_demonstrations_are_refused_without(control, words):
    model = {"base": "m", "sft": "s"}
    data = {"demonstrations": None, "prompts": "p"}
    assert words in refusal(model=model, data=data, controls={"x": control})


def test_weights_of_an_adapter_are_not_extrapolated():
    said = refusal(
        model={"base": "m", "lora": {"rank": 4}}, controls={"x": {"extrapolate_weights": 0.5}}
    )
    assert "controls.x.extrapolate_weights with model.lora" in said


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": {"kl_coeff": 0.5}}, "ppo.kl_coeff: no such setting; it would have no effect. "),
        ({"ppo": {"kl_coeff": 0.5}}, "Did you mean 'kl_coef'?"),
        ({"pppo": {}}, "Did you mean 'ppo'?"),
        ({"audit": {"zzz": 1}}, "Known here: prompts."),
        ({"ppo": {"kl_coef": "high"}}, "ppo.kl_coef='high': input should be a valid number"),
        ({"ppo": {"steps": 2.5}}, "ppo.steps=2.5: input should be a valid integer"),
        ({"ppo": {"steps": True}}, "ppo.steps=True: input should be a valid integer"),
        ({"ppo": {"kl_coef": 0}}, "ppo.kl_coef=0: input should be greater than 0"),
        ({"ppo": {"kl_coef": float("inf")}}, "ppo.kl_coef=inf"),
        ({"ppo": {"kl_coef": float("nan")}}, "ppo.kl_coef=nan"),
        ({"ppo": {"gamma": 1.5}}, "ppo.gamma=1.5: input should be less than or equal to 1"),
        ({"ppo": {"estimator": "grpo"}}, "input should be 'ppo', 'rloo' or 'all_action'"),
        ({"eval": {"temperatures": [-1.0]}}, "eval.temperatures.0=-1.0"),
        ({"eval": {"temperatures": []}}, "eval.temperatures=[]: list should have at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296: input should be less than 4294967296"),
        ({"name": 5}, "name=5: input should be a valid string"),
        ({"ppo": 5}, "ppo=5: a group of settings, not a value. Set ppo.something."),
        ({"ppo": None}, "ppo=None: a group of settings, not a value."),
        ({"model": {}}, "model.base: missing, and it has no default. Add it to the recipe."),
    ],
)
def test_keys_and_types_that_are_refused(changes, words):
    assert words in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": {"estimator": "rloo"}}, "Set ppo.responses_per_prompt=4."),
        ({"ppo": {"kl_coef": "auto", "reward": "mean"}}, "Set ppo.kl_coef=0.5, say."),
        (
            {"ppo": {"kl_coef": "auto", "plausibility": 0.1, "kl_ref": "base"}},
            "Set ppo.kl_coef=0.5, say.",
        ),
        ({"ppo": {"plausibility": 1.5}}, "ppo.plausibility=1.5"),
        ({"ppo": {"responses_per_prompt": 3}}, "Try ppo.rollouts_per_step=1023."),
        ({"ppo": {"rollouts_per_step": 2, "responses_per_prompt": 3}}, "rollouts_per_step=3."),
        ({"sft": {"batch_size": 30, "micro_batch_size": 8}}, "Try micro_batch_size=2."),
        ({"data": {}}, "neither data.demonstrations nor model.sft is set"),
        ({"data": {}, "model": {"base": "a", "sft": "b"}}, "Set data.prompts."),
    ],
)
def test_combinations_that_are_refused_name_a_cure_that_works(changes, words):
    assert words in refusal(**changes)


def test_the_cures_cure():
    recipe(ppo={"estimator": "rloo", "responses_per_prompt": 4})
    recipe(ppo={"responses_per_prompt": 3, "rollouts_per_step": 1023})
    recipe(ppo={"responses_per_prompt": 3, "rollouts_per_step": 3})
    recipe(sft={"batch_size": 30, "micro_batch_size": 2})
    recipe(data={"prompts": "p.jsonl"}, model={"base": "a", "sft": "b"})
    recipe(sft={"batch_size": 5, "micro_batch_size": 8})  # one forward pass holds the batch


def test_all_problems_are_told_at_once_one_a_line():
    lines = refusal(ppo={"kl_coef": "x", "gama": 1.0}, sft={"epochs": 0}).splitlines()
    assert sorted(line.split("=")[0].split(":")[0] for line in lines) == [
        "ppo.gama",
        "ppo.kl_coef",
        "sft.epochs",
    ]


@pytest.mark.parametrize("override", ["ppo.kl_coef", "=0.5", ""])
def test_an_override_without_key_or_value_is_refused(override, minimal):
    with pytest.raises(ConfigError, match=r"not of the form key=value.*ppo\.kl_coef=0\.5"):
        load_recipe(minimal, [override])


@pytest.mark.parametrize(
    "override", ["name=[a", "name=${nowhere}", "eval.temperatures.0=0.7", "ppo.kl_coef="]
)
def test_an_override_that_does_not_fit_is_refused(override, minimal):
    with pytest.raises(ConfigError):
        load_recipe(minimal, [override])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# only a comment\n",
        b"just words\n",
        b"- a\n- list\n",
        b"name: [1\n",
        b"[",
        "name: \u2028{".encode(),
        b"name:\n\tbase: a tab\n",
        b"name: a\nname: b\n",
        b"\xff\xfe\x00\xd8",
        b"name: ${nowhere}\n",
        b"1: a number as key\n",
        b"name: " + b"[" * 3000 + b"]" * 3000,
    ],
)
def test_files_that_hold_no_recipe(content, write):
    with pytest.raises(ConfigError):
        load_recipe(write(content))


def test_an_empty_file_says_what_is_missing(write):
    with pytest.raises(ConfigError, match=r"(?s)name: missing.*output_dir: missing.*model: miss"):
        load_recipe(write(""))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file.*Give the path of a"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        load_recipe(tmp_path)


# --- frozen --------------------------------------------------------------------------------------


def test_a_recipe_cannot_be_changed():
    made = recipe()
    for section, key in [(made, "seed"), (made.ppo, "kl_coef"), (made.model, "base")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_offload_is_refused_where_a_control_is_all_action():
    tree = {
        "name": "x",
        "output_dir": "runs/x",
        "model": {"base": "srppo:miniature", "offload": True},
        "data": {"demonstrations": "d.jsonl"},
        "controls": {"exact": {"ppo": {"estimator": "all_action"}}},
    }
    with pytest.raises(ConfigError, match=r"model\.offload with"):
        parse_recipe(tree)


@pytest.mark.parametrize(
    "control",
    [
        {"ppo": {}, "against": "halfway"},
        {"ppo": {"plausibility": 0.1}},
        {"ppo": {"token_clip": 1.0, "kl_coef": "auto"}},
    ],
)
def test_auto_is_refused_where_the_audit_is_of_another_reward(control):
    tree = {
        "name": "x",
        "output_dir": "runs/x",
        "model": {"base": "srppo:miniature"},
        "data": {"demonstrations": "d.jsonl"},
        "ppo": {"kl_coef": "auto"},
        "controls": {"other": control},
    }
    with pytest.raises(
        ConfigError, match=r"controls\.other with kl_coef=auto.*controls\.other\.ppo"
    ):
        parse_recipe(tree)
    control["ppo"]["kl_coef"] = 0.5
    parse_recipe(tree)
