"""How much the scoring server takes upon itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """All positive."""

    batch_tokens: int = 16384
    """Scored together, padding included: memory."""
    queue_tokens: int = 262144
    """Waiting to be scored; so one request can hold no more, either."""
    seconds: float = 120.0
    """From a complete request to its answer."""
    patience: float = 10.0
    """Seconds that a client may take to send its headers, its body, or to take in an answer."""

    @property
    def body_bytes(self) -> int:
        """Generous: a token takes about eight bytes, as an id or as text."""
        return 1024 + 16 * self.queue_tokens
