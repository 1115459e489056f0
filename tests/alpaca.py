"""A small benchmark in AlpacaEval's formats, and a judge behind OpenAI's chat API."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
Rows = list[dict[str, Any]]


def references(n: int) -> Rows:
    """As alpaca_eval_gpt4_baseline.json: texts of mixed length."""
    words = random.Random(1)
    return [
        {
            "dataset": "made up",
            "instruction": f"Question {i}: what is {words.randrange(99)}?",
            "output": "an answer " * words.randrange(1, 30) + str(i),
            "generator": "gpt4_1106_preview",
        }
        for i in range(n)
    ]


def outputs(n: int) -> Rows:
    """A model's, in the order of the references."""
    words = random.Random(2)
    return [
        {
            "instruction": row["instruction"],
            "output": "a reply " * words.randrange(30) + str(i),
            "generator": "mine",
        }
        for i, row in enumerate(references(n))
    ]


def annotations(n: int) -> Rows:
    """As annotations.json."""
    judge = random.Random(3)
    return [
        {
            "instruction": theirs["instruction"],
            "output_1": theirs["output"],
            "generator_1": theirs["generator"],
            "dataset": theirs["dataset"],
            "output_2": ours["output"],
            "generator_2": ours["generator"],
            "annotator": JUDGE,
            "preference": 1 + judge.random(),
            "raw_completion": None,
        }
        for theirs, ours in zip(references(n), outputs(n), strict=True)
    ]


def data_dir(path: Path, n: int, gamed: bool = True) -> Path:
    """References and, if wanted, df_gamed.csv, laid out as --data-dir has them."""
    folder = path / "alpaca_eval"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(references(n)))
    if gamed:
        draw = np.random.default_rng(4)
        difficulty = draw.normal(size=n)
        lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
        for model in ("verbose", "concise"):
            for i in range(n):
                preference, delta = draw.uniform(), draw.normal()
                lines.append(f"{model},{i},{preference},{delta},{difficulty[i]},False")
        (folder / "df_gamed.csv").write_text("\n".join(lines))
    return path


# --- a judge on this machine ---------------------------------------------------------------------

Question = list[dict[str, str]]


def texts(question: Question) -> tuple[str, str]:
    """The two outputs, in the order in which they are shown; for both of alpaca-eval's forms."""
    found = re.findall(r'"(?:output|answer)": """(.*?)"""', question[-1]["content"], re.DOTALL)
    first, second = found
    return first, second


def by_hash(question: Question) -> float:
    """Some probability that the first is better; another one for every question and order."""
    digest = hashlib.sha256(question[-1]["content"].encode()).digest()
    return (digest[0] + 0.5) / 256


def likes(word: str) -> Callable[[Question], float]:
    """Prefers the output that holds the word, wherever it is shown."""
    return lambda question: 0.9 if word in texts(question)[0] else 0.1


def choice(p: float) -> dict[str, Any]:
    """What the chat API returns where the first is better with probability p."""
    top = [{"token": "m", "logprob": math.log(p)}, {"token": "M", "logprob": math.log(1 - p)}]
    top.append({"token": "The", "logprob": -9.0})
    said = "m" if p > 0.5 else "M"
    content = [{"token": said, "logprob": math.log(max(p, 1 - p)), "top_logprobs": top}]
    message = {"role": "assistant", "content": said}
    return {"index": 0, "message": message, "logprobs": {"content": content}}


def ranked(p: float) -> dict[str, Any]:
    """The same of a server that sends no log-probabilities."""
    first = 1 if p > 0.5 else 2
    ranks = [{"model": "model_1", "rank": first}, {"model": "model_2", "rank": 3 - first}]
    return {"index": 0, "message": {"role": "assistant", "content": str(ranks)}}


def prose() -> dict[str, Any]:
    """Of no use."""
    return {"index": 0, "message": {"role": "assistant", "content": "Both are fine."}}


class JudgeServer(ThreadingHTTPServer):
    """Answers by `rule`; `faults` happen first, one a request, to questions that hold their key."""

    daemon_threads = True

    def __init__(
        self,
        rule: Callable[[Question], float] = by_hash,
        speaks: Sequence[str] = ("logprobs",),
        refuses_logprobs: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Call)
        self.rule = rule
        self.speaks = speaks
        """How it can answer: logprobs, letter, ranking."""
        self.refuses_logprobs = refuses_logprobs
        """Rather than to leave them out."""
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.refuse_after: int | None = None
        """Answers after which the key is no longer accepted."""
        self.hang_after: int | None = None
        """Requests after which there are no answers, for a while."""
        self.hanging = 0
        """Questions that wait."""
        self.asked: Counter[str] = Counter()
        """Requests by the question's text."""
        self.answered: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.bodies: Rows = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *args: object) -> None:
        """A client that has gone away is no error."""


class _Call(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"]
        text = question[-1]["content"]
        with server.lock:
            server.asked[text] += 1
            server.times[text].append(time.monotonic())
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            due = next((v for key, v in server.faults.items() if v and key in text), [])
            fault = due.pop(0) if due else None
            refused = (
                server.refuse_after is not None and server.answered.total() >= server.refuse_after
            )
            hangs = server.hang_after is not None and server.asked.total() > server.hang_after
            server.hanging += hangs
        if hangs:
            self._timeout(question)
        elif self.path != "/v1/chat/completions":
            self._reply(404, {"error": {"message": f"no {self.path} here"}})
        elif refused:
            key = self.headers["Authorization"]
            self._reply(401, {"error": {"message": f"wrong key: {key}"}})
        elif server.refuses_logprobs and "logprobs" in body:
            self._reply(400, {"error": {"message": "logprobs are not supported"}})
        elif fault:
            getattr(self, f"_{fault}")(question)
        else:
            p = server.rule(question)
            is_ranking = "leaderboard of different" in text
            if is_ranking and "ranking" in server.speaks:
                answer = ranked(p)
            elif not is_ranking and {"letter", "logprobs"} & {*server.speaks}:
                answer = choice(p)
            else:
                answer = prose()
            if "logprobs" not in server.speaks or "logprobs" not in body:
                answer.pop("logprobs", None)
            with server.lock:
                server.answered[text] += 1
            self._reply(200, {"choices": [answer]})

    def _timeout(self, question: Question) -> None:
        self.server.closing.wait(60)

    def _drop(self, question: Question) -> None:
        self.close_connection = True

    def _half(self, question: Question) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.close_connection = True

    def _busy(self, question: Question) -> None:
        self._reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "2"})

    def _broken(self, question: Question) -> None:
        self._reply(500, {"error": {"message": "oops"}})

    def _html(self, question: Question) -> None:
        self._reply(200, b"<html>welcome</html>")

    def _no_choices(self, question: Question) -> None:
        self._reply(200, {"choices": []})

    def _chatty(self, question: Question) -> None:
        top = [{"token": "The", "logprob": -0.1}, {"token": "I", "logprob": -3.0}]
        content = [{"token": "The", "logprob": -0.1, "top_logprobs": top}]
        message = {"role": "assistant", "content": "The"}
        self._reply(200, {"choices": [{"message": message, "logprobs": {"content": content}}]})

    def _prose(self, question: Question) -> None:
        self._reply(200, {"choices": [prose()]})

    def _too_long(self, question: Question) -> None:
        self._reply(400, {"error": {"message": "maximum context length is 8 tokens"}})

    def _reply(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        """Nothing."""
