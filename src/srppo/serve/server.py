"""The scoring server as a process: who may reach it, and how it starts and ends."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from srppo.errors import ConfigError, ServeError
from srppo.serve.limits import Limits
from srppo.serve.scorer import CoherentScorer

if TYPE_CHECKING:
    import uvicorn

CONNECTIONS = 1024
"""At once; beyond them 503."""


def serve(
    base: str,
    sft: str,
    *,
    host: str,
    port: int,
    token_env: str | None,
    dtype: Literal["float32", "bfloat16"],
    device: str,
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Score until told to stop; `say` is told the address once it can be reached.

    Args:
        port: 0 takes a free one.
        token_env: name of the environment variable that holds the token.

    Raises:
        ConfigError: reachable from elsewhere without a token.
        ServeError: the address is taken, or not this machine's.
        ModelError: the models cannot be loaded, or do not fit together.
    """
    require_installed()
    token = read_token(token_env)
    require_token(host, token)
    with listen(host, port) as listening:
        scorer = CoherentScorer.load(
            base, sft, dtype=dtype, device=device, max_tokens_per_batch=limits.batch_tokens
        )
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{listening.getsockname()[1]}")
        make_server(scorer, base, sft, limits, token).run(sockets=[listening])


def make_server(
    scorer: CoherentScorer, base: str, sft: str, limits: Limits, token: str | None
) -> uvicorn.Server:
    """Ready to run on a listening socket; arguments as for `create_app`."""
    import uvicorn  # late, as the extra may not be installed

    from srppo.serve.app import create_app
    from srppo.serve.connection import patient

    return uvicorn.Server(
        uvicorn.Config(
            create_app(scorer, base, sft, limits, token),
            http=patient(limits.patience),
            ws="none",
            proxy_headers=False,
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(limits.seconds),
        )
    )


def read_token(name: str | None) -> str | None:
    """The token in an environment variable; None without a name.

    Raises:
        ConfigError: there is none, or a header could not carry it.
    """
    if name is None:
        return None
    token = os.environ.get(name, "")
    if not token.isascii() or not token.isprintable() or token != token.strip() or not token:
        raise ConfigError(
            f"the environment variable {name} holds {'no' if not token else 'an unusable'} token: "
            "nobody could be let in. Set it to printable ASCII without spaces at its ends, for "
            "instance to the output of: openssl rand -hex 32"
        )
    return token


def require_token(host: str, token: str | None) -> None:
    """ConfigError where anyone on the network could use the server."""
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and without a token anyone there "
            "could use the models. Put a secret into an environment variable and add "
            "--token-env with its name; or stay at --host 127.0.0.1."
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ServeError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as e:
        raise ServeError(
            f"cannot listen at {host}:{port} ({e}): nobody could reach the server. Choose another "
            "--port (0 takes a free one), and an address of this machine as --host."
        ) from e


def require_installed() -> None:
    """ServeError without the packages of the extra."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ServeError(
            f"serve-reward needs {' and '.join(missing)}: without, nothing can be served. "
            "Run: pip install 'srppo[serve]'"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
