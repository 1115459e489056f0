"""64 clients at once: no wrong score, no lost request, no memory that grows."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import httpx
import pytest

import tiny
from serving import expected, pairs, request

CLIENTS = 64
POOL = pairs(200, seed=3)
EXACT = [expected(*row) for row in POOL]
LIMITS = ["--max-queue-tokens", "1024"]  # small, so that the queue is full now and then


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, int]]:
    """Address and process id."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("sft", 1)):
        tiny.model(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "srppo", "serve-reward", "--port", "0", "--device", "cpu"),
            *("--base", str(folder / "base"), "--sft", str(folder / "sft"), *LIMITS),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    yield re.search(r"http://(\S+)", process.stdout.readline())[1], process.pid
    process.terminate()
    process.wait(60)


def resident(pid: int) -> float:
    """MB."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("no /proc to read the server's memory from")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 1e3


class Client(Thread):
    """Asks again and again; where the queue is full, the same once more a little later."""

    def __init__(self, seed: int, at: str, until: float) -> None:
        super().__init__()
        self.draw, self.at, self.until = random.Random(seed), at, until
        self.busy = self.sequences = 0
        self.waits: list[float] = []
        self.wrong: list[float] = []
        self.failed: Exception | None = None

    def run(self) -> None:
        try:
            with closing(HTTPConnection(self.at, timeout=60)) as connection:
                while time.monotonic() < self.until:
                    self.ask(connection)
        except Exception as e:  # told by the test, in its own thread
            self.failed = e

    def ask(self, connection: HTTPConnection) -> None:
        rows = self.draw.choices(range(len(POOL)), k=self.draw.randint(1, 8))
        body = json.dumps(request([POOL[i] for i in rows]))
        begun = time.monotonic()
        while True:
            connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read())
            if answer.status != 503:
                break
            self.busy += 1
            assert int(answer.headers["Retry-After"]) >= 1
            time.sleep(0.02)
        assert answer.status == 200, told
        self.waits.append(time.monotonic() - begun)
        self.sequences += len(rows)
        for i, score in zip(rows, told["scores"], strict=True):
            pairs = zip(score["log_ratios"], EXACT[i], strict=True)
            if (worst := max(abs(ours - exact) for ours, exact in pairs)) > 1e-5:
                self.wrong.append(worst)


def load(at: str, seconds: float) -> list[Client]:
    """CLIENTS of them, until each has its last answer."""
    until = time.monotonic() + seconds
    clients = [Client(seed, at, until) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [client.failed for client in clients if client.failed] == []
    return clients


def metric(at: str, name: str) -> float:
    text = httpx.get(f"http://{at}/metrics", trust_env=False).text
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.parametrize("seconds", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_load(server, seconds, capsys, request):
    """With `--full` the longer one takes a minute."""
    if seconds > 3 and request.config.getoption("--full"):
        seconds = 60
    at, pid = server
    load(at, 0.5)
    before, counted = resident(pid), metric(at, "srppo_sequences_total")
    clients = load(at, seconds)
    growth = resident(pid) - before

    waits = sorted(wait for client in clients for wait in client.waits)
    sequences = sum(client.sequences for client in clients)
    wrong = [worst for client in clients for worst in client.wrong]
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients, {seconds} s: {len(waits)} requests with {sequences} sequences "
            f"answered, {sum(c.busy for c in clients)} times told to wait, {len(wrong)} wrong; "
            f"median {1e3 * waits[len(waits) // 2]:.0f} ms, 99% "
            f"{1e3 * waits[len(waits) * 99 // 100]:.0f} ms; server {before:.0f} MB, grown by "
            f"{growth:.1f} MB"
        )
    assert wrong == []
    assert all(client.waits for client in clients)
    assert metric(at, "srppo_sequences_total") - counted == sequences
    assert metric(at, "srppo_queue_tokens") == 0
    assert growth < 32
