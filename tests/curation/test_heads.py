"""Heads: what is fitted is found again, and LAION's layout loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emu_ray.curation.heads import LinearHead, fit_linear, load_head
from emu_ray.errors import InputError


def unit_rows(count: int, width: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_score_head_finds_a_linear_truth_and_clips_to_0_and_10() -> None:
    x = unit_rows(400, 8)
    truth = 5 + x @ np.linspace(-6, 6, 8)
    head = fit_linear(x, truth, "score", ridge=1e-9)
    with torch.no_grad():
        found = head(torch.from_numpy(x.astype(np.float32))).numpy()
    np.testing.assert_allclose(found, np.clip(truth, 0, 10), atol=1e-3)
    assert truth.max() > 10 >= found.max() and truth.min() < 0 <= found.min()


def test_a_probability_head_separates_what_can_be_separated_and_is_calibrated_to_the_base_rate() -> None:
    x = unit_rows(500, 8)
    labels = x[:, 0] > 0.3
    head = fit_linear(x, labels, "probability", ridge=1e-5)
    with torch.no_grad():
        found = head(torch.from_numpy(x.astype(np.float32))).numpy()
    assert ((found > 0.5) == labels).mean() > 0.98
    assert abs(found.mean() - labels.mean()) < 0.02


def test_fitting_twice_gives_the_same_bits() -> None:
    x = unit_rows(100, 8)
    first, second = (fit_linear(x, x[:, 1] > 0, "probability") for _ in range(2))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_a_saved_head_loads_and_refuses_to_be_another_kind(tmp_path: Path) -> None:
    head = fit_linear(unit_rows(50, 4), np.arange(50) % 2, "probability")
    head.save(tmp_path / "a.safetensors")
    assert torch.equal(load_head(tmp_path / "a.safetensors", "probability").weight, head.weight)
    with pytest.raises(InputError, match="expected a head that gives a score"):
        load_head(tmp_path / "a.safetensors", "score")


def test_the_layout_of_laions_linear_weights_loads(tmp_path: Path) -> None:
    laion = torch.nn.Linear(768, 1)
    torch.save(laion.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    head = load_head(tmp_path / "sa_0_4_vit_l_14_linear.pth", "score")
    x = torch.nn.functional.normalize(torch.randn(3, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(head(x), laion(x).squeeze(1).clamp(0, 10))


def test_a_file_that_is_no_head_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    (tmp_path / "b.pth").write_bytes(b"no")
    torch.save({"0.weight": torch.zeros(2, 2)}, tmp_path / "c.pth")
    torch.save({"state_dict": {"weight": torch.zeros(1, 2)}, "epoch": 3}, tmp_path / "d.pth")
    torch.save([1, 2], tmp_path / "e.pth")
    said_of = {"a.safetensors": "can't read", "b.pth": "can't read", "absent.pth": "can't read"}
    said_of |= {"c.pth": r"found 0.weight \(2, 2\)", "d.pth": "found nothing", "e.pth": "found nothing"}
    for name, said in said_of.items():
        with pytest.raises(InputError, match=said):
            load_head(tmp_path / name, "score")


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_whose_weights_are_not_finite_is_refused(tmp_path: Path, part: str, value: float) -> None:
    head = LinearHead(4, "score")
    torch.nn.init.constant_(getattr(head, part), value)
    head.save(tmp_path / "h.safetensors")
    with pytest.raises(InputError, match=r"h\.safetensors: expected finite weights of a head, found NaN or infinity"):
        load_head(tmp_path / "h.safetensors", "score")
