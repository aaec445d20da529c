"""The probability of one label by an image classifier of `transformers`, e.g. `Falconsai/nsfw_image_detection`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from emu_ray.errors import InputError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Which classifier, and which of its labels is the score."""

    model: str  # a folder or a repository on the hub
    label: str  # e.g. "nsfw"
    dtype: str = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"expected a dtype of {', '.join(DTYPES)}, found {self.dtype!r}")


class ClassifierScorer:
    """The classifier and its preprocessing, loaded once; InputError when it can't be had or lacks the label."""

    def __init__(self, settings: Classifier, device: str = "cpu") -> None:
        self.device, self.dtype = device, DTYPES[settings.dtype]
        self.label = check_classifier(settings)
        try:
            self.processor = AutoImageProcessor.from_pretrained(settings.model, revision=settings.revision)
            model = AutoModelForImageClassification.from_pretrained(
                settings.model, revision=settings.revision, dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            raise InputError(f"can't load the classifier {settings.model}: {str(error).splitlines()[0]}") from error
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def measure(self, pictures: list[np.ndarray]) -> np.ndarray:
        """(N,) float32, 0 to 1, of N pictures, each (H, W, 3) uint8 of any size."""
        inputs = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        logits_NL = self.model(pixel_values=inputs["pixel_values"].to(self.device, self.dtype)).logits.float()
        return logits_NL.softmax(1)[:, self.label].cpu().numpy()


def check_classifier(settings: Classifier) -> int:
    """The number of the label, from the model's config alone; InputError as for loading. Call it on the driver."""
    try:
        labels = AutoConfig.from_pretrained(settings.model, revision=settings.revision).id2label
    except (OSError, ValueError) as error:
        raise InputError(f"can't find the classifier {settings.model}: {str(error).splitlines()[0]}") from error
    numbers = [int(number) for number, label in labels.items() if label == settings.label]
    if not numbers:
        raise InputError(
            f"{settings.model} tells apart {', '.join(labels.values())}: {settings.label!r} is none of them"
        )
    return numbers[0]
