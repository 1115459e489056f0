"""Settings of the rollout engine: defaults that change nothing, and what is refused."""

import pytest

from srppo.config import Recipe, parse_recipe
from srppo.config_rollout import RolloutConfig
from srppo.errors import ConfigError

MINIMAL = {
    "name": "test",
    "output_dir": "runs/test-{seed}",
    "model": {"base": "some/model"},
    "data": {"demonstrations": "data.jsonl"},
}
URL = "http://127.0.0.1:8000"


def recipe(rollout, **model) -> Recipe:
    tree = {**MINIMAL, "model": {**MINIMAL["model"], **model}}
    return parse_recipe({**tree, "rollout": rollout})


def test_without_the_section_transformers_samples_and_nothing_is_weighed():
    settings = parse_recipe(MINIMAL).rollout
    assert settings == RolloutConfig()
    assert (settings.engine, settings.importance_cap, settings.url) == ("transformers", None, None)


@pytest.mark.parametrize(
    "rollout",
    [
        {"engine": "vllm", "url": URL},
        {"engine": "vllm", "url": "https://gpu-7.example/inside/", "weight_transfer": "nccl"},
        {"engine": "continuous", "importance_cap": 2.0},
        {"engine": "vllm", "url": URL, "weight_directory": "/dev/shm"},
    ],
)
def test_possible_settings(rollout):
    assert recipe(rollout).rollout.engine == rollout["engine"]


@pytest.mark.parametrize(
    ("rollout", "model", "words"),
    [
        ({"engine": "vllm"}, {}, ["engine=vllm without url", "rollout.url=http://127.0.0.1:8000"]),
        ({"engine": "vllm", "url": "127.0.0.1:8000"}, {}, ["'127.0.0.1:8000'", "no http address"]),
        ({"url": URL}, {}, [URL, "engine=transformers", "rollout.engine=vllm"]),
        (
            {"engine": "vllm", "url": URL, "weight_directory": "weights"},
            {},
            ["weight_directory='weights'", "absolute"],
        ),
        ({"engine": "sglang"}, {}, ["rollout.engine='sglang'", "'vllm'"]),
        ({"importance_cap": 0.0}, {}, ["rollout.importance_cap=0.0"]),
        ({"engines": "vllm"}, {}, ["rollout.engines", "Did you mean 'engine'"]),
        ({"engine": "continuous"}, {"shard": True}, ["rollout.engine=continuous", "model.shard"]),
        (
            {"engine": "vllm", "url": URL, "weight_transfer": "nccl"},
            {"lora": {"rank": 4}},
            ["rollout.weight_transfer=nccl", "model.lora", "Leave weight_transfer out"],
        ),
    ],
)
def test_refusals_name_the_setting_and_the_cure(rollout, model, words):
    with pytest.raises(ConfigError) as caught:
        recipe(rollout, **model)
    for word in words:
        assert word in str(caught.value)
