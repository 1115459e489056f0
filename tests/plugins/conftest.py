"""A real server, where the plugins look for it."""

from __future__ import annotations

import pytest

from serving import scorer, serving


@pytest.fixture(scope="module")
def server():
    with serving(scorer()) as client:
        yield client


@pytest.fixture
def url(server, monkeypatch) -> str:
    """Of a server of the tiny models, where the plugins look for it."""
    monkeypatch.setenv("SRPPO_REWARD_URL", str(server.base_url))
    return str(server.base_url)
