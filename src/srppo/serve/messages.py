"""What the scoring server is asked and what it answers, as JSON."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Role = Literal["system", "user", "assistant"]


class Strict(BaseModel):
    """No unknown fields, no "1" for 1."""

    model_config = ConfigDict(strict=True, extra="forbid")


def _integers(ids: Any) -> Any:
    """1.0 is an integer in JSON."""
    if not isinstance(ids, list):
        return ids
    return [int(i) if isinstance(i, float) and i.is_integer() else i for i in ids]


def _encodable(text: str) -> str:
    """JSON can spell half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds {text[error.start]!a} at character {error.start}, half of a pair that is one "
            "character: no tokenizer reads it. Send valid Unicode"
        ) from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_integers)]


class IdSequence(Strict):
    """A prompt and its response as token ids, without padding."""

    prompt_ids: TokenIds = Field(min_length=1)
    response_ids: TokenIds = Field(min_length=1)
    """With the EOS token where the response ended by itself."""


class ScoreIds(Strict):
    """What is to be scored, as token ids."""

    sequences: list[IdSequence] = Field(min_length=1)


class Turn(Strict):
    """A turn of a conversation."""

    role: Role
    content: Text


class Chat(Strict):
    """A conversation up to where the response starts, for the chat template; and the response."""

    messages: list[Turn] = Field(min_length=1)
    response: Text
    ended: bool = True
    """By itself: EOS is its last token. False: it was cut off."""


class Plain(Strict):
    """Text as the model reads it: no template, control tokens spelt out."""

    prompt: Text = Field(min_length=1)
    response: Text
    ended: bool = True


class ScoreText(Strict):
    """What is to be scored, as text."""

    sequences: list[Chat | Plain] = Field(min_length=1)


class Score(BaseModel):
    """What a response is worth."""

    log_ratios: list[float]
    """log pi_sft - log pi_base of each response token, nats."""
    reward: float
    """Their sum."""


class TextScore(Score):
    """The same, and which tokens were scored."""

    prompt_ids: list[int]
    response_ids: list[int]


class Scores(BaseModel):
    """In the order of the sequences."""

    scores: list[Score]


class TextScores(BaseModel):
    """In the order of the sequences."""

    scores: list[TextScore]


class OpenRLHFQuery(BaseModel):
    """What OpenRLHF 0.11.2 posts (openrlhf/utils/agent.py, _fetch_rewards_via_http)."""

    model_config = ConfigDict(strict=True)

    query: list[Text] = Field(min_length=1)
    """Prompts with their responses, special tokens included."""
    prompts: list[Text] = Field(min_length=1)
    labels: list[Any] | None = None
    """Not used: the reward needs none."""


class OpenRLHFRewards(BaseModel):
    """What OpenRLHF reads from the answer."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class ModelCard(BaseModel):
    """What the server scores with."""

    base: str
    sft: str
    vocab_size: int
    context: int | None
    """Longest prompt with response, in tokens."""
    eos_token_id: int
    version: str


class Health(BaseModel):
    """`ok`, or an error with status 503."""

    status: Literal["ok"]


class Problem(BaseModel):
    """What was wrong, what follows from it, and what to do."""

    error: str


UNKNOWN = {
    "description": "The token is missing or wrong.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
"""Spelt out: as a model it would take the media type of the endpoint's answer."""
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not JSON."},
    401: UNKNOWN,
    408: {"model": Problem, "description": "The body arrived too slowly."},
    413: {"model": Problem, "description": "More bytes or tokens than the server takes at once."},
    422: {"model": Problem, "description": "JSON, but not what can be scored."},
    500: {"model": Problem, "description": "The models gave no numbers."},
    503: {"model": Problem, "description": "The queue is full; Retry-After says how long."},
    504: {"model": Problem, "description": "Not scored in time."},
}
