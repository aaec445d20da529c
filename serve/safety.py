"""The safety check of what a model drew: curation's own scorer, so that what is kept out of training is kept out of answers too."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from emu_ray.curation.clip_scorer import ClipModel, ClipScorer, check
from serve.args import SafetyArgs
from serve.painter import OffensiveError


def require_safety(args: SafetyArgs) -> ClipModel:
    """The scorer's recipe; InputError for a head that is missing or of another CLIP. It reads the head and no CLIP: call it on the driver."""
    model = ClipModel(
        name=args.clip, pretrained=args.pretrained, folder=args.clip_folder, offensive_head=args.offensive_head,
        safety_concepts=args.safety_concepts,
    )  # fmt: skip
    check(model)
    return model


class OffensiveCheck:
    """Rates pictures by a head on CLIP; for any thread."""

    def __init__(self, args: SafetyArgs, device: str) -> None:
        """Loads CLIP and the head; InputError for what can't be loaded."""
        self._scorer, self._most = ClipScorer(require_safety(args), device), args.most
        self._lock = threading.Lock()

    def check(self, image: NDArray[np.uint8]) -> None:
        """OffensiveError for a picture, (H, W, 3), that is rated above the bound."""
        with self._lock:
            (rating,) = self._scorer.offensive([image])
        if rating > self._most:
            raise OffensiveError("the picture was drawn, but the safety check holds it back; another prompt may pass")
