"""The verl plugin, called as verl 0.9.1 calls it, scoring by a real server."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from types import ModuleType

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import stand_ins
import tiny
from engines import ENGINES, fresh, use, use_wheels
from serving import expected, pairs
from srppo.errors import ConfigError, ServeError

DEFAULTS = {
    "actor_rollout_ref": {
        "actor": {"use_kl_loss": False, "kl_loss_coef": 0.001},
        "rollout": {"temperature": 1.0, "top_k": -1, "top_p": 1},
    },
    "algorithm": {
        "adv_estimator": "gae",
        "norm_adv_by_std_in_grpo": True,
        "use_kl_in_reward": False,
        "kl_ctrl": {"kl_coef": 0.001},
    },
    "reward": {
        "custom_reward_function": {"path": None, "name": "compute_score"},
        "reward_manager": {"source": "register", "name": "naive", "module": {"path": None}},
        "reward_model": {"enable": False, "enable_resource_pool": False},
    },
}
"""What the plugin looks at of verl/trainer/config/_generated_ppo_trainer.yaml, with its values."""
PLUGIN = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=CoherentRewardManager",
    "reward.reward_manager.module.path=pkg://srppo.plugins.verl",
]
KL = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.5"]
AFTERWARDS = [
    "reward.reward_model.enable=True",
    "reward.custom_reward_function.path=pkg://verl.utils.reward_score",
    "reward.custom_reward_function.name=default_compute_score",
]
"""verl collects rewards after sampling, not along with it."""


@pytest.fixture(params=["stand-in", "wheel"])
def engine(request) -> str:
    return request.param


@pytest.fixture
def verl(engine, monkeypatch) -> ModuleType:
    """The plugin."""
    if engine == "wheel":
        use_wheels(monkeypatch, "verl")
    else:
        base = stand_ins.RewardManagerBase
        use(
            monkeypatch,
            "verl.experimental.reward_loop.reward_manager.base",
            RewardManagerBase=base,
        )
    return fresh(monkeypatch, "srppo.plugins.verl")


def config(engine: str, *settings: str):
    whole = DEFAULTS
    if engine == "wheel":
        whole = OmegaConf.load(ENGINES / "verl/trainer/config/_generated_ppo_trainer.yaml")
    return OmegaConf.merge(whole, OmegaConf.from_dotlist([*PLUGIN, *settings]))


def manager(verl: ModuleType, engine: str, *settings: str):
    """As `load_reward_manager` does (verl/trainer/ppo/reward.py)."""
    rest = {"reward_router_address": None, "reward_model_tokenizer": None}
    if engine == "wheel":
        from verl.trainer.ppo.reward import load_reward_manager

        return load_reward_manager(config(engine, *settings), tiny.tokenizer(), **rest)
    return verl.CoherentRewardManager(
        config=config(engine, *settings), tokenizer=None, compute_score=None, **rest
    )


def data(engine: str, rows, streamed: bool = False):
    """Prompts padded on the left, responses on the right (ray_trainer.py, and v1); `streamed`: as
    `_compute_score` of verl/experimental/agent_loop/agent_loop.py pads several sequences."""
    P, R = (max(len(row[k]) for row in rows) for k in (0, 1))
    prompts = torch.full((len(rows), P), 7)
    responses = torch.full((len(rows), R), 7)
    mask = torch.zeros(len(rows), P + R, dtype=torch.int64)
    for i, (prompt, response) in enumerate(rows):
        n, m = len(prompt), len(response)
        if streamed:
            prompts[i, :n] = torch.tensor(prompt)
            mask[i, : n + m] = 1
        else:
            prompts[i, P - n :] = torch.tensor(prompt)
            mask[i, P - n : P + m] = 1
        responses[i, :m] = torch.tensor(response)
    batch = {"prompts": prompts, "responses": responses, "attention_mask": mask}
    others = {"__num_turns__": np.array([2] * len(rows))}
    if streamed:
        others["prompt_len"] = np.array([len(prompt) for prompt, _ in rows])
        others["response_len"] = np.array([len(response) for _, response in rows])
    if engine == "wheel":
        from tensordict import TensorDict
        from verl import DataProto

        return DataProto(batch=TensorDict(batch, batch_size=len(rows)), non_tensor_batch=others)
    return stand_ins.Data(batch, others)


def run_all(manager, batch):
    """As RewardLoopWorker.compute_score_batch (verl/experimental/reward_loop/reward_loop.py)."""

    async def run():
        return await asyncio.gather(
            *(manager.run_single(batch[i : i + 1]) for i in range(len(batch)))
        )

    return asyncio.run(run())


def test_each_response_is_worth_the_sum_of_its_tokens(verl, engine, url):
    rows = pairs()
    outputs = run_all(manager(verl, engine, *KL), data(engine, rows))
    for (prompt, response), output in zip(rows, outputs, strict=True):
        exact = sum(expected(prompt, response))
        assert output["reward_score"] == pytest.approx(exact, abs=1e-5)
        assert output["reward_extra_info"] == {
            "coherent": output["reward_score"],
            "coherent_tokens": len(response),
        }


def test_streamed_sequences_count_the_last(verl, engine, url):
    rows = pairs(4)
    made = manager(verl, engine, *KL)
    output = asyncio.run(made.run_single(data(engine, rows, streamed=True)))
    assert output["reward_score"] == pytest.approx(sum(expected(*rows[-1])), abs=1e-5)


@pytest.mark.parametrize("settings", [[], AFTERWARDS], ids=["along", "afterwards"])
def test_rewards_lie_where_verl_puts_them(settings, verl, engine, url):
    """As RewardLoopManager.compute_rm_score does: one number at the last token, or one each."""
    rows = pairs()
    batch = data(engine, rows)
    made = manager(verl, engine, *KL, *settings)
    scores = [output["reward_score"] for output in run_all(made, batch)]
    found = verl.CoherentRewardManager.assemble_rm_scores(batch, scores)
    assert found.dtype == torch.float32
    for row, (prompt, response) in zip(found, rows, strict=True):
        exact = torch.zeros(found.shape[1])
        ratios = torch.tensor(expected(prompt, response))
        if settings:
            exact[: len(ratios)] = ratios
        else:
            exact[len(ratios) - 1] = ratios.sum()
        torch.testing.assert_close(row, exact, atol=1e-5, rtol=0)


def test_responses_of_several_turns_are_refused(verl, engine, url):
    batch = data(engine, pairs(1))
    batch.non_tensor_batch["__num_turns__"] = np.array([4])
    with pytest.raises(ConfigError, match="4 turns"):
        run_all(manager(verl, engine, *KL), batch)


def test_an_error_of_the_server_is_told(verl, engine, url):
    with pytest.raises(ServeError, match="token id 99"):
        run_all(manager(verl, engine, *KL), data(engine, [([1], [99])]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "without a KL penalty"),
        (["algorithm.use_kl_in_reward=True"], "kl_coef=0.001 is the engine's default"),
        (["actor_rollout_ref.actor.use_kl_loss=True"], "kl_loss_coef=0.001 is the engine's"),
        ([*KL, "actor_rollout_ref.rollout.temperature=0.7"], "rollout.temperature=0.7"),
        ([*KL, "actor_rollout_ref.rollout.top_k=50"], "rollout.top_k=50"),
        ([*KL, "algorithm.adv_estimator=grpo"], "norm_adv_by_std_in_grpo=True"),
        ([*KL, "reward.reward_model.enable=True"], "never this manager"),
    ],
)
def test_settings_that_lead_elsewhere_are_refused(settings, told, verl, engine, url):
    with pytest.raises(ConfigError, match=told):
        manager(verl, engine, *settings)


def test_the_recipe_passes_its_own_checks(verl, engine, url):
    recipe = (ENGINES.parent / "recipes" / "verl" / "rloo.sh").read_text().replace("\\\n", " ")
    given = [word for word in recipe.split() if "=" in word and word.split(".")[0] in DEFAULTS]
    assert set(PLUGIN) <= set(given)
    verl.check_settings(config(engine, *given))


# --- the wheel alone -----------------------------------------------------------------------------


def test_what_the_plugin_looks_at_is_as_in_the_wheel(monkeypatch):
    use_wheels(monkeypatch, "verl")

    def compare(ours, theirs, place=""):
        for key, value in ours.items():
            if isinstance(value, dict):
                compare(value, theirs[key], f"{place}{key}.")
            else:
                assert theirs[key] == value, f"{place}{key}"

    compare(DEFAULTS, OmegaConf.load(ENGINES / "verl/trainer/config/_generated_ppo_trainer.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], AFTERWARDS], ids=["along", "afterwards"])
def test_verls_own_reward_loop_runs_it_in_rays_workers(
    settings, server, monkeypatch, tmp_path, url
):
    """RewardLoopManager.compute_rm_score, its workers real processes. Where verl would first start
    a reward model on a GPU, the manager is made without one and told so afterwards."""
    use_wheels(monkeypatch, "verl")
    import ray
    from verl.experimental.reward_loop import reward_loop

    tiny.tokenizer().save_pretrained(tmp_path)
    rows = pairs(6)
    made = config(
        "wheel", *KL, *settings, "reward.num_workers=2",
        f"actor_rollout_ref.model.path={tmp_path}",
        f"reward.reward_model.model_path={tmp_path}",
    )  # fmt: skip
    monkeypatch.setattr(reward_loop, "RewardModelManager", lambda *_: NoRewardModel())
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))  # of the workers
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home directory
    place = tempfile.mkdtemp(prefix="ray")  # short: sockets lie there
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=place)
    try:
        manager = reward_loop.RewardLoopManager(made)
        assert (manager.reward_loop_worker_handles is None) == bool(settings)
        found = manager.compute_rm_score(data("wheel", rows)).batch["rm_scores"]
    finally:
        ray.shutdown()
        shutil.rmtree(place)
    for row, (prompt, response) in zip(found, rows, strict=True):
        ratios = torch.tensor(expected(prompt, response))
        exact = torch.zeros(found.shape[1])
        if settings:
            exact[: len(ratios)] = ratios
        else:
            exact[len(ratios) - 1] = ratios.sum()
        torch.testing.assert_close(row, exact, atol=1e-5, rtol=0)


class NoRewardModel:
    """What stands for verl's reward model on a GPU, which it wakes and puts to sleep."""

    def get_router_address(self):
        return None

    def wake_up(self):
        pass

    def sleep(self):
        pass
