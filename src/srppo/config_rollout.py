"""The settings of what stage 2 samples with."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from srppo.validation import Positive, PositiveFloat, Section


class RolloutConfig(Section):
    """The engine that samples the responses of stage 2; docs/rollout.md. Everything else, such as
    the evaluation, samples with transformers."""

    engine: Literal["transformers", "continuous", "vllm"] = "transformers"
    """`transformers`: in process, one batch after the other. `continuous`: in process, by
    transformers' continuous batching. `vllm`: by a vLLM server."""
    importance_cap: PositiveFloat | None = None
    """Weigh each token's advantage with min(pi_trainer/pi_sampler, this), for the two do not round
    alike (truncated importance sampling; verl's default is 2, TRL's 3). null: no weights."""
    url: str | None = None
    """vllm: where the server is, http://HOST:PORT. Its API key, if it has one, is read from the
    environment variable VLLM_API_KEY."""
    weight_transfer: Literal["disk", "nccl"] = "disk"
    """vllm: how the policy gets to the server: through a directory that it sees, too, or from GPU
    to GPU. An adapter (model.lora) is always read from the directory."""
    weight_directory: str | None = None
    """vllm: where, as an absolute path, `rollout-weights/` comes and goes; null: in the run
    directory. /dev/shm is memory, where there is enough of it."""
    weight_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """vllm: number format in which weights travel; the server's own is its --dtype."""
    sleep: bool = False
    """vllm: the server gives its GPU memory back while the policy is trained."""
    concurrency: Positive = 256
    """vllm: requests at a time, one for each response; the server batches them."""
    timeout: PositiveFloat = 600.0
    """vllm: seconds for one answer."""
    patience: PositiveFloat = 120.0
    """vllm: seconds over which a server that is absent or busy is asked again."""

    @model_validator(mode="after")
    def _possible(self) -> RolloutConfig:
        if self.engine == "vllm" and not self.url:
            raise ValueError(
                "engine=vllm without url: nobody would be asked for responses. Start a server as "
                "docs/rollout.md says, and set rollout.url=http://127.0.0.1:8000."
            )
        if self.url and not (
            urlsplit(self.url).scheme in ("http", "https") and urlsplit(self.url).netloc
        ):
            raise ValueError(
                f"url={self.url!r} is no http address: nobody could be asked. Set "
                "rollout.url=http://HOST:PORT, without a path."
            )
        if self.url and self.engine != "vllm":
            raise ValueError(
                f"url={self.url!r} with engine={self.engine}: the server would never be asked. Set "
                "rollout.engine=vllm, or leave url out."
            )
        if self.weight_directory and not self.weight_directory.startswith("/"):
            raise ValueError(
                f"weight_directory={self.weight_directory!r} is not an absolute path: the server "
                "would look for it elsewhere. Set rollout.weight_directory=/dev/shm, say."
            )
        return self
