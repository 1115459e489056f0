"""The OpenRLHF plugin, called as OpenRLHF 0.11.2 calls it, scoring by a real server."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

import stand_ins
import tiny
from engines import ENGINES, PLUGINS, fresh, use, use_wheels
from serving import expected
from srppo.errors import ConfigError, ServeError

FILE = PLUGINS / "openrlhf.py"
RECIPE = ENGINES.parent / "recipes" / "openrlhf" / "rloo.sh"


@pytest.fixture(params=["stand-in", "wheel"])
def openrlhf(request, monkeypatch) -> ModuleType:
    """The plugin."""
    if request.param == "wheel":
        use_wheels(monkeypatch, "openrlhf")
    else:
        executor = stand_ins.SingleTurnAgentExecutor
        use(monkeypatch, "openrlhf.utils.agent", SingleTurnAgentExecutor=executor)
    return fresh(monkeypatch, "srppo.plugins.openrlhf")


@pytest.fixture
def wheel(monkeypatch) -> None:
    use_wheels(monkeypatch, "openrlhf")


class Engine:
    """Says what it is told to; stands for RolloutRayActor.generate (vllm_engine.py)."""

    def __init__(self, response: list[int], finish_reason: str = "stop") -> None:
        self.output = SimpleNamespace(
            token_ids=response, finish_reason=finish_reason, logprobs=None, text=""
        )
        self.read: list[list[int]] = []

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        self.read.append(prompt_token_ids)
        return SimpleNamespace(outputs=[self.output])


def execute(executor, engine, prompt="a b"):
    """As RolloutRayActor.generate_responses does."""
    return asyncio.run(
        executor.execute(
            prompt=prompt,
            label="",
            sampling_params=SimpleNamespace(max_tokens=8, logprobs=None),
            max_length=32,
            hf_tokenizer=tiny.tokenizer(),
            llm_engine=engine,
            images=None,
        )
    )


def loaded():
    """As `_load_agent_executor` does (openrlhf/trainer/ray/vllm_engine.py)."""
    spec = importlib.util.spec_from_file_location("agent_module", str(FILE))
    agent_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent_module)
    return agent_module.AgentExecutor()


def test_the_agent_scores_the_very_tokens(openrlhf, url):
    engine = Engine([4, 9, 0])
    output = execute(loaded(), engine)
    assert engine.read == [[2, 3]]
    assert output["observation_tokens"] == [2, 3, 4, 9, 0]
    assert output["action_ranges"] == [(2, 5)]
    exact = sum(expected([2, 3], [4, 9, 0]))
    assert output["reward"] == pytest.approx(exact, abs=1e-5)
    assert output["scores"] == output["reward"]
    assert output["extra_logs"] == {
        "coherent_tokens": 3.0,
        "coherent_beyond_10": float(abs(exact) > 10),
    }


def test_rewards_beyond_openrlhfs_clip_are_counted(openrlhf, url):
    response = [9, 11, 13, 15, 17, 19, 21, 23] * 4
    exact = sum(expected([2, 3], response))
    assert abs(exact) > 10  # not a property of the plugin: the case is chosen so
    output = execute(loaded(), Engine(response, finish_reason="length"))
    assert output["reward"] == pytest.approx(exact, abs=1e-4)
    assert output["extra_logs"]["coherent_beyond_10"] == 1.0


def test_a_response_without_its_end_is_refused(openrlhf, url):
    with pytest.raises(ConfigError, match="lack the decision to end"):
        execute(loaded(), Engine([4, 9]))
    cut_off = execute(loaded(), Engine([4, 9], finish_reason="length"))
    assert cut_off["reward"] == pytest.approx(sum(expected([2, 3], [4, 9])), abs=1e-5)


def test_an_error_of_the_server_ends_the_training(openrlhf, url):
    with pytest.raises(ServeError, match="token id 99"):
        execute(loaded(), Engine([99, 0]))


def test_the_form_of_a_file(openrlhf, url):
    """queries and prompts are lists of one (agent.py, _fetch_rewards_via_func)."""
    found = openrlhf.reward_func(["a b c <eos>"], ["a b"], [""])
    exact = sum(expected([2, 3], [4, 0]))
    assert found["rewards"].tolist() == pytest.approx([exact], abs=1e-5)
    assert found["scores"].tolist() == found["rewards"].tolist()


RIGHT = "--reward.clip_range -1000000 1000000 --algo.kl.init_coef 0.5"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", r"--reward.clip_range=\(-10.0, 10.0\)"),
        ("--reward.clip_range -1000000 1000000", "--algo.kl.init_coef=0.01 is the engine's"),
        (f"{RIGHT} --algo.kl.init_coef 0", "without a KL penalty"),
        (f"{RIGHT} --rollout.temperature 0.7", "--rollout.temperature=0.7"),
        (f"{RIGHT} --rollout.top_p 0.9", "--rollout.top_p=0.9"),
        (f"{RIGHT} --algo.advantage.estimator group_norm", "group_norm.*rloo"),
        (f"{RIGHT} --reward.stop_properly_penalty_coef 0.5", "multiplies the reward"),
    ],
)
def test_arguments_that_lead_elsewhere_are_refused(openrlhf, arguments, told):
    with pytest.raises(ConfigError, match=told):
        openrlhf.check_arguments(arguments.split())


def test_other_arguments_are_none_of_our_business(openrlhf):
    openrlhf.check_arguments(
        f"{RIGHT} --actor.model_name_or_path M --train.batch_size 128 --ds.packing_samples "
        "--reward.stop_properly_penalty_coef -1 --algo.advantage.estimator rloo".split()
    )


def test_the_recipe_passes_its_own_checks(openrlhf):
    command = RECIPE.read_text().replace("\\\n", " ").split("srppo.plugins.openrlhf")[-1]
    openrlhf.check_arguments(command.split())


def test_the_launcher_starts_openrlhf_with_the_agent(openrlhf, url, monkeypatch):
    started = []
    monkeypatch.setattr(openrlhf.runpy, "run_module", lambda *a, **k: started.append((a, k)))
    monkeypatch.setattr(sys, "argv", ["here"])
    openrlhf.main(RIGHT.split())
    assert sys.argv == ["train_ppo_ray", "--train.agent_func_path", str(FILE), *RIGHT.split()]
    assert started == [(("openrlhf.cli.train_ppo_ray",), {"run_name": "__main__"})]


# --- the wheel alone -----------------------------------------------------------------------------


def test_defaults_are_those_of_the_wheel(wheel):
    tree = ast.parse((ENGINES / "openrlhf" / "cli" / "train_ppo_ray.py").read_text())
    found = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            # f"--{prefix}.adam.lr" is there for each model
            name = re.sub("^f?'|'$", "", ast.unparse(call.args[0])).replace("{prefix}", "actor")
            found[name] = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("default")
    assert found["--reward.clip_range"] == "(-10, 10)"
    assert found["--algo.kl.init_coef"] == "0.01"
    assert found["--rollout.temperature"] == found["--rollout.top_p"] == "1.0"
    assert found["--algo.advantage.estimator"] == "'gae'"
    assert found["--reward.stop_properly_penalty_coef"] == "None"
    assert {"--train.agent_func_path", "--reward.remote_url"} <= found.keys()
    assert {word for word in RECIPE.read_text().split() if word.startswith("--")} <= {
        *found,
        *("--base", "--sft", "--dtype", "--host", "--token-env", "--no-deps"),  # of srppo and pip
    }


@pytest.fixture
def actor(wheel, monkeypatch):
    """OpenRLHF's own vllm_engine.py; what it would import of vLLM is not installed here, and
    nothing of it is called."""
    use(monkeypatch, "vllm.inputs", TokensPrompt=dict)
    use(monkeypatch, "vllm.utils", random_uuid=str)
    sys.modules["vllm"].SamplingParams = SimpleNamespace
    fresh(monkeypatch, "openrlhf.trainer.ray.vllm_engine")
    return sys.modules["openrlhf.trainer.ray.vllm_engine"]


def test_openrlhfs_own_loader_and_rollout_take_the_agent(actor, url, monkeypatch):
    executor = actor._load_agent_executor(str(FILE))
    rollout = actor.RolloutRayActor.__ray_metadata__.modified_class
    engine = Engine([4, 9, 0])
    engine.executor = executor
    outputs = asyncio.run(
        rollout.generate_responses(
            engine,
            prompt="a b",
            label="",
            sampling_params=SimpleNamespace(max_tokens=8, logprobs=None),
            max_length=32,
            hf_tokenizer=tiny.tokenizer(),
            num_samples=3,
        )
    )
    exact = sum(expected([2, 3], [4, 9, 0]))
    samples = fresh(monkeypatch, "openrlhf.trainer.ppo_utils.samples_generator")
    for output in outputs:
        experience = samples.SamplesGenerator._process_response_into_experience(None, output)
        assert experience.rewards.tolist() == pytest.approx([exact], abs=1e-5)
        assert experience.action_mask[0].sum() == 3


@pytest.mark.parametrize("form", ["file", "http"])
def test_openrlhfs_own_executor_takes_both_text_forms(form, wheel, url, monkeypatch):
    agent = fresh(monkeypatch, "openrlhf.utils.agent")
    remote = str(FILE) if form == "file" else f"{url.rstrip('/')}/openrlhf"
    output = execute(agent.SingleTurnAgentExecutor(remote), Engine([4, 9, 0]), prompt="a b")
    exact = sum(expected([2, 3], [4, 9, 0]))
    (reward,) = output["reward"]
    assert float(reward) == pytest.approx(exact, abs=1e-5)
