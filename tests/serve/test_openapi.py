"""The server fuzzed against its own description of itself, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving import scorer, serving
from srppo.serve.app import create_app
from srppo.serve.limits import Limits

TOKEN = "secret"
TEXT = ("/v1/score_text", "/openrlhf")
"""Where a schema cannot say what can be scored: an empty text, a query without its prompt."""

schema = schemathesis.openapi.from_dict(
    create_app(scorer(), "BASE", "SFT", Limits(), TOKEN).app.openapi()
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(scorer(), token=TOKEN) as client:
        yield str(client.base_url)


@schema.parametrize()
@settings(max_examples=30, derandomize=True, suppress_health_check=[*HealthCheck])
def test_it_does_what_its_description_says(case, url):
    case.call_and_validate(
        base_url=url,
        headers={"Authorization": f"Bearer {TOKEN}"},
        excluded_checks=[positive_data_acceptance] if case.path in TEXT else [],
    )


def test_the_description_is_whole():
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {(o.method.upper(), o.path) for o in operations} == {
        ("POST", "/v1/score"),
        ("POST", "/v1/score_text"),
        ("POST", "/openrlhf"),
        ("GET", "/v1/model"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    }
