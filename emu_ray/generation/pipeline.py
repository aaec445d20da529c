"""The model as a diffusers pipeline: two text encoders, U-Net, scheduler, autoencoder in one folder.

`EmuPipeline.save_pretrained` writes a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads where emu_ray
is installed: beside the weights lies a pipeline.py of one import, diffusers' own way to name a class that it doesn't ship.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from emu_ray.generation.parts import read_part_unless
from emu_ray.models.autoencoder import Autoencoder, FourierAutoencoder, PublishedAutoencoder, load_autoencoder
from emu_ray.models.denoiser import conditions, is_micro_conditioned, whole_picture_ids
from emu_ray.models.text import TextEncoders, TextFeatures

_PIPELINE_FILE = '"""Names the class for diffusers; the code is emu_ray\'s."""\n\nfrom emu_ray.generation.pipeline import EmuPipeline  # noqa: F401\n'


class EmuPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """Text to images by classifier-free guidance in the autoencoder's latent space; `vae` is ours or a published one."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"

    def __init__(
        self,
        vae: FourierAutoencoder | AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
        )

    @property
    def texts(self) -> TextEncoders:
        """Both encoders as one; captions are cut at the tokenizers' own lengths."""
        return TextEncoders(
            self.text_encoder,
            self.tokenizer,
            self.text_encoder_2,
            self.tokenizer_2,
            clip_tokens=self.tokenizer.model_max_length,
            t5_tokens=self.tokenizer_2.model_max_length,
        )

    @property
    def autoencoder(self) -> Autoencoder:
        """`vae` with the one interface of all autoencoders."""
        return (
            self.vae if isinstance(self.vae, FourierAutoencoder) else PublishedAutoencoder(self.vae).to(self.vae.device)
        )

    @property
    def size_px(self) -> int:
        """Side of the images that the model was trained at."""
        return int(self.unet.config.sample_size * self.autoencoder.downsampling)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        generator: list[torch.Generator] | torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image a prompt; `generator` is one for all, or one a prompt, on the CPU, so that an image depends on its own seed alone.

        `output_type`: "pil", "np" (N, H, W, 3) in 0..1, "pt" (N, 3, H, W) in 0..1, or "latent".
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = (
            list(negative_prompt) if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
        )
        guided = guidance_scale != 1.0
        height, width = height or self.size_px, width or self.size_px
        latents = self._noise(len(prompts), height, width, generator)
        told = self._told([*negatives, *prompts] if guided else prompts, height, width)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_in = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            out = self.unet(model_in, t, **told).sample
            if guided:
                without, with_text = out.chunk(2)
                out = without + guidance_scale * (with_text - without)
            latents = self.scheduler.step(out, t, latents).prev_sample
        images = latents if output_type == "latent" else self._finish(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _told(self, prompts: list[str], height: int, width: int) -> dict[str, Any]:
        text, dtype = self.texts.features(prompts), self.unet.dtype
        assert text.pooled_BD is not None
        features = TextFeatures(text.tokens_BTD.to(dtype), text.pooled_BD.to(dtype))
        ids = whole_picture_ids(height, width, len(prompts)) if is_micro_conditioned(self.unet) else None
        return conditions(features, None if ids is None else ids.to(self.unet.device))

    def _noise(
        self, count: int, height: int, width: int, generator: list[torch.Generator] | torch.Generator | None
    ) -> Tensor:
        factor = self.autoencoder.downsampling
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        each = generator if isinstance(generator, list) else [generator] * count
        if len(each) != count:
            raise ValueError(f"expected one generator for each of {count} prompts, got {len(each)}")
        noise = torch.stack([torch.randn(shape, generator=g) for g in each])
        return noise.to(self.unet.device, self.unet.dtype)

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        images = (self.autoencoder.decode(latents.to(self.vae.dtype)).float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the folder, with the one-line pipeline.py that names this class to diffusers."""
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(_PIPELINE_FILE, encoding="utf-8")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, unet: UNet2DConditionModel | None = None, without: Collection[str] = ()
    ) -> EmuPipeline:
        """The pipeline of a folder that `save_pretrained` wrote, in float32; `unet` stands in for the saved one, `without` names networks left out.

        Unlike `DiffusionPipeline.from_pretrained` it runs no code found in the folder.
        """
        folder = Path(folder)
        autoencoder = None if "vae" in without else load_autoencoder(folder / "vae")
        return cls(
            vae=autoencoder.vae if isinstance(autoencoder, PublishedAutoencoder) else autoencoder,  # type: ignore[arg-type]
            text_encoder=read_part_unless(without, CLIPTextModel, folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=read_part_unless(without, T5EncoderModel, folder / "text_encoder_2"),
            tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
            unet=unet or read_part_unless(without, UNet2DConditionModel, folder / "unet"),
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        )
