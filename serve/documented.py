"""What OpenAPI says of each route: bodies by their pydantic models, answers by example-sized schemas, errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_TEXT, _INTEGER = {"type": "string"}, {"type": "integer"}
_MAYBE_TEXT = {"type": ["string", "null"]}


def _object(**fields: Any) -> dict[str, Any]:
    """A schema whose named fields are there."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT))
LIVE = _object(status={"const": "ok"}, models=_list(_TEXT))
READY = _object(status={"enum": ["ok", "degraded"]}, models={"type": "object", "additionalProperties": _TEXT})
MODELS = _object(
    object={"const": "list"},
    data=_list(_object(id=_TEXT, object={"const": "model"}, created=_INTEGER, owned_by=_TEXT, status=_TEXT, size_px={"type": ["integer", "null"]}, lineage={"type": ["object", "null"]}, preference={"type": ["object", "null"]})),
    comparisons={"type": "boolean"},
)  # fmt: skip
PICTURE = _object(b64_json=_TEXT)
DRAWN = _object(
    created=_INTEGER, data=_list(_object(b64_json=_TEXT, seed=_INTEGER)), model=_TEXT, size=_TEXT, output_format=_TEXT
)
JOB = _object(
    id=_TEXT, object={"const": "image.job"}, created=_INTEGER, model=_TEXT,
    status={"enum": ["queued", "in_progress", "completed", "failed", "cancelled"]}, position={"type": ["integer", "null"]},
    images=_list(_object(image=_INTEGER, seed=_INTEGER, step=_INTEGER, steps=_INTEGER)), error={"type": ["object", "null"]},
)  # fmt: skip
JOBS = _object(object={"const": "list"}, data=_list(JOB))
COMPARED = _object(
    id=_TEXT, object={"const": "image.comparison"}, prompt=_TEXT, seed=_INTEGER, left=PICTURE, right=PICTURE
)
VOTED = _object(id=_TEXT, choice=_TEXT, left_model=_TEXT, right_model=_TEXT)
MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "An API key is needed, or isn't known.",
    403: "A page of another origin sent it.",
    404: "There is no such model, job or pair.",
    413: "The body is too large.",
    429: "Too many requests or images; `Retry-After` says when to try again.",
    500: "Drawing failed; the server's log says why.",
    503: "The model can't answer now; `Retry-After` says when to try again.",
}


def documented(
    summary: str, answer: dict[str, Any], *errors: int, body: type[BaseModel] | None = None, status: int = 200
) -> dict[str, Any]:
    """A route's keywords. Bodies are parsed by `serve/schemas.py`, which FastAPI is only told of."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": "Done.", "content": {"application/json": {"schema": answer}}}
    }
    for error in {*errors, *({403} if 401 in errors else ())}:
        responses[error] = {"description": MEANINGS[error], "content": {"application/json": {"schema": ERROR}}}
    found: dict[str, Any] = {"summary": summary, "responses": responses, "status_code": status}
    if body is not None and "stream" in body.model_fields and body.model_fields["stream"].annotation is bool:
        responses[status]["content"]["text/event-stream"] = {"schema": _object(event=_TEXT, data=_TEXT)}
    if body is not None:
        schema = body.model_json_schema()
        found["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        }
    return found
