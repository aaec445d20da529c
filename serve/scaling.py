"""How many replicas a model needs: by the seconds of work that lie ahead, not by requests, of which one may be a hundred times another."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

METRIC = "waiting_s"  # what `Painter.record_autoscaling_stats` tells


class ByWork:
    """A policy for Ray Serve, which adds its delays and bounds, and starts the first replica when a request waits for none."""

    def __init__(self, seconds_ahead: float) -> None:
        """`seconds_ahead` of work for each replica."""
        self.seconds_ahead = seconds_ahead

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state."""
        work = sum((ctx.aggregated_metrics or {}).get(METRIC, {}).values())
        least = 1 if ctx.total_num_requests > 0 else 0  # work isn't known before a size was drawn once
        return max(least, math.ceil(work / self.seconds_ahead)), {}
