"""Sampling by a vLLM server, over real HTTP: the stand-in has a tiny real model."""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastapi import HTTPException

import tiny
from enumerable import EOS, tiny_llama
from srppo.config import LoRAConfig
from srppo.config_rollout import RolloutConfig
from srppo.errors import EngineError
from srppo.models.lora import Backbone
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.rollout.transfer import NCCL, Disk
from srppo.rollout.vllm import VLLMSampler
from srppo.rollout.vllm_server import KEY, VLLMServer
from vllm_stand_in import Gloo, StandIn, serving

PROMPTS = tiny.sequences(seed=5, n=10).prompt_ids
LONGEST = 6


@pytest.fixture
def state():
    return StandIn(tiny.model(seed=3))


@pytest.fixture
def url(state):
    with serving(state) as address:
        yield address


def sampler_of(url, tmp_path, policy=None, **settings):
    settings = {"patience": 2.0, "weight_dtype": "float32", **settings}
    return VLLMSampler(
        policy or Role(tiny.model(seed=0)),
        RolloutConfig(engine="vllm", url=url, **settings),
        tmp_path / "weights",
        eos_token_id=EOS,
        max_new_tokens=LONGEST,
        longest=20,
    )


def rounded_to(dtype, model):
    """Its parameters; a rotary embedding's frequencies are none."""
    rounded = copy.deepcopy(model)
    for p in rounded.parameters():
        p.data = p.data.to(dtype).float()
    return rounded


def rows(rollout):
    return [tiny.row(rollout.sequences, i)[1] for i in range(len(rollout.sequences))]


# --- what comes back ------------------------------------------------------------------------------


def test_responses_are_the_policys_and_so_are_their_logprobs(url, tmp_path):
    """The server was started with another model: what it samples with has been handed over."""
    policy = Role(tiny.model(seed=0))
    sampler = sampler_of(url, tmp_path, policy)
    sampler.update_weights()
    rollout = sampler.sample(PROMPTS, seed=1)
    y = rollout.sequences
    assert y.prompt_ids == PROMPTS
    torch.testing.assert_close(rollout.logprobs, score(policy, y, 1000), atol=1e-5, rtol=0)
    assert not rollout.exact
    for response, ended in zip(rows(rollout), rollout.ended.tolist(), strict=True):
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == ended
        assert ended or len(response) == LONGEST
    assert 0 < rollout.ended.sum() < len(y)


def test_a_seed_decides_the_responses_and_equal_prompts_get_their_own(url, tmp_path):
    sampler = sampler_of(url, tmp_path, concurrency=3)
    sampler.update_weights()
    first = rows(sampler.sample([[1, 2]] * 12, seed=4))
    assert rows(sampler.sample([[1, 2]] * 12, seed=4)) == first
    assert rows(sampler.sample([[1, 2]] * 12, seed=5)) != first
    assert len(set(map(tuple, first))) > 6


def test_the_whole_distribution_is_asked_for(url, state, tmp_path):
    """Nothing is left to the server's defaults, which come from the model's own directory."""
    sampler = sampler_of(url, tmp_path)
    sampler.update_weights()
    sampler.sample([[1, 2, 3]], seed=0)
    (request,) = state.requests
    assert request["prompt"] == [1, 2, 3]
    asked = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [EOS],
        "ignore_eos": True,
        "max_tokens": LONGEST,
        "add_special_tokens": False,
        "skip_special_tokens": False,
    }
    assert {key: request[key] for key in asked} == asked


# --- weights --------------------------------------------------------------------------------------


def test_each_update_is_what_is_sampled_from(url, tmp_path):
    policy = Role(tiny.model(seed=0))
    sampler = sampler_of(url, tmp_path, policy)
    for seed in range(3):
        policy.model.load_state_dict(tiny.model(seed=seed).state_dict())
        sampler.update_weights()
        rollout = sampler.sample(PROMPTS, seed=1)
        expected = score(tiny.model(seed=seed), rollout.sequences, 1000)
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-5, rtol=0)


def test_bfloat16_weights_are_rounded_once(url, tmp_path):
    policy = Role(tiny.model(seed=0))
    sampler = sampler_of(url, tmp_path, policy, weight_dtype="bfloat16")
    sampler.update_weights()
    rollout = sampler.sample(PROMPTS, seed=1)
    rounded = rounded_to(torch.bfloat16, policy.model)
    torch.testing.assert_close(
        rollout.logprobs, score(rounded, rollout.sequences, 1000), atol=1e-5, rtol=0
    )
    assert policy.model.dtype == torch.float32


def test_an_adapter_goes_alone(url, state, tmp_path):
    backbone = Backbone(copy.deepcopy(state.first), LoRAConfig(rank=2), seed=0)
    policy = backbone.new()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.1)
    sampler = sampler_of(url, tmp_path, policy)
    sampler.update_weights()
    rollout = sampler.sample(PROMPTS, seed=1)
    y = rollout.sequences
    torch.testing.assert_close(rollout.logprobs, score(policy, y, 1000), atol=1e-4, rtol=0)
    apart = (rollout.logprobs - score(backbone.bare(), y, 1000)).abs().max()
    assert apart > 0.01
    assert "/collective_rpc" not in state.sequence
    assert not list((tmp_path / "weights").glob("model*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nccls_protocol_with_gloo_in_its_place(url, state, tmp_path, dtype):
    """The calls and the order of the broadcasts are vLLM's; only the library below is another."""
    policy = Role(tiny.model(seed=0))
    sampler = sampler_of(url, tmp_path, policy)
    sampler._transfer = NCCL(dtype, nccl=Gloo)
    for seed in range(2):
        policy.model.load_state_dict(tiny.model(seed=seed).state_dict())
        sampler.update_weights()
        rollout = sampler.sample(PROMPTS, seed=1)
        rounded = rounded_to(dtype, policy.model)
        expected = score(rounded, rollout.sequences, 1000)
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-5, rtol=0)
    weights = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    after = ["/update_weight_version", "/reset_prefix_cache", "/resume", "/weight_info"]
    once = ["/pause", *weights, *after]
    opening = ["/get_world_size", "/init_weight_transfer_engine"]
    assert state.sequence[2:] == ["/pause", *opening, *weights, *after, *once]


def test_a_server_that_refuses_weights_is_told_though_our_end_waits(url, state, tmp_path):
    def never(*args: Any) -> None:
        time.sleep(3600)

    sampler = sampler_of(url, tmp_path)
    waiting = type("Waiting", (Gloo,), {"init_rank": staticmethod(never)})
    sampler._transfer = NCCL(torch.float32, nccl=waiting)
    refusal = HTTPException(500, "Weight transfer not configured")
    state.refuses["/init_weight_transfer_engine"] = refusal
    with pytest.raises(EngineError, match="not configured"):
        sampler.update_weights()


def test_a_server_on_the_same_gpu_sleeps_while_the_policy_trains(url, state, tmp_path):
    sampler = sampler_of(url, tmp_path, sleep=True)
    sampler.wake()
    sampler.update_weights()
    sampler.sample(PROMPTS, seed=1)
    assert not state.asleep
    sampler.sleep()
    assert state.asleep
    sampler.wake()
    assert not state.asleep


def test_without_the_setting_it_never_sleeps(url, state, tmp_path):
    sampler = sampler_of(url, tmp_path)
    sampler.wake()
    sampler.sleep()
    assert not {"/sleep", "/wake_up"} & set(state.sequence)


def test_the_directory_holds_one_checkpoint_and_goes_at_the_end(url, tmp_path):
    sampler = sampler_of(url, tmp_path)
    for _ in range(2):
        sampler.update_weights()
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 1
    sampler.close()
    assert not (tmp_path / "weights").exists()


def test_a_directory_that_cannot_be_written_is_named(url, tmp_path):
    (tmp_path / "file").write_text("")
    sampler = sampler_of(url, tmp_path)
    sampler._transfer = Disk(tmp_path / "file" / "weights", torch.float32)
    with pytest.raises(EngineError, match=r"cannot be written to .*file/weights.*weight_directory"):
        sampler.update_weights()


# --- servers that do not fit ----------------------------------------------------------------------


def test_an_old_version_is_refused(url, state, tmp_path):
    state.version = "0.29.1"
    with pytest.raises(EngineError, match=rf"{url} runs vLLM 0\.29\.1.*Install vLLM 0\.32"):
        sampler_of(url, tmp_path)


def test_too_little_room_is_refused(url, state, tmp_path):
    state.room = 19
    with pytest.raises(EngineError, match=r"at most 19 tokens.*--max-model-len 20"):
        sampler_of(url, tmp_path)


def test_no_server_at_all(tmp_path):
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 does not answer.*rollout\.url"):
        sampler_of("http://127.0.0.1:9", tmp_path, patience=0.1)
    assert time.monotonic() - started < 60


def test_a_server_that_comes_late_is_waited_for(state, tmp_path):
    import socket
    import threading

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leave = threading.Event()

    def late():
        time.sleep(1.5)
        with serving(state, port):
            leave.wait()

    thread = threading.Thread(target=late)
    thread.start()
    try:
        assert sampler_of(f"http://127.0.0.1:{port}", tmp_path, patience=60).model == "tiny"
    finally:
        leave.set()
        thread.join()


def test_what_is_no_vllm_server_is_told(url, state, tmp_path):
    state.spoil = lambda path, answer: ["something else"]
    with pytest.raises(EngineError, match=r"not vLLM's JSON.*rollout\.url"):
        sampler_of(url, tmp_path)


def test_a_server_without_the_training_api_says_how_to_start_it(url, state, tmp_path):
    state.refuses["/pause"] = HTTPException(404)
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        sampler_of(url, tmp_path).update_weights()


def test_the_key_is_sent_and_never_repeated(url, state, tmp_path, monkeypatch):
    state.refuses["/version"] = HTTPException(401, "no")
    monkeypatch.setenv(KEY, "secret-key")
    with pytest.raises(EngineError, match=KEY) as e:
        sampler_of(url, tmp_path)
    assert "secret-key" not in str(e.value)
    client = VLLMServer(RolloutConfig(engine="vllm", url=url))._client()
    assert client.headers["authorization"] == "Bearer secret-key"
    asyncio.run(client.aclose())


def test_prefixes_that_cannot_be_forgotten_are_refused(url, state, tmp_path):
    state.spoil = lambda path, x: {"success": False} if path == "/reset_prefix_cache" else x
    with pytest.raises(EngineError, match="--no-enable-prefix-caching"):
        sampler_of(url, tmp_path).update_weights()


# --- responses that cannot be trained on ----------------------------------------------------------


def spoiled(change: Callable[[dict[str, Any]], None]) -> Callable[[str, Any], Any]:
    """One response of many is changed."""
    count = itertools.count()

    def spoil(path, answer):
        if path == "/v1/completions" and next(count) == 6:
            change(answer["choices"][0])
        return answer

    return spoil


def ids(*given: int) -> Callable[[dict[str, Any]], None]:
    return lambda c: c.update(
        token_ids=list(given), logprobs={"token_logprobs": [-1.0] * len(given)}
    )


SPOILED = {
    "an id outside": (ids(5, tiny.VOCAB), r"id 24, and the policy's vocabulary has 24"),
    "a negative id": (ids(-1, EOS), "id -1"),
    "no ids": (lambda c: c.update(token_ids=None), "has no tokens"),
    "no tokens": (ids(), "has 0 tokens"),
    "too many tokens": (ids(*[5] * 7), "has 7 tokens, not 1 to 6"),
    "an early stop": (ids(5, 6), "stops after 2 tokens without an end"),
    "an end inside": (ids(5, EOS, 6, 6, 6, 6), "goes on after its end"),
    "fewer logprobs": (
        lambda c: c["logprobs"]["token_logprobs"].append(-1.0),
        "log-probabilities",
    ),
    "no logprobs": (lambda c: c.update(logprobs=None), "lacks what vLLM's API promises"),
    "minus infinity": (
        lambda c: c["logprobs"].update(token_logprobs=[-9999.0] * len(c["token_ids"])),
        "log-probability -9999",
    ),
    "null": (
        lambda c: c["logprobs"].update(token_logprobs=[None] * len(c["token_ids"])),
        "log-probability None",
    ),
    "a probability above one": (
        lambda c: c["logprobs"].update(token_logprobs=[0.5] * len(c["token_ids"])),
        "log-probability 0.5",
    ),
    "another prompt": (
        lambda c: c.update(prompt_token_ids=[1, *c["prompt_token_ids"]]),
        "is to a prompt of",
    ),
    "no such field": (lambda c: c.pop("token_ids"), "token_ids"),
}


@pytest.mark.parametrize("kind", list(SPOILED))
def test_one_bad_response_among_many_ends_the_step(url, state, tmp_path, kind):
    change, said = SPOILED[kind]
    sampler = sampler_of(url, tmp_path)
    sampler.update_weights()
    state.spoil = spoiled(change)
    with pytest.raises(EngineError, match=said) as e:
        sampler.sample(PROMPTS, seed=1)
    assert url in str(e.value)


def test_a_model_with_a_larger_vocabulary_is_noticed(tmp_path):
    state = StandIn(tiny.model(seed=0))
    with serving(state) as url:
        sampler = sampler_of(url, tmp_path, Role(tiny_llama(seed=0)))
        sampler.label = state.label = "as it was started"
        with pytest.raises(EngineError, match=r"vocabulary has 8.*Does it serve the policy's"):
            sampler.sample([[1], [2]] * 8, seed=0)


# --- failures on the way --------------------------------------------------------------------------


def failing(times: int, status: int) -> Callable[[str, Any], Any]:
    count = itertools.count()

    def spoil(path, answer):
        if path == "/v1/completions" and next(count) < times:
            raise HTTPException(status, "out of order")
        return answer

    return spoil


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for_with_the_same_responses(url, state, tmp_path, status):
    sampler = sampler_of(url, tmp_path, patience=30)
    sampler.update_weights()
    expected = rows(sampler.sample(PROMPTS, seed=1))
    state.spoil = failing(3, status)
    assert rows(sampler.sample(PROMPTS, seed=1)) == expected


@pytest.mark.parametrize(("status", "patience"), [(500, 0.1), (400, 60.0)])
def test_what_stays_is_told_and_a_refusal_at_once(url, state, tmp_path, status, patience):
    sampler = sampler_of(url, tmp_path, patience=patience)
    sampler.update_weights()
    state.spoil = failing(10**6, status)
    with pytest.raises(EngineError, match=rf"/v1/completions with {status}.*out of order"):
        sampler.sample(PROMPTS, seed=1)
    assert status == 500 or len(state.requests) < 2 * len(PROMPTS)


def test_changes_of_the_server_are_never_repeated(url, state, tmp_path):
    sampler = sampler_of(url, tmp_path, patience=60)

    state.refuses["/collective_rpc"] = HTTPException(500, "shape mismatch")
    with pytest.raises(EngineError, match="shape mismatch"):
        sampler.update_weights()
    assert state.sequence.count("/collective_rpc") == 1


def test_a_slow_server_is_not_waited_for_for_ever(url, state, tmp_path):
    sampler = sampler_of(url, tmp_path, timeout=0.5)
    sampler.update_weights()

    def slow(path, answer):
        if path == "/v1/completions":
            time.sleep(1.5)
        return answer

    state.spoil = slow
    with pytest.raises(EngineError, match=r"within 0\.5 seconds.*rollout\.timeout"):
        sampler.sample(PROMPTS, seed=1)


def test_a_server_that_was_restarted_meanwhile_is_noticed(url, state, tmp_path):
    """Its responses are all well formed, and half of them another model's."""
    sampler = sampler_of(url, tmp_path)
    sampler.update_weights()
    count = itertools.count()

    def restart(path, answer):
        if path == "/v1/completions" and next(count) == 4:
            state.restart()
        return answer

    state.spoil = restart
    with pytest.raises(EngineError, match="it was restarted, or another run uses it"):
        sampler.sample(PROMPTS, seed=1)


def test_a_server_that_dies_in_the_middle_is_told(state, tmp_path):
    with serving(state) as url:
        sampler = sampler_of(url, tmp_path, patience=1.0)
        sampler.update_weights()
    with pytest.raises(EngineError, match="does not answer"):
        sampler.sample(PROMPTS, seed=1)


def test_logprobs_of_rounding_above_zero_are_accepted(url, state, tmp_path):
    sampler = sampler_of(url, tmp_path)
    sampler.update_weights()
    state.spoil = spoiled(
        lambda c: c["logprobs"].update(token_logprobs=[1e-6] * len(c["token_ids"]))
    )
    assert math.isfinite(float(sampler.sample(PROMPTS, seed=1).logprobs.sum()))
