"""How the policy's weights get to a vLLM server: vLLM 0.32.0's ways, from the trainer's side.

Disk             /collective_rpc reload_weights(weights_path)    docs/features/sleep_mode.md
AdapterOnDisk    /v1/load_lora_adapter, load_inplace             docs/features/lora.md
NCCL             init_weight_transfer_engine, start_weight_update, update_weights and
                 finish_weight_update: vllm/distributed/weight_transfer/nccl_engine.py; the id
                 that both sides join by travels as nccl_unique_id_b64 (nccl_common.py), so that
                 the trainer needs no vLLM.

vLLM's third, CUDA IPC, has the server unpickle what it is sent; it is left out.
"""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srppo.errors import EngineError
from srppo.models.roles import Role
from srppo.rollout.vllm_server import VLLMServer

ADAPTER = "srppo"
"""The policy's name on a server that it is an adapter of."""


class Transfer(Protocol):
    """A way from the trainer to the server."""

    def send(self, server: VLLMServer, policy: Role, weights: dict[str, Tensor] | None) -> None:
        """Have the server sample from the policy as it is now.

        Args:
            weights: the policy's, where the role does not hold them whole.

        Raises:
            EngineError: the server refuses, or they cannot be written.
        """
        ...


@dataclass(frozen=True)
class Disk:
    """A safetensors checkpoint that the server reads from its own file system."""

    directory: Path
    """Its old content is removed."""
    dtype: torch.dtype

    def send(self, server: VLLMServer, policy: Role, weights: dict[str, Tensor] | None) -> None:
        """As promised."""
        with _emptied(self.directory), _here(policy, weights):
            state = policy.model.state_dict() if weights is None else weights
            state = {k: v.detach().to("cpu", self.dtype) for k, v in state.items()}
            policy.model.save_pretrained(self.directory, state_dict=state)
        kwargs = {"weights_path": str(self.directory)}
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})


@dataclass(frozen=True)
class AdapterOnDisk:
    """The adapter alone: the server has the base model, in whatever number format."""

    directory: Path
    """Its old content is removed."""

    def send(self, server: VLLMServer, policy: Role, weights: dict[str, Tensor] | None) -> None:
        """As promised."""
        with _emptied(self.directory):
            policy.save_pretrained(self.directory, weights=weights)
        content = {"lora_name": ADAPTER, "lora_path": str(self.directory), "load_inplace": True}
        server.post("/v1/load_lora_adapter", content)


def _here(policy: Role, weights: dict[str, Tensor] | None) -> AbstractContextManager[object]:
    """The role active, unless its weights were gathered before: that takes all processes, and only
    the first is here."""
    return nullcontext() if weights is not None else policy.active()


@contextmanager
def _emptied(directory: Path) -> Iterator[None]:
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield
    except OSError as e:
        raise EngineError(
            f"the policy cannot be written to {directory} ({e.strerror or e}): the server would "
            "sample from an older one. Make room, or set rollout.weight_directory elsewhere."
        ) from e


class NCCL:
    """From this process's GPU to the server's, weight by weight; they share one group."""

    def __init__(self, dtype: torch.dtype, nccl: Any = torch.cuda.nccl) -> None:
        """`nccl`: torch.cuda.nccl's functions."""
        self.dtype = dtype
        self.nccl = nccl
        self.group: Any = None

    def send(self, server: VLLMServer, policy: Role, weights: dict[str, Tensor] | None) -> None:
        """As promised."""
        if self.group is None:
            self._open(server, policy.device)
        with _here(policy, weights):
            named = dict(policy.model.named_parameters()) if weights is None else weights
            info = {
                "names": list(named),
                "dtype_names": [str(self.dtype).removeprefix("torch.")] * len(named),
                "shapes": [list(x.shape) for x in named.values()],
            }

            def broadcast() -> None:
                for x in named.values():
                    whole = x.detach().to(policy.device, self.dtype).contiguous()
                    self.nccl.broadcast([whole], 0, None, [self.group])
                _finish(policy.device)

            server.post("/start_weight_update")
            post = partial(server.post, "/update_weights", {"update_info": info})
            _at_once(broadcast, post, policy.device)
            server.post("/finish_weight_update")

    def _open(self, server: VLLMServer, device: torch.device) -> None:
        world_size = 1 + int(server.call("GET", "/get_world_size")["world_size"])
        unique = self.nccl.unique_id()
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique).decode(),
            "rank_offset": 1,
            "world_size": world_size,
            "packed": False,
        }

        def join() -> None:
            self.group = self.nccl.init_rank(world_size, unique, 0)
            # vLLM's workers begin with a sum over one element, and wait for all to join in.
            one = torch.zeros(1, device=device)
            self.nccl.all_reduce([one], None, 0, None, [self.group])
            _finish(device)

        post = partial(server.post, "/init_weight_transfer_engine", {"init_info": info})
        _at_once(join, post, device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _at_once(ours: Callable[[], None], theirs: Callable[[], object], device: torch.device) -> None:
    """Both ends of a collective operation, ours with `device` as the current one. If the server
    refuses, ours would wait for ever: it is left behind in a thread that ends with the process."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                ours()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    theirs()
    thread.join()
    if failed:
        raise failed[0]
