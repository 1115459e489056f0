"""The endpoints, over HTTP; scores against plain forward passes."""

from __future__ import annotations

import json
import re
import socket
import threading

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving import BASE, SFT, TEMPLATE, expected, pairs, request, scorer, serving
from srppo.serve.limits import Limits
from srppo.serve.scorer import CoherentScorer

TOKEN = "a secret"


@pytest.fixture(scope="module")
def client():
    with serving(scorer()) as client:
        yield client


def told(response) -> str:
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


# --- what is scored ------------------------------------------------------------------------------


def test_token_ids(client):
    rows = pairs()
    answer = client.post("/v1/score", json=request(rows))
    assert answer.status_code == 200
    for (prompt, response), score in zip(rows, answer.json()["scores"], strict=True):
        exact = expected(prompt, response)
        assert score["log_ratios"] == pytest.approx(exact, abs=1e-5)
        assert score["reward"] == pytest.approx(sum(exact), abs=1e-5)


def test_text_in_a_template_or_plain(client):
    chat = {"messages": [{"role": "user", "content": "a b"}], "response": "c"}
    plain = {"prompt": "a <eos>", "response": " d"}
    sequences = [chat, chat | {"ended": False}, plain, plain | {"ended": False}]
    answer = client.post("/v1/score_text", json={"sequences": sequences})
    assert answer.status_code == 200
    ids = [([2, 3], [4, 0]), ([2, 3], [4]), ([2, 0], [5, 0]), ([2, 0], [5])]
    for (prompt, response), score in zip(ids, answer.json()["scores"], strict=True):
        assert (score["prompt_ids"], score["response_ids"]) == (prompt, response)
        assert score["log_ratios"] == pytest.approx(expected(prompt, response), abs=1e-5)


def test_texts_at_once_do_not_change_each_others_tokens():
    """A tokenizer reads "<eos>" as text or as EOS by a switch of its own, which all calls share."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    chat = {"messages": [{"role": "user", "content": "a <eos>"}], "response": "b"}
    plain = {"prompt": "a <eos>", "response": " b"}
    ids: dict[str, set[object]] = {"chat": set(), "plain": set()}

    def ask(kind: str, text: dict[str, object]) -> None:
        for _ in range(10):
            body = {"sequences": [text] * 20}
            answer = client.post("/v1/score_text", json=body)
            if answer.status_code == 200:
                ids[kind] |= {tuple(score["prompt_ids"]) for score in answer.json()["scores"]}
            else:
                ids[kind].add(told(answer))

    with serving(CoherentScorer(BASE, SFT, tokenizer)) as client:
        both = (("chat", chat), ("plain", plain)) * 4
        threads = [threading.Thread(target=ask, args=pair) for pair in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ids == {"chat": {(1, 0)}, "plain": {(1, 3)}}


def test_openrlhf(client):
    query = {"query": ["a b c <eos>", "d e"], "prompts": ["a b", "d"], "labels": ["", ""]}
    answer = client.post("/openrlhf", json=query)
    rewards = [sum(expected([2, 3], [4, 0])), sum(expected([5], [6]))]
    assert answer.json()["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert answer.json()["scores"] == answer.json()["rewards"]
    assert answer.json()["extra_logs"] == {"coherent_tokens": [2.0, 1.0]}


def test_what_it_scores_with(client):
    card = client.get("/v1/model").json()
    assert (card["base"], card["sft"]) == ("BASE", "SFT")
    assert (card["vocab_size"], card["context"], card["eos_token_id"]) == (24, 64, 0)
    assert client.get("/health").json() == {"status": "ok"}


def test_metrics_are_counted_in_the_format_of_prometheus():
    with serving(scorer()) as client:
        rows = pairs(5)
        client.post("/v1/score", json=request(rows))
        client.post("/v1/score", json={})
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    *lines, last = answer.text.split("\n")
    assert last == ""
    sample = r'(?P<name>[a-z_]+)(\{[a-z]+="\d+"\})? (?P<value>\d+(\.\d+)?(e-?\d+)?)'
    named = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    found = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(sample, line)
            assert match["name"] in named
            found[line.rpartition(" ")[0]] = float(match["value"])
    assert found["srppo_sequences_total"] == 5
    assert found["srppo_tokens_total"] == sum(len(p) + len(r) for p, r in rows)
    assert found["srppo_queue_tokens"] == 0
    assert found['srppo_answers_total{status="200"}'] == 1
    assert found['srppo_answers_total{status="422"}'] == 1


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "sequences: Field required"),
        ({"sequences": []}, "sequences: "),
        ({"sequences": [{"prompt_ids": [1], "response_ids": []}]}, "response_ids"),
        ({"sequences": [{"prompt_ids": ["1"], "response_ids": [1]}]}, "prompt_ids.0"),
        ({"sequences": [{"prompt_ids": [True], "response_ids": [1]}]}, "prompt_ids.0"),
        ({"sequences": [{"prompt_ids": [1], "response_ids": [24]}]}, "token id 24"),
        ({"sequences": [{"prompt_ids": [1] * 60, "response_ids": [1] * 5}]}, "65 tokens"),
        ({"sequences": [{"prompt_ids": [1], "response_ids": [1]}], "other": 1}, "other"),
        ([], "the body"),
    ],
)
def test_what_cannot_be_scored_is_told(client, body, message):
    answer = client.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert message in told(answer)


def test_a_body_without_its_header_is_told_which(client):
    body = json.dumps(request([([1], [2])]))
    answer = client.post("/v1/score", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 422
    assert "content-type: application/json" in told(answer)


def test_one_bad_sequence_refuses_its_request_and_no_other(client):
    answer = client.post("/v1/score", json=request([([1], [2]), ([1], [24])]))
    assert answer.status_code == 422
    assert client.post("/v1/score", json=request([([1], [2])])).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score_text", {"sequences": [{"prompt": "a", "response": "", "ended": False}]}),
        ("/v1/score_text", {"sequences": [{"messages": [], "response": "a"}]}),
        ("/openrlhf", {"query": ["a b"], "prompts": ["b"]}),
        ("/openrlhf", {"query": ["a b"], "prompts": ["a", "b"]}),
    ],
)
def test_text_that_cannot_be_scored_is_told(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert told(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score_text", r'{"sequences": [{"prompt": "\ud800", "response": "b"}]}'),
        (
            "/v1/score_text",
            r'{"sequences":[{"messages": [{"role":"user","content":"\udc00"}], "response": ""}]}',
        ),
        ("/openrlhf", r'{"query": ["a \ud83d"], "prompts": ["a"]}'),
        ("/v1/score_text", r'{"\ud800": 1, "sequences": []}'),
    ],
)
def test_half_a_character_is_told(client, path, body):
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert told(answer)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"sequences": NaN', b"nonsense"])
def test_a_body_that_is_not_json_is_told(client, body):
    answer = client.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert told(answer)


def test_unknown_paths_and_methods(client):
    assert told(client.get("/nowhere"))
    answer = client.get("/v1/score")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_request_that_never_fits_is_not_told_to_try_again():
    with serving(scorer(), Limits(queue_tokens=8)) as client:
        answer = client.post("/v1/score", json=request([([1] * 4, [2] * 5)]))
        assert answer.status_code == 413
        assert "9 tokens are more than the queue's 8" in told(answer)


# --- who may ask ---------------------------------------------------------------------------------

ATTEMPTS = ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ü"]


def test_without_the_token_nothing_is_answered_but_that_it_lives():
    with serving(scorer(), token=TOKEN) as client:
        body = request([([1], [2])])
        for given in ATTEMPTS:
            headers = {"Authorization": given.encode("latin-1")}
            for method, path in (
                ("POST", "/v1/score"),
                ("GET", "/metrics"),
                ("GET", "/v1/model"),
                ("GET", "/openapi.json"),
                ("GET", "/nowhere"),
            ):
                answer = client.request(method, path, json=body, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in told(answer)
            assert client.get("/health", headers=headers).status_code == 200
        assert client.post("/v1/score", json=body).status_code == 200


# --- full, late, gone ----------------------------------------------------------------------------


class Held:
    """A scorer that waits until it is told to go on."""

    def __init__(self) -> None:
        self.inner = scorer()
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def score(self, prompts, responses):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append(len(prompts))
        return self.inner.score(prompts, responses)


@pytest.fixture
def held():
    made = Held()
    yield made
    made.go.set()


def posting(client, body) -> tuple[threading.Thread, list]:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/score", json=body)))
    thread.start()
    return thread, answers


def test_a_full_queue_says_when_to_come_again(held):
    with serving(held, Limits(queue_tokens=6)) as client:
        first, answers = posting(client, request([([1], [2])]))
        assert held.begun.wait(30)
        second, more = posting(client, request([([1], [2])] * 3))
        while "srppo_queue_tokens 6" not in client.get("/metrics").text:
            pass
        answer = client.post("/v1/score", json=request([([1], [2])]))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "queue is full" in told(answer)
        held.go.set()
        first.join(), second.join()
        assert [a.status_code for a in answers + more] == [200, 200]


def test_what_is_not_scored_in_time_is_told(held):
    with serving(held, Limits(seconds=0.2)) as client:
        answer = client.post("/v1/score", json=request([([1], [2])]))
        assert answer.status_code == 504
        assert "not scored within 0.2 seconds" in told(answer)
        held.go.set()
        assert client.post("/v1/score", json=request([([1], [3])])).status_code == 200


def test_a_client_that_goes_is_forgotten_and_the_queue_goes_on(held):
    with serving(held) as client:
        first, answers = posting(client, request([([1], [2])]))
        assert held.begun.wait(30)
        gone = socket.create_connection((client.base_url.host, client.base_url.port))
        body = b'{"sequences": [{"prompt_ids": [1], "response_ids": [2, 3, 4]}]}'
        gone.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        while "srppo_queue_tokens 4" not in client.get("/metrics").text:
            pass
        gone.close()
        while 'status="499"} 1' not in client.get("/metrics").text:
            pass
        last, more = posting(client, request([([1], [5])]))
        held.go.set()
        first.join(), last.join()
        assert [a.status_code for a in answers + more] == [200, 200]
    assert held.batches == [1, 1]  # not the one that went


def test_an_error_of_our_own_is_told_without_its_details(held, caplog):
    def broken(prompts, responses):
        raise RuntimeError("a path of the server")

    held.score = broken
    with serving(held) as client:
        answer = client.post("/v1/score", json=request([([1], [2])]))
        assert answer.status_code == 500
        assert "a path of the server" not in told(answer)
        assert client.get("/health").status_code == 200
    assert "a path of the server" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scoring_thread_that_has_ended_is_told(held):
    def ends(prompts, responses):
        raise SystemExit

    held.score = ends
    with serving(held, Limits(seconds=0.2)) as client:
        assert client.post("/v1/score", json=request([([1], [2])])).status_code == 504
        answer = client.get("/health")
        assert answer.status_code == 503
        assert "Start it anew" in told(answer)
