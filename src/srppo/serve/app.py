"""The scoring server's endpoints. Every answer is JSON, but for /metrics, errors included."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from srppo import __version__
from srppo.errors import DataError, SrppoError
from srppo.serve.batcher import QueueFullError
from srppo.serve.exposition import exposition
from srppo.serve.guard import OPEN, Guard, RefusedError
from srppo.serve.limits import Limits
from srppo.serve.messages import (
    PROBLEMS,
    UNKNOWN,
    Health,
    ModelCard,
    OpenRLHFQuery,
    OpenRLHFRewards,
    ScoreIds,
    Scores,
    ScoreText,
    TextScore,
    TextScores,
)
from srppo.serve.scorer import CoherentScorer
from srppo.serve.service import Service

EXPECTED = (RefusedError, QueueFullError, RequestValidationError, SrppoError, HTTPException)


def create_app(
    scorer: CoherentScorer, base: str, sft: str, limits: Limits, token: str | None
) -> ASGIApp:
    """The server as ASGI application. `base` and `sft` are the models' names, for whoever asks;
    `token`, if any, is asked of every request."""
    service = Service(scorer, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batcher.close()

    app = FastAPI(
        title="srppo scoring server",
        description="log pi_sft - log pi_base of responses, token by token",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    guard = Guard(app, limits, token)
    for error in (*EXPECTED, Exception):
        app.add_exception_handler(error, _told)
    # For the description only: the guard has asked before anything gets here.
    secured = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if token else []}
    reading: dict[str, Any] = secured | {"responses": {401: UNKNOWN}}
    scoring: dict[str, Any] = secured | {"responses": PROBLEMS}

    @app.post("/v1/score", **scoring)
    async def score(request: Request, body: ScoreIds) -> Scores:
        """Token ids in, log-ratios of the response tokens out."""
        sequences = [(s.prompt_ids, s.response_ids) for s in body.sequences]
        return Scores(scores=await service.scores(request, sequences))

    @app.post("/v1/score_text", **scoring)
    async def score_text(request: Request, body: ScoreText) -> TextScores:
        """Text in, tokenized as training does in the chat template, or as it stands."""
        sequences = await service.tokenized(service.encode, body.sequences)
        scores = await service.scores(request, sequences)
        return TextScores(
            scores=[
                TextScore(prompt_ids=prompt, response_ids=response, **score.model_dump())
                for (prompt, response), score in zip(sequences, scores, strict=True)
            ]
        )

    @app.post("/openrlhf", **scoring)
    async def openrlhf(request: Request, body: OpenRLHFQuery) -> OpenRLHFRewards:
        """OpenRLHF's `--reward.remote_url`. Text only: tokens may differ from those sampled."""
        if len(body.query) != len(body.prompts):
            raise DataError(
                f"{len(body.query)} queries and {len(body.prompts)} prompts: which belong together "
                "is not known. Send one prompt for each query."
            )
        pairs = list(zip(body.query, body.prompts, strict=True))
        sequences = await service.tokenized(lambda pair: scorer.split(*pair), pairs)
        scores = await service.scores(request, sequences)
        rewards = [score.reward for score in scores]
        tokens = [float(len(score.log_ratios)) for score in scores]
        return OpenRLHFRewards(
            rewards=rewards, scores=rewards, extra_logs={"coherent_tokens": tokens}
        )

    @app.get("/v1/model", **reading)
    async def model() -> ModelCard:
        """What is scored with: a client can see whether it speaks the same tokens."""
        return ModelCard(
            base=base,
            sft=sft,
            vocab_size=scorer.vocab_size,
            context=scorer.context,
            eos_token_id=scorer.tokenizer.eos_token_id,
            version=__version__,
        )

    @app.get(OPEN, responses={503: PROBLEMS[503]})
    async def health() -> Health:
        """Whether requests will be answered. Asks for no token."""
        if not service.batcher.alive:
            raise RefusedError(503, "scoring has ended: nothing will be answered. Start it anew.")
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse, **reading)
    async def metrics() -> str:
        """For Prometheus, in its text format."""
        return exposition(service.batcher, guard.answers)

    def description() -> dict[str, Any]:
        """With what only the models know of token ids."""
        found = FastAPI.openapi(app)
        for ids in found["components"]["schemas"]["IdSequence"]["properties"].values():
            ids["items"]["maximum"] = scorer.vocab_size - 1
        return found

    app.openapi = description  # type: ignore[method-assign]
    return guard


async def _told(request: Request, error: Exception) -> JSONResponse:
    """Whatever went wrong, as the client reads it."""
    if isinstance(error, QueueFullError):
        error = RefusedError(
            503,
            f"the queue is full: nothing was scored. Try again in {error.retry_after} seconds.",
            retry_after=str(error.retry_after),
        )
    if isinstance(error, RefusedError):
        return error.response()
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)
    if isinstance(error, SrppoError):
        return RefusedError(422 if isinstance(error, DataError) else 500, str(error)).response()
    return RefusedError(500, "an error of the server's own; its output says which.").response()


def _invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    place = place.encode("utf-8", "backslashreplace").decode()  # names of unknown fields, too
    if first["type"] == "json_invalid":
        return RefusedError(
            400, f"the body is not JSON (at byte {place}: {first['ctx']['error']})."
        ).response()
    return RefusedError(
        422,
        f"{place}: {first['msg']}. /openapi.json says what can be sent."
        if place
        else "the body is no JSON object. Send one with the header content-type: application/json. "
        "/openapi.json says what it can hold.",
    ).response()
