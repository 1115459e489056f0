"""The client against real servers, busy, absent and strict ones among them."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serving import columns, expected, pairs, scorer, serving
from srppo.errors import ConfigError, ServeError
from srppo.plugins.client import RewardClient


def test_scores_are_those_of_plain_forwards(url):
    rows = pairs()
    scores = RewardClient(url).score(*columns(rows))
    for (prompt, response), score in zip(rows, scores, strict=True):
        assert score == pytest.approx(expected(prompt, response), abs=1e-5)


def test_text_is_scored_as_openrlhf_hands_it_out(url):
    (reward,) = RewardClient(url).reward_text(["a b c <eos>"], ["a b"])
    assert reward == pytest.approx(sum(expected([2, 3], [4, 0])), abs=1e-5)


def test_the_server_says_what_it_scores_with(url):
    assert RewardClient(url).model()["vocab_size"] == 24


def test_the_token_is_sent(monkeypatch):
    with serving(scorer(), token="secret") as client:
        monkeypatch.setenv("SRPPO_REWARD_URL", f"{client.base_url}/")
        with pytest.raises(ServeError, match=r"answered 401.*Authorization: Bearer"):
            RewardClient.from_environment().score([[1]], [[2]])
        monkeypatch.setenv("SRPPO_REWARD_TOKEN", "secret")
        (score,) = RewardClient.from_environment().score([[1]], [[2]])
    assert score == pytest.approx(expected([1], [2]), abs=1e-5)


@pytest.mark.parametrize("value", [None, "", "localhost:8000"])
def test_without_an_address_it_says_how_to_get_one(monkeypatch, value):
    monkeypatch.delenv("SRPPO_REWARD_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("SRPPO_REWARD_URL", value)
    with pytest.raises(ConfigError, match="srppo serve-reward --base B --sft S"):
        RewardClient.from_environment()


def test_what_is_refused_is_told_at_once(url):
    with pytest.raises(ServeError, match=r"answered 422.*token id 99"):
        RewardClient(url).score([[1]], [[99]])


def test_a_server_that_does_not_answer_is_told():
    with pytest.raises(ServeError, match=r"does not answer .*srppo serve-reward"):
        RewardClient("http://127.0.0.1:9", patience=0).score([[1]], [[2]])


class Strange(BaseHTTPRequestHandler):
    """Busy twice, then sends elsewhere."""

    asked: list[str] = []

    def do_POST(self):
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        busy = len(self.asked) <= 2
        self.send_response(503 if busy else 307)
        self.send_header("Retry-After", "0")
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_busy_server_is_asked_again_and_no_redirection_followed():
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as strange:
        thread = threading.Thread(target=strange.serve_forever)
        thread.start()
        with pytest.raises(ServeError, match="answered 307"):
            RewardClient(f"http://127.0.0.1:{strange.server_port}").score([[1]], [[2]])
        strange.shutdown()
        thread.join()
    assert Strange.asked == ["/v1/score"] * 3


def test_no_proxy_sees_the_token(url, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert RewardClient(url, "secret").score([[1]], [[2]])


def test_it_needs_nothing_that_an_engine_may_lack():
    """No torch, no pydantic: srppo is there without its dependencies."""
    code = (
        "import sys; import srppo.plugins.client, srppo.plugins.checks\n"
        "ours = {'srppo'} | set(sys.stdlib_module_names)\n"
        "print([m for m in sys.modules if m.partition('.')[0] not in ours and m[0] != '_'])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
