"""64 clients at once: no wrong score, no lost request, no memory that grows."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
    yield re.search(r"http\S+", process.stdout.readline())[0], process.pid
    process.terminate()
    process.wait(60)


def resident(pid: int) -> float:
    """MB."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("no /proc to read the server's memory from")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 1e3


class Load:
    """What came of the requests."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        self.answered = self.busy = self.sequences = 0
        self.wrong: list[float] = []
        self.waits: list[float] = []

    async def client(self, seed: int, http: httpx.AsyncClient) -> None:
        """Asks again and again; where the queue is full, the same once more a little later."""
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            rows = draw.choices(range(len(POOL)), k=draw.randint(1, 8))
            begun = time.monotonic()
            while True:
                answer = await http.post("/v1/score", json=request([POOL[i] for i in rows]))
                if answer.status_code != 503:
                    break
                self.busy += 1
                assert int(answer.headers["retry-after"]) >= 1
                await asyncio.sleep(0.02)
            assert answer.status_code == 200, answer.text
            self.waits.append(time.monotonic() - begun)
            self.answered += 1
            self.sequences += len(rows)
            for i, score in zip(rows, answer.json()["scores"], strict=True):
                worst = max(abs(a - b) for a, b in zip(score["log_ratios"], EXACT[i], strict=True))
                if worst > 1e-5:
                    self.wrong.append(worst)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_load(server, seconds, capsys):
    url, pid = server

    async def run() -> tuple[Load, float]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(
            base_url=url, limits=limits, timeout=60, trust_env=False
        ) as http:
            await asyncio.gather(*(Load(0.5).client(seed, http) for seed in range(CLIENTS)))
            before = resident(pid)
            counted = float(re.search(SEQUENCES, (await http.get("/metrics")).text)[1])
            load = Load(seconds)
            await asyncio.gather(*(load.client(seed, http) for seed in range(CLIENTS)))
            after = (await http.get("/metrics")).text
        assert float(re.search(SEQUENCES, after)[1]) - counted == load.sequences
        assert "srppo_queue_tokens 0" in after
        return load, before

    load, before = asyncio.run(run())
    growth = resident(pid) - before
    waits = sorted(load.waits)
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients, {seconds} s: {load.answered} requests with {load.sequences} "
            f"sequences answered, {load.busy} times told to wait, {len(load.wrong)} wrong; median "
            f"{1e3 * waits[len(waits) // 2]:.0f} ms, 99% {1e3 * waits[len(waits) * 99 // 100]:.0f} "
            f"ms; server {before:.0f} MB, grown by {growth:.1f} MB"
        )
    assert load.wrong == []
    assert load.answered >= CLIENTS
    assert growth < 32


SEQUENCES = re.compile(r"^srppo_sequences_total (\d+)", re.MULTILINE)
