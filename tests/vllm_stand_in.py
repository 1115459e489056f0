"""A small server that speaks vLLM 0.32's HTTP API over real HTTP, with a tiny real model behind it.

What the client uses, no more; stricter than vLLM where that shows mistakes: it does not sample
while it is paused or asleep, nor with prefixes that were computed under other weights.
tests/rollout/test_vllm_itself.py holds vLLM itself to the same expectations.
"""

from __future__ import annotations

import base64
import copy
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel


class StandIn:
    """The state of the server, and what to spoil: `spoil(path, answer)` may change an answer,
    raise an HTTPException, or wait."""

    def __init__(self, model: PreTrainedModel, room: int = 64) -> None:
        self.first = model
        self.version = "0.32.0"
        self.room = room
        self.sequence: list[str] = []
        """Paths of calls, completions left out."""
        self.requests: list[dict[str, Any]] = []
        self.uniforms: dict[int, torch.Tensor] = {}
        """By a request's seed: the numbers that its tokens are drawn with; otherwise torch's."""
        self.refuses: dict[str, HTTPException] = {}
        """By path: not done at all."""
        self.spoil: Callable[[str, Any], Any] = lambda path, answer: answer
        self.lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """As it was when it began: the weights that it was started with."""
        self.model = copy.deepcopy(self.first)
        self.adapters: dict[str, torch.nn.Module] = {}
        self.label: str | None = None
        self.paused = self.asleep = self.stale = self.updating = False
        self.group: Any = None

    def load(self, directory: str) -> None:
        weights = {}
        for file in Path(directory).glob("*.safetensors"):
            weights |= load_file(file)
        result = self.model.load_state_dict(weights, strict=False)
        tied = set(self.model.state_dict()) - {n for n, _ in self.model.named_parameters()}
        assert not result.unexpected_keys
        assert set(result.missing_keys) <= tied

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One response, by a plain forward pass for each token."""
        served = self.adapters.get(body["model"], self.model)
        generator = torch.Generator().manual_seed(body["seed"] % 2**63)
        ids, logprobs, why = list(body["prompt"]), [], "length"
        for _ in range(body["max_tokens"]):
            distribution = served(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            shares = distribution.double().exp().cumsum(0)
            u = torch.rand((), generator=generator, dtype=torch.float64)
            if body["seed"] in self.uniforms:
                u = self.uniforms[body["seed"]][len(logprobs)].double()
            token = int(torch.searchsorted(shares, u * shares[-1], right=True))
            ids.append(token)
            logprobs.append(float(distribution[token]))
            if token in body["stop_token_ids"]:
                why = "stop"
                break
        response = ids[len(body["prompt"]) :]
        return {
            "object": "text_completion",
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "text": "",
                    "finish_reason": why,
                    "prompt_token_ids": body["prompt"] if body["return_token_ids"] else None,
                    "token_ids": response if body["return_token_ids"] else None,
                    "logprobs": {"token_logprobs": logprobs, "tokens": [""] * len(logprobs)},
                }
            ],
        }


def app_of(state: StandIn) -> FastAPI:
    """The API of a server in that state."""
    app = FastAPI()

    def refuse(unless: bool, why: str) -> None:
        if not unless:
            raise HTTPException(500, why)

    def version(_: Any) -> Any:
        return {"version": state.version}

    def models(_: Any) -> Any:
        return {"data": [{"id": "tiny", "max_model_len": state.room}]}

    def weight_info(_: Any) -> Any:
        return {"weight_version": state.label}

    def world_size(_: Any) -> Any:
        return {"world_size": 1}

    def pause(_: Any) -> Any:
        refuse(not state.asleep, "asleep")
        state.paused = True
        return {"status": "paused"}

    def resume(_: Any) -> Any:
        state.paused = False
        return {"status": "resumed"}

    def rpc(body: Any) -> Any:
        refuse(state.paused, "not paused")
        assert body["method"] == "reload_weights"
        state.load(body["kwargs"]["weights_path"])
        state.stale = True
        return {"results": [None]}

    def adapter(body: Any) -> Any:
        refuse(state.paused, "not paused")
        assert body["load_inplace"]
        loaded = PeftModel.from_pretrained(copy.deepcopy(state.first), body["lora_path"]).eval()
        state.adapters[body["lora_name"]] = loaded
        state.stale = True
        return "Success: LoRA adapter added"

    def label(body: Any) -> Any:
        state.label = body["new_version"]
        return {"success": True, "new_version": state.label}

    def reset(_: Any) -> Any:
        state.stale = False
        return {"success": True}

    def sleep(_: Any) -> Any:
        state.asleep = True
        return {"status": "sleeping", "level": 1}

    def wake(_: Any) -> Any:
        state.asleep = False
        return {"status": "awake"}

    def init(body: Any) -> Any:
        info = body["init_info"]
        unique = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        assert len(unique) == 128
        assert not info["packed"]
        state.group = gloo(info["world_size"], unique, info["rank_offset"])
        one = torch.zeros(1)
        state.group.allreduce([one]).wait()
        return {"message": "Weight transfer initialized"}

    def start(_: Any) -> Any:
        refuse(state.paused, "not paused")
        state.updating = True
        return {"message": "Weight update started"}

    def update(body: Any) -> Any:
        refuse(state.updating, "not started")
        info, weights = body["update_info"], {}
        for name, dtype, shape in zip(
            info["names"], info["dtype_names"], info["shapes"], strict=True
        ):
            weights[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            state.group.broadcast(weights[name], 0).wait()
        result = state.model.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys
        state.stale = True
        return {"message": "Weights updated"}

    def finish(_: Any) -> Any:
        refuse(state.updating, "not started")
        state.updating = False
        return {"message": "Weight update finished"}

    def completions(body: Any) -> Any:
        refuse(not (state.paused or state.asleep), "paused or asleep")
        refuse(not state.stale, "prefixes of other weights")
        with state.lock:
            state.requests.append(body)
        return state.complete(body)

    def serve(method: str, path: str, work: Callable[[Any], Any]) -> None:
        async def body_of(request: Request) -> Any:
            return await request.json() if await request.body() else None

        async def route(request: Request) -> JSONResponse | PlainTextResponse:
            body = await body_of(request)
            if path != "/v1/completions":
                state.sequence.append(path)
            if path in state.refuses:
                raise state.refuses[path]
            answer = await _in_thread(lambda: state.spoil(path, work(body)))
            if isinstance(answer, str):
                return PlainTextResponse(answer)
            return JSONResponse(answer)

        app.add_api_route(path, route, methods=[method], response_model=None)

    for path, work in {
        "/version": version,
        "/v1/models": models,
        "/weight_info": weight_info,
        "/get_world_size": world_size,
    }.items():
        serve("GET", path, work)
    for path, work in {
        "/pause": pause,
        "/resume": resume,
        "/collective_rpc": rpc,
        "/v1/load_lora_adapter": adapter,
        "/update_weight_version": label,
        "/reset_prefix_cache": reset,
        "/sleep": sleep,
        "/wake_up": wake,
        "/init_weight_transfer_engine": init,
        "/start_weight_update": start,
        "/update_weights": update,
        "/finish_weight_update": finish,
        "/v1/completions": completions,
    }.items():
        serve("POST", path, work)
    return app


async def _in_thread(work: Callable[[], Any]) -> Any:
    import asyncio

    return await asyncio.to_thread(work)


@contextmanager
def serving(state: StandIn, port: int = 0) -> Iterator[str]:
    """Its address, over real HTTP."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        config = uvicorn.Config(app_of(state), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


# --- in place of NCCL -----------------------------------------------------------------------------


class Gloo:
    """torch.cuda.nccl's functions, on CPUs by gloo; a unique id names a store."""

    @staticmethod
    def unique_id() -> bytes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1]).encode().ljust(128, b"\0")

    @staticmethod
    def init_rank(num_ranks: int, uid: bytes, rank: int) -> Any:
        return gloo(num_ranks, uid, rank)

    @staticmethod
    def all_reduce(inputs: Any, outputs: Any, op: int, streams: Any, comms: Any) -> None:
        comms[0].allreduce(inputs).wait()

    @staticmethod
    def broadcast(inputs: Any, root: int, streams: Any, comms: Any) -> None:
        comms[0].broadcast(inputs[0], root).wait()


def gloo(num_ranks: int, uid: bytes, rank: int) -> Any:
    port = int(uid.rstrip(b"\0"))
    store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, wait_for_workers=False)
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, num_ranks)
