"""The patch discriminator of the autoencoder's adversarial loss: real or reconstructed, told for each patch.

PatchGAN of Isola et al. (arXiv 1611.07004, section 3.2.2 and appendix 6.1.2), as VQGAN (arXiv 2012.09841) and latent diffusion
(arXiv 2112.10752) use it. They normalise by batch; ours is by group, so that a picture is judged alone and workers agree on any split.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class DiscriminatorRecipe:
    """Sizes; the default judges patches of 70 x 70 px, as the paper's."""

    width: int = 64  # channels after the first convolution, doubled by each further one up to eightfold
    halvings: int = 3
    norm_num_groups: int = 32  # our choice

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "halvings", "norm_num_groups")
        if (2 * self.width) % self.norm_num_groups:
            raise RecipeError(
                f"norm_num_groups of DiscriminatorRecipe must divide twice its width, found {self.norm_num_groups} "
                f"for a width of {self.width}: change either"
            )


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) in -1..1 to one number a patch, (B, 1, h, w): above 0 for real."""

    def __init__(self, recipe: DiscriminatorRecipe) -> None:
        super().__init__()
        widths = [recipe.width * min(2**i, 8) for i in range(recipe.halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if i < recipe.halvings else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(recipe.norm_num_groups, after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # Isola et al., appendix 6.2

    def forward(self, images: Tensor) -> Tensor:
        """The judgement of each patch."""
        return self.layers(images)  # type: ignore[no-any-return]
