"""The server as a process and on its sockets: who may start it, and who it does not wait for."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import tiny
from runs import srppo_command
from serving import columns, expected, pairs, request, scorer, serving
from srppo.errors import ConfigError, ServeError
from srppo.serve.limits import Limits
from srppo.serve.server import listen, read_token, require_token

HASTY = Limits(queue_tokens=64, patience=0.3)  # bodies up to 2 KiB
CLOSED = (ConnectionResetError, BrokenPipeError)
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def client():
    with serving(scorer(), HASTY) as client:
        yield client
        assert client.post("/v1/score", json=request(pairs(1))).status_code == 200


def connected(client) -> socket.socket:
    found = socket.create_connection((client.base_url.host, client.base_url.port))
    found.settimeout(30)
    return found


def for_ever(connection: socket.socket, piece: bytes, pause: float = 0.0) -> None:
    """Until the other side has had enough."""
    while True:
        connection.sendall(piece)
        time.sleep(pause)


def ended(connection: socket.socket) -> bool:
    """Without an answer, by either way that TCP knows."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    while chunk := connection.recv(65536):
        found += chunk
    return found


# --- slow and large ------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1/score HT", HEAD])
def test_headers_that_do_not_come_end_the_connection(client, sent):
    with connected(client) as slow:
        slow.sendall(sent)
        assert ended(slow)


def test_headers_in_drops_end_it_too_also_those_of_a_second_request(client):
    with connected(client) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /health HTTP/1.1\r\nX: ")
        slow.settimeout(0.02)
        with pytest.raises(CLOSED):
            for_ever(slow, b"a", pause=0.02)


def test_a_body_in_drops_is_told_and_the_connection_ends(client):
    with connected(client) as slow:
        slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        head, _, body = until_closed(slow).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    assert "did not arrive within 0.3 seconds" in json.loads(body)["error"]


def test_a_body_that_says_it_is_too_large_is_not_read(client):
    with connected(client) as large:
        large.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        answer = until_closed(large)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"larger than 2048 bytes" in answer


def test_a_body_that_does_not_say_it_is_too_large_is_not_read_to_its_end(client):
    with connected(client) as large:
        large.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(CLOSED):
            for_ever(large, b"400\r\n" + b" " * 1024 + b"\r\n")


def test_many_slow_clients_do_not_keep_others_waiting(client):
    slow = [connected(client) for _ in range(50)]
    for connection in slow:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    ((prompt, response),) = pairs(1)
    answer = client.post("/v1/score", json=request([(prompt, response)]))
    (score,) = answer.json()["scores"]
    assert score["log_ratios"] == pytest.approx(expected(prompt, response), abs=1e-5)
    for connection in slow:
        assert until_closed(connection).startswith(b"HTTP/1.1 408")
        connection.close()


def test_nobody_waits_for_a_client_that_does_not_read():
    """Answers of 2 MB each, so that no buffer between the two holds them all."""
    with serving(scorer(), Limits(patience=0.3)) as client:
        body = json.dumps(request([([1], [2, 3, 4, 5, 6, 7, 8, 9])] * 10_000)).encode()
        with connected(client) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            whole = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            deaf.sendall(whole)
            with pytest.raises(CLOSED):
                for_ever(deaf, b" " * 65536)


# --- who may start it ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_machines_need_a_token(host):
    with pytest.raises(ConfigError, match="--token-env"):
        require_token(host, None)
    require_token(host, "secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host):
    require_token(host, None)


@pytest.mark.parametrize("value", [None, "", " ", " secret", "se\ncret", "sécret"])
def test_a_token_that_no_header_can_carry_is_refused(monkeypatch, value):
    monkeypatch.delenv("SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("SECRET", value)
    with pytest.raises(ConfigError, match="SECRET") as refused:
        read_token("SECRET")
    assert not value or value == " " or value not in str(refused.value)


def test_an_address_that_is_taken_is_told():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port} .* Choose another --port"):
            listen("127.0.0.1", port)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("srppo.serve.server.find_spec", lambda name: None)
    done = srppo_command("serve-reward", "--base", "/no", "--sft", "/no")
    assert done.code == 2
    assert "pip install 'srppo[serve]'" in done.err


def test_the_command_line_tells_before_anything_is_loaded():
    done = srppo_command("serve-reward", "--base", "/no", "--sft", "/no", "--host", "0.0.0.0")
    assert done.code == 2
    assert "--token-env" in done.err


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    for name, seed in (("base", 0), ("sft", 1)):
        tiny.model(seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "srppo", "serve-reward", "--port", "0", "--device", "cpu"),
            *("--base", str(tmp_path / "base"), "--sft", str(tmp_path / "sft")),
            *("--token-env", "SECRET"),
        ],
        env={**os.environ, "SECRET": "secret"},
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"Scoring at (http://127.0.0.1:\d+)\n", line)[1]
        from srppo.plugins.client import RewardClient

        rows = pairs()
        scores = RewardClient(url, "secret").score(*columns(rows))
        for (prompt, response), score in zip(rows, scores, strict=True):
            assert score == pytest.approx(expected(prompt, response), abs=1e-5)
        with pytest.raises(ServeError, match="answered 401"):
            RewardClient(url).score([[1]], [[2]])
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
