"""The probability of one label by an image classifier of `transformers`, e.g. `Falconsai/nsfw_image_detection`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from emu_ray.errors import InputError, RecipeError, first_line
from emu_ray.stations.folders import content_fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Which classifier, and which of its labels is the score."""

    model: str  # a folder or a repository on the hub
    label: str  # e.g. "nsfw"
    dtype: str = "float32"
    revision: str | None = None  # of the repository: a commit, a branch or a tag; None: its main branch

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"expected a dtype of {', '.join(DTYPES)}, found {self.dtype!r}")

    def resolved(self) -> Classifier:
        """With the commit that `revision` means now, so that all actors load the same; a folder as it is.

        The hub says it, or this machine's cache where the hub can't be reached; InputError when neither does.
        """
        if Path(self.model).is_dir():
            return self
        try:
            config = hf_hub_download(self.model, "config.json", revision=self.revision)
        except (OSError, ValueError) as error:
            raise _not_found(self, error) from error
        return replace(self, revision=Path(config).parent.name)  # .../snapshots/COMMIT/config.json


class ClassifierScorer:
    """The classifier and its preprocessing, loaded once; InputError when it can't be had or lacks the label."""

    def __init__(self, settings: Classifier, device: str = "cpu") -> None:
        self.device, self.dtype = device, DTYPES[settings.dtype]
        self.label = _label_number(settings)
        try:
            self.processor = AutoImageProcessor.from_pretrained(settings.model, revision=settings.revision)
            model = AutoModelForImageClassification.from_pretrained(
                settings.model, revision=settings.revision, dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            raise InputError(f"can't load the classifier {settings.model}: {first_line(error)}") from error
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def measure(self, pictures: list[np.ndarray]) -> np.ndarray:
        """(N,) float32, 0 to 1, of N pictures, each (H, W, 3) uint8 of any size."""
        inputs = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        logits_NL = self.model(pixel_values=inputs["pixel_values"].to(self.device, self.dtype)).logits.float()
        return logits_NL.softmax(1)[:, self.label].cpu().numpy()


def check_classifier(settings: Classifier) -> str:
    """What names its weights in a station's inputs: the digest of its folder, or its revision on the hub.

    InputError, from the model's config alone, as for loading. Call it on the driver.
    """
    _label_number(settings)
    return content_fingerprint(settings.model) if Path(settings.model).is_dir() else settings.revision or "main"


def _label_number(settings: Classifier) -> int:
    try:
        labels = AutoConfig.from_pretrained(settings.model, revision=settings.revision).id2label
    except (OSError, ValueError) as error:
        raise _not_found(settings, error) from error
    numbers = [int(number) for number, label in labels.items() if label == settings.label]
    if not numbers:
        raise InputError(
            f"{settings.model} tells apart {', '.join(labels.values())}: {settings.label!r} is none of them"
        )
    return numbers[0]


def _not_found(settings: Classifier, error: Exception) -> InputError:
    return InputError(f"can't find the classifier {settings.model}: {first_line(error)}")
