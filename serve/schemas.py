"""What a client may ask and what it gets: OpenAI's images API, with `seed`, `negative_prompt`, `steps`, `guidance`.

Every refusal has OpenAI's error body, `{"error": {"message", "type", "param", "code"}}`. No HTTP server lives here.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_BODY_BYTES = 256 * 1024
MAX_PROMPT_CHARACTERS = 4_000
MAX_SEED = 2**53 - 1  # the largest integer that a browser's JSON holds exactly
STEPS_OF_QUALITY = {"low": 12, "medium": 25, "standard": 25, "auto": 25, "high": 50, "hd": 50}
MOST_SIDE_PX, MOST_PIXELS = 2048, 2 * 1024**2  # of a model that doesn't say its own size
SIDE_MULTIPLE_PX = 32  # the U-Net halves the 8-fold smaller latents twice


Body = TypeVar("Body", bound=BaseModel)
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal with its HTTP status; becomes OpenAI's error body."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 5
    ) -> None:
        """`retry_after_s` is told with 429 and 503."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after_s = (
            status,
            message,
            param,
            code,
            retry_after_s,
        )

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Unknown fields are refused, null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=8)
    size: str = "auto"  # "auto" is the model's own size
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(default=100, ge=0, le=100)
    user: str | None = Field(default=None, max_length=512)
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)  # of each image, while it is drawn
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)  # image i of n is drawn from seed + i
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARACTERS)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance: float = Field(default=4.0, ge=0.0, le=30.0)
    scheduler: Literal["ddim", "euler", "dpm++2m"] | None = None  # None is the model's own choice, DDIM of ours
    progress: bool = False  # with stream: an event of ours after each step

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt

    @field_validator("size")
    @classmethod
    def _size_is_readable(cls, size: str) -> str:
        if size != "auto" and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size, re.ASCII):
            raise ValueError(f'expected "auto" or WIDTHxHEIGHT such as "64x64", got "{size[:40]}"')
        return size

    @model_validator(mode="after")
    def _fields_agree(self) -> ImagesRequest:
        if self.output_format == "png" and self.output_compression != 100:
            raise ValueError("output_compression is for output_format jpeg and webp; png is always lossless")
        if not self.stream and (self.partial_images or self.progress):
            raise ValueError("partial_images and progress are for stream true")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 must be at most {MAX_SEED}")
        return self

    @property
    def sampler_steps(self) -> int:
        """`steps` where given, else those of `quality`."""
        return self.steps if self.steps is not None else STEPS_OF_QUALITY[self.quality]

    def size_px(self, own_px: int | None) -> tuple[int | None, int | None]:
        """(width, height) in pixels for a model trained at `own_px`, None where nobody knows. ApiError 400 for a size it cannot draw."""
        if self.size == "auto":
            return own_px, own_px
        width, height = (int(side) for side in self.size.split("x"))
        most_pixels = MOST_PIXELS if own_px is None else 2 * own_px**2
        low, high = (
            (SIDE_MULTIPLE_PX, MOST_SIDE_PX) if own_px is None else (max(SIDE_MULTIPLE_PX, own_px // 2), own_px * 2)
        )
        fits = all(low <= side <= high and side % SIDE_MULTIPLE_PX == 0 for side in (width, height))
        if not fits or width * height > most_pixels:
            own = "" if own_px is None else f"this model draws {own_px}x{own_px}; "
            raise ApiError(
                400,
                f"size: {own}sides may be multiples of {SIDE_MULTIPLE_PX} from {low} to "
                f"{high} with at most {most_pixels} pixels altogether, got {self.size}",
                param="size",
                code="invalid_value",
            )
        return width, height


class JobRequest(ImagesRequest):
    """The body of `POST /v1/images/jobs`: the same, but nothing is streamed."""

    stream: Literal[False] = False


class ComparisonRequest(ImagesRequest):
    """The body of `POST /v1/images/comparisons`: one picture by each of two models."""

    model: None = None
    models: list[str] | None = Field(default=None, min_length=2, max_length=2)  # None: the first two
    n: Literal[1] = 1
    stream: Literal[False] = False


class VoteRequest(BaseModel):
    """The body of `POST /v1/images/comparisons/{id}/vote`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    choice: Literal["left", "right", "tie"]


def parse_request(body: bytes, kind: type[Body]) -> Body:
    """The request that a JSON body states. ApiError 400 names the first field that is wrong and why."""
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _NotANumberError) else "the body is not valid JSON"
        raise ApiError(400, reason, code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    try:
        return kind.model_validate({k: v for k, v in fields.items() if v is not None or k in required})
    except ValidationError as error:
        raise _refusal(error) from None


class _NotANumberError(ValueError):
    """NaN or Infinity, which JSON does not have but Python reads."""


def _refuse_constant(constant: str) -> None:
    raise _NotANumberError(f"the body holds {constant}; numbers must be finite")


def _refusal(error: ValidationError) -> ApiError:
    """The first fault, in a sentence a client's developer understands."""
    fault: dict[str, Any] = dict(error.errors(include_url=False, include_context=False, include_input=True)[0])
    param = ".".join(str(part) for part in fault["loc"]) or None
    shown = (param or "")[:80]
    kind = fault["type"]
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field: {shown}", param=shown, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{shown} is required", param=param, code="missing_required_parameter")
    if param == "response_format" and fault["input"] == "url":
        reason = "this server keeps no images to link to; ask for b64_json"
        return ApiError(400, f"response_format: {reason}", param=param, code="unsupported_value")
    reason = str(fault["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    return ApiError(400, f"{shown}: {reason}" if param else reason, param=param, code="invalid_value")
