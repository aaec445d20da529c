"""The patch discriminator: how far a patch reaches, and that a picture is judged alone."""

from __future__ import annotations

import pytest
import torch

from emu_ray.errors import RecipeError
from emu_ray.models.discriminator import DiscriminatorRecipe, PatchDiscriminator

SMALL = DiscriminatorRecipe(width=8, halvings=3, norm_num_groups=4)


def test_a_patch_of_the_default_depth_is_the_papers_70_px() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(SMALL)
    for layer in network.layers:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[method-assign]  # its mean would look at the whole picture
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    judged = network(images)
    assert judged.shape == (1, 1, 14, 14)
    judged[0, 0, 7, 7].backward()
    seen = images.grad.abs().sum((0, 1))  # type: ignore[union-attr]
    assert (int((seen.sum(0) > 0).sum()), int((seen.sum(1) > 0).sum())) == (70, 70)


def test_the_sizes_are_those_of_pix2pix() -> None:
    network = PatchDiscriminator(DiscriminatorRecipe())
    shapes = [tuple(p.shape) for n, p in network.named_parameters() if p.ndim == 4]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]


@torch.no_grad()
def test_a_picture_is_judged_the_same_alone_and_in_company() -> None:
    network = PatchDiscriminator(SMALL)
    images = torch.rand(4, 3, 32, 32)
    assert torch.allclose(network(images)[2:3], network(images[2:3]), atol=1e-6)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(RecipeError, match="must divide twice its width, found 32 for a width of 8"):
        DiscriminatorRecipe(width=8)
