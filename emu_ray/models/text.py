"""Two text encoders and how they are joined: CLIP's text tower and T5 (arXiv 2309.15807, section 3.1).

The paper does not state how the two are joined. Ours: the token features of both stand one after the other, each in its own block of
channels and zero in the other's, so that the U-Net's one linear `encoder_hid_proj` is two separate projections; nothing is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from emu_ray.errors import InputError, first_line


@dataclass(frozen=True, kw_only=True)
class TextEncoderSource:
    """Where the two encoders come from (folders in `transformers` layout or hub names) and how many tokens each reads; our choice but for the models."""

    clip: str = "openai/clip-vit-large-patch14"
    t5: str = "google/t5-v1_1-xxl"
    clip_tokens: int = 77
    t5_tokens: int = 77


def fetch_text_encoders(source: TextEncoderSource, folder: Path) -> None:
    """Writes `folder`/{text_encoder, tokenizer, text_encoder_2, tokenizer_2}; InputError when one can't be had.

    The tokenizers carry how many tokens are read, which is where `EmuPipeline` looks.
    """
    try:
        clip, clip_tokenizer = CLIPTextModel.from_pretrained(source.clip), CLIPTokenizer.from_pretrained(source.clip)
        t5, t5_tokenizer = T5EncoderModel.from_pretrained(source.t5), AutoTokenizer.from_pretrained(source.t5)
    except (OSError, ValueError) as error:
        raise InputError(
            f"can't load the text encoders {source.clip} and {source.t5}: {first_line(error)}; "
            "give folders in transformers layout, or names of a hub that this machine reaches"
        ) from error
    clip_tokenizer.model_max_length, t5_tokenizer.model_max_length = source.clip_tokens, source.t5_tokens
    parts = {"text_encoder": clip, "tokenizer": clip_tokenizer, "text_encoder_2": t5, "tokenizer_2": t5_tokenizer}
    for name, part in parts.items():
        part.save_pretrained(folder / name)


@dataclass(frozen=True)
class TextFeatures:
    """What a U-Net is told of captions: features of every token and, where it was trained so, one vector for the whole caption."""

    tokens_BTD: Tensor
    pooled_BD: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.pooled_BD is None or len(self.pooled_BD) == len(self.tokens_BTD)


class TextEncoders(nn.Module):
    """Captions to token features (B, clip_tokens + t5_tokens, clip width + T5 width); frozen."""

    def __init__(
        self,
        clip: CLIPTextModel,
        clip_tokenizer: PreTrainedTokenizerBase,
        t5: T5EncoderModel,
        t5_tokenizer: PreTrainedTokenizerBase,
        *,
        clip_tokens: int,
        t5_tokens: int,
    ) -> None:
        super().__init__()
        self.clip, self.t5 = clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.clip_tokens, self.t5_tokens = clip_tokens, t5_tokens

    @property
    def width(self) -> int:
        """Channels of the joined features."""
        return self.clip.config.hidden_size + self.t5.config.d_model

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Joined features (B, clip_tokens + t5_tokens, width); longer captions are cut. An empty caption is the unconditional one."""
        return self.features(captions).tokens_BTD

    @torch.no_grad()
    def features(self, captions: list[str]) -> TextFeatures:
        """The joined features and CLIP's pooled one, (B, CLIP width): what its last layer says at the end of the text."""
        device = next(self.clip.parameters()).device
        clip_ids = tokenize(self.clip_tokenizer, captions, self.clip_tokens).to(device)
        t5_ids = tokenize(self.t5_tokenizer, captions, self.t5_tokens).to(device)
        clip = self.clip(clip_ids)
        mask = (t5_ids != self.t5_tokenizer.pad_token_id).long()
        t5_BTD = self.t5(t5_ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return TextFeatures(
            join_tokens(clip.last_hidden_state, t5_BTD.to(clip.last_hidden_state.dtype)), clip.pooler_output
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int) -> Tensor:
    """Token ids (B, length), padded and cut."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def join_tokens(first_BTD: Tensor, second_BTD: Tensor) -> Tensor:
    """(B, T1, D1) and (B, T2, D2) to (B, T1 + T2, D1 + D2): block-diagonal, so one linear map treats each block by itself."""
    first = nn.functional.pad(first_BTD, (0, second_BTD.shape[-1]))
    second = nn.functional.pad(second_BTD, (first_BTD.shape[-1], 0))
    return torch.cat([first, second], dim=1)
