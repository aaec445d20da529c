"""The application that Ray Serve runs: one deployment for HTTP, one that draws, and one for text encoders where they live elsewhere.

    serve run serve.app:app checkpoint=/path/to/tuned base_checkpoint=/path/to/base

Nothing is loaded when this file is imported.
"""

from typing import Any

from ray import serve as ray_serve
from ray.serve.config import AutoscalingPolicy

from serve.access import read_keys
from serve.args import ServeArgs
from serve.catalogue import read_catalogue
from serve.replica import EncoderReplica, PainterReplica
from serve.scaling import ByWork
from serve.studio import Studio


def app(args: ServeArgs) -> ray_serve.Application:
    """The application that `serve run serve.app:app` and `serve deploy` build.

    InputError when a checkpoint is not a `diffusers` folder, StationHalfWrittenError when it is not finished.
    """
    models = read_catalogue(args)
    keys = None if args.keys_file is None else read_keys(args.keys_file)
    if args.safety is not None:
        from serve.safety import require_safety  # it brings open_clip along

        require_safety(args.safety)
    placed = {
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        "graceful_shutdown_timeout_s": args.timeout_s,  # what is being drawn is finished
    }
    given: list[Any] = [models, args]
    if args.encoder_replicas:
        encoder = ray_serve.deployment(EncoderReplica).options(  # type: ignore[attr-defined]
            name="encoder", num_replicas=args.encoder_replicas, **placed
        )
        given.append(encoder.bind(models, args))
    painter = ray_serve.deployment(PainterReplica).options(  # type: ignore[attr-defined]
        name="painter", max_ongoing_requests=args.max_together, **placed, **_replicas(args)
    )
    return Studio.bind(painter.bind(*given), models, args, keys)  # type: ignore[attr-defined]


def _replicas(args: ServeArgs) -> dict[str, Any]:
    if args.min_replicas == args.max_replicas:
        return {"num_replicas": args.max_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 2.0,
            "policy": AutoscalingPolicy(policy_function=ByWork, policy_kwargs={"seconds_ahead": args.seconds_ahead}),
        }
    }
