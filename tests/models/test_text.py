"""The joined text encoders, and the demo's CLIP in its two guises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from transformers import T5EncoderModel

from emu_ray.haystack.world import captions, draw_scenes
from emu_ray.models import small_clip, small_t5
from emu_ray.models.text import TextEncoders, join_tokens, tokenize

ODD = [
    "",
    " ",
    "a",
    "naïve café über",
    "日本語 の 写真",
    "🙂🙃",
    "don't  STOP  me-now!!! 1234567890",
    "tab\tand\nline",
    "a red ball!",
    "! a !! b",
    "x" * 300,
    "a red ball " * 80,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    small_clip.write_config(path)
    small_clip.register(path)
    return path


@pytest.fixture(scope="module")
def clip(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(small_clip.NAME).eval()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return captions(draw_scenes(np.random.default_rng(0), 50)) + ODD


@pytest.fixture(scope="module")
def encoders(clip: torch.nn.Module, folder: Path, lines: list[str]) -> TextEncoders:
    tower, tokenizer = small_clip.hf_text_tower(clip, folder)
    t5_tokenizer = small_t5.train_tokenizer(lines[:50])
    t5 = T5EncoderModel(small_t5.build(len(t5_tokenizer)).config)
    return TextEncoders(
        tower, tokenizer, t5, t5_tokenizer, clip_tokens=small_clip.CONTEXT_TOKENS, t5_tokens=small_t5.TOKENS
    )


def test_both_tokenizers_of_the_demo_clip_agree(clip: torch.nn.Module, folder: Path, lines: list[str]) -> None:
    _, ours = small_clip.hf_text_tower(clip, folder)
    theirs = small_clip.tokenizer(folder)
    end = small_clip.VOCABULARY - 1
    for line in lines:
        our_ids, their_ids = tokenize(ours, [line], small_clip.CONTEXT_TOKENS)[0].tolist(), theirs([line])[0].tolist()
        length = their_ids.index(end) + 1
        assert our_ids[:length] == their_ids[:length], line
        assert set(our_ids[length:]) <= {end}


@torch.no_grad()
def test_the_transformers_tower_equals_the_open_clip_tower_in_every_token(
    clip: torch.nn.Module, folder: Path, lines: list[str]
) -> None:
    tower, _ = small_clip.hf_text_tower(clip, folder)
    ids = small_clip.tokenizer(folder)(lines)
    hidden = clip.token_embedding(ids) + clip.positional_embedding
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask))
    assert torch.allclose(tower(ids).last_hidden_state, hidden, atol=1e-5)


@torch.no_grad()
def test_a_saved_tower_and_tokenizer_load_again(encoders: TextEncoders, lines: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    for part, name in (
        (encoders.clip, "c"),
        (encoders.clip_tokenizer, "ct"),
        (encoders.t5, "t"),
        (encoders.t5_tokenizer, "tt"),
    ):
        part.save_pretrained(tmp_path / name)
    again = TextEncoders(
        CLIPTextModel.from_pretrained(tmp_path / "c"),
        CLIPTokenizer.from_pretrained(tmp_path / "ct"),
        T5EncoderModel.from_pretrained(tmp_path / "t"),
        AutoTokenizer.from_pretrained(tmp_path / "tt"),
        clip_tokens=24,
        t5_tokens=24,
    )
    assert torch.equal(again(lines), encoders(lines))


def test_the_join_keeps_each_encoder_in_its_own_block() -> None:
    first, second = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
    joined = join_tokens(first, second)
    assert joined.shape == (2, 8, 10)
    assert torch.equal(joined[:, :3, :4], first)
    assert torch.equal(joined[:, 3:, 4:], second)
    assert not joined[:, :3, 4:].any()
    assert not joined[:, 3:, :4].any()


def test_one_linear_map_of_the_join_is_two_separate_maps() -> None:
    first, second, weight = torch.randn(2, 3, 4), torch.randn(2, 5, 6), torch.randn(7, 10)
    apart = torch.cat([first @ weight[:, :4].T, second @ weight[:, 4:].T], dim=1)
    assert torch.allclose(join_tokens(first, second) @ weight.T, apart, atol=1e-5)


@torch.no_grad()
def test_features_have_the_width_of_both_and_do_not_depend_on_the_company(
    encoders: TextEncoders, lines: list[str]
) -> None:
    features = encoders(lines)
    assert features.shape == (len(lines), 48, encoders.width)
    assert torch.allclose(features[7], encoders([lines[7]])[0], atol=1e-5)


@torch.no_grad()
def test_padding_of_the_second_encoder_is_zero(encoders: TextEncoders) -> None:
    features = encoders([""])
    assert not features[0, 24 + 1 :, :].any()  # the end of sentence stays
    assert features[0, 24].any()


def test_span_corruption_covers_each_token_exactly_once() -> None:
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 200, (200, 24), generator=seed)
    for row, length in enumerate(torch.randint(1, 23, (200,), generator=seed).tolist()):
        ids[row, length] = 1
        ids[row, length + 1 :] = 0
    inputs, labels = small_t5.corrupt_spans(ids, 3, torch.rand(200, 24, generator=seed))
    for row in range(200):
        words = ids[row, : ids[row].tolist().index(1)].tolist()
        kept = [t for t in inputs[row].tolist() if t != 0]
        hidden = [t for t in labels[row].tolist() if t != -100]
        assert kept[-1] == hidden[-1] == 1
        spans: dict[int, list[int]] = {}
        for token in hidden[:-1]:
            if 3 <= token < 3 + small_t5.SENTINELS:
                spans[current := token] = []
            else:
                spans[current].append(token)
        restored = [w for token in kept[:-1] for w in spans.get(token, [token])]
        assert restored == words
        assert list(spans) == list(range(3, 3 + len(spans)))


def test_about_30_percent_of_the_tokens_are_hidden() -> None:
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 200, (500, 24), generator=seed)
    _, labels = small_t5.corrupt_spans(ids, 3, torch.rand(500, 24, generator=seed))
    assert (labels >= 20).sum().item() / ids.numel() == pytest.approx(0.3, abs=0.02)
