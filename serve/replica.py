"""The deployments that hold networks: `PainterReplica` draws, `EncoderReplica` encodes captions where text encoders live elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from emu_ray.errors import EmuRayError, InputError, first_line
from emu_ray.stations.folders import local_folder
from serve.args import ServeArgs
from serve.catalogue import ServedModel
from serve.metrics import EngineMetrics
from serve.painter import Painted, Painter, PaintJob, Safety
from serve.scaling import METRIC

if TYPE_CHECKING:
    from emu_ray.generation.stepping.tickets import AnyEngine
    from emu_ray.models.text import TextFeatures

logger = logging.getLogger("ray.serve")
TRY_AGAIN_S = 60.0  # a model that couldn't be loaded is not tried for so long
TEXTS_KEPT = 256
Features = tuple[NDArray[np.float32], NDArray[np.float32] | None]


class ModelFailedError(EmuRayError):
    """A served model can't be loaded; the others are served on."""


class _Held:
    """An engine in Ray's cache of models, which calls `__del__` on what has to leave it."""

    def __init__(self, engine: AnyEngine, left: Callable[[], None]) -> None:
        self.engine, self._left = engine, left

    def __del__(self) -> None:
        """Waits until what is on its way is drawn: the next model is loaded after that."""
        self.engine.close(at_once=False)
        self._left()


class PainterReplica:
    """Models in memory, at most `models_each`, least used first out, none before its drawings are finished."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, models: dict[str, ServedModel], args: ServeArgs, encoder: DeploymentHandle | None = None
    ) -> None:
        """Loads all models where they may stay; one that fails is told by `states`. InputError when none can be loaded."""
        import torch

        from emu_ray.generation.stepping.turns import Turns

        if args.device == "cpu":
            torch.set_num_threads(1)  # replicas share the cores: spinning threads of two make both many times slower
        self._models, self._args, self._turns = models, args, Turns()
        self._failed: dict[str, tuple[float, str]] = {}  # when, and why
        self._engines: dict[str, AnyEngine] = {}
        self._begun: set[str] = set()  # to be loaded
        self._loading: set[asyncio.Future[_Held]] = set()
        whole = list(dict.fromkeys(model.whole for model in models.values()))

        @ray_serve.multiplexed(max_num_models_per_replica=args.models_each or len(whole))
        async def held(name: str) -> _Held:
            self._begun.add(name)
            try:
                self._engines[name] = engine = await asyncio.to_thread(self._load, name)
            finally:
                self._begun.discard(name)
            return _Held(engine, lambda: self._forget(name, engine))

        self._held = held
        encode = None if encoder is None else _Captions(encoder).features
        self._painter = Painter(models, self._engine, encode, _safety(args))
        if len(whole) <= (args.models_each or len(whole)):
            errors = await asyncio.gather(*(self._engine(name) for name in whole), return_exceptions=True)
            if all(isinstance(error, ModelFailedError) for error in errors):
                raise next(error for error in errors if isinstance(error, ModelFailedError))

    def states(self) -> dict[str, str]:
        """Of each model: `loaded`, `loading`, `not loaded`, or `failed: WHY`."""
        told = {name: f"failed: {why}" for name, (_, why) in dict(self._failed).items()}
        told |= dict.fromkeys(set(self._begun), "loading")
        told |= {name: "loaded" for name in dict(self._engines) if name not in told}
        return {name: told.get(name, told.get(model.whole, "not loaded")) for name, model in self._models.items()}

    def waiting_s(self) -> float:
        """Seconds of work that lie ahead."""
        return sum(engine.waiting_s() for engine in list(self._engines.values()))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `serve/scaling.py`, by Ray Serve."""
        return {METRIC: self.waiting_s()}

    async def paint(self, job: PaintJob) -> list[bytes]:
        """See `Painter.paint`."""
        self._require_adapter(job)
        return await self._painter.paint(job)

    async def paint_live(self, job: PaintJob) -> AsyncIterator[Painted]:
        """See `Painter.paint_live`."""
        self._require_adapter(job)
        news = self._painter.paint_live(job)
        try:
            async for item in news:
                yield item
        finally:
            await news.aclose()  # type: ignore[attr-defined]

    def _require_adapter(self, job: PaintJob) -> None:
        if self._models[job.model].lora is not None and job.model in self._failed:
            raise ModelFailedError(self._failed[job.model][1])

    async def _engine(self, whole: str) -> AnyEngine:
        at, why = self._failed.get(whole, (0.0, ""))
        if why and time.monotonic() < at + TRY_AGAIN_S:
            raise ModelFailedError(why)
        loading = asyncio.ensure_future(self._held(whole))
        # it goes on when who asked for it leaves: half loaded it would stay in memory for ever
        self._loading.add(loading)
        loading.add_done_callback(self._loading.discard)
        found: AnyEngine = (await asyncio.shield(loading)).engine
        return found

    def _load(self, whole: str) -> AnyEngine:
        """In a thread of its own: others go on drawing."""
        from emu_ray.generation.stepping.loading import Lora, Placement, load_engine

        model = self._models[whole]
        loras = {
            name: Lora(folder=local_folder(other.lora), scale=other.scale)
            for name, other in self._models.items()
            if other.whole == whole and other.lora is not None
        }
        placement = Placement(
            device=self._args.device,
            dtype=self._args.dtype,
            cuda_graphs=self._args.cuda_graphs,
            turns=self._turns,
            watcher=EngineMetrics(whole),
        )
        try:
            folder = Path(local_folder(model.checkpoint))
            without_texts = self._args.encoder_replicas > 0
            engine = load_engine(folder, loras, placement, without_texts=without_texts, failed=self._note)
        except Exception as error:  # whatever diffusers, torch or the disk raise: the other models are served on
            self._note(whole, error)
            raise ModelFailedError(self._failed[whole][1]) from error
        self._failed.pop(whole, None)
        return engine

    def _note(self, name: str, error: Exception) -> None:
        logger.error("the model %s can't be loaded: %s", name, error)
        self._failed[name] = (time.monotonic(), first_line(error)[:300])

    def _forget(self, whole: str, engine: AnyEngine) -> None:
        if self._engines.get(whole) is engine:
            del self._engines[whole]


class EncoderReplica:
    """The text encoders of all whole models, and nothing else of them."""

    def __init__(self, models: dict[str, ServedModel], args: ServeArgs) -> None:
        """Loads them; of models that are no family of ours nothing, since their pipelines encode texts themselves."""
        import torch

        from emu_ray.generation.families import FAMILIES
        from emu_ray.generation.stepping.loading import pipeline_name

        if args.device == "cpu":
            torch.set_num_threads(1)
        self._pipelines = {}
        for name, folder in {model.whole: Path(local_folder(model.checkpoint)) for model in models.values()}.items():
            if family := FAMILIES.get(pipeline_name(folder)):
                # one that can't be loaded fails where it draws, which is told
                with contextlib.suppress(InputError):
                    self._pipelines[name] = family.load(folder, without=("unet", "vae")).to(
                        args.device, getattr(torch, args.dtype)
                    )

    def features(self, whole: str, caption: str | None) -> Features | None:
        """Of one caption or of none, as arrays; RecipeError for a caption that is too long, None for a model that encodes its own."""
        from emu_ray.generation.stepping.model import text_features

        if whole not in self._pipelines:
            return None
        found = text_features(self._pipelines[whole], caption)
        pooled = None if found.pooled_BD is None else found.pooled_BD.float().cpu().numpy()
        return found.tokens_BTD.float().cpu().numpy(), pooled


class _Captions:
    """What the encoders said to the newest captions."""

    def __init__(self, encoder: DeploymentHandle) -> None:
        self._encoder = encoder
        self._kept: OrderedDict[tuple[str, str | None], Features | None] = OrderedDict()

    async def features(self, whole: str, caption: str | None) -> TextFeatures | None:
        """None for a model that encodes its own."""
        import torch

        from emu_ray.models.text import TextFeatures

        if (whole, caption) not in self._kept:
            self._kept[whole, caption] = await self._encoder.features.remote(whole, caption)
        self._kept.move_to_end((whole, caption))
        found: Any = self._kept[whole, caption]
        while len(self._kept) > TEXTS_KEPT:
            self._kept.popitem(last=False)
        if found is None:
            return None
        tokens, pooled = found
        return TextFeatures(torch.tensor(tokens), None if pooled is None else torch.tensor(pooled))


def _safety(args: ServeArgs) -> Safety | None:
    if args.safety is None:
        return None
    from serve.safety import OffensiveCheck

    return OffensiveCheck(args.safety, args.device)
