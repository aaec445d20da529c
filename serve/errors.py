"""What an error of the deployments that draw, or of the way to them, means to a client."""

from __future__ import annotations

import logging

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from emu_ray.errors import RecipeError
from serve.painter import OffensiveError
from serve.replica import ModelFailedError
from serve.schemas import ApiError

logger = logging.getLogger("ray.serve")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error that a painter or the way to it raised; what it isn't told is in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests are waiting; try again later", code="overloaded")
    if isinstance(error, (RayActorError, DeploymentUnavailableError)):
        return ApiError(503, "the model is restarting; try again shortly", code="unavailable")
    if isinstance(error, ModelFailedError):
        return ApiError(
            503, "this model can't be loaded; the server's log says why", param="model", code="model_failed"
        )
    if isinstance(error, OffensiveError):
        return ApiError(400, str(_cause(error)), param="prompt", code="moderation_blocked")
    if isinstance(error, RecipeError):
        return ApiError(400, str(_cause(error)), code="invalid_value")
    logger.error("drawing failed", exc_info=error)
    return ApiError(500, "drawing failed; the server's log says why", code="internal_error")


def _cause(error: BaseException) -> BaseException:
    """The error itself, of one that Ray wrapped."""
    found: BaseException = getattr(error, "cause", error)
    return found
