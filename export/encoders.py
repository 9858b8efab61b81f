"""The graphs around the denoiser: text encoder, image decoder and encoder, each made for the next stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LARGEST = 60000.0
"""More than any mean of a picture's values; fp16 has it."""


class TextEncoder(torch.nn.Module):
    """CLIP's text transformer: input_ids int64 [B,L] to last_hidden_state float32 [B,L,D].

    `layer_weights` float32 [B,S] says which hidden states that is: the sum of the embeddings' (the first
    weight) and of those after each layer. The last one alone is what the model was trained with, the one
    before is a clip skip of 1. Usually these are all N layers, S = N + 1, and the final layer norm follows;
    `penultimate` leaves out both that and the last layer, S = N, as SDXL takes them. `pooled` adds
    text_embeds float32 [B,D'], the projection of the text's end after all layers.
    """

    def __init__(self, model: torch.nn.Module, *, penultimate: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.model, self.penultimate, self.pooled = model, penultimate, pooled

    def forward(self, input_ids: Tensor, layer_weights: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """No attention mask: Stable Diffusion attends to padding too."""
        made = self.model(input_ids, output_hidden_states=True)
        hidden = made.hidden_states[:-1] if self.penultimate else made.hidden_states
        stacked = torch.stack(hidden, dim=1).float()
        states = (stacked * layer_weights[:, :, None, None]).sum(1)
        if not self.penultimate:
            tower: Any = getattr(self.model, "text_model", self.model)  # its place before transformers 5.6
            states = tower.final_layer_norm(states.to(tower.final_layer_norm.weight.dtype)).float()
        return (states, made.text_embeds.float()) if self.pooled else states


class ImageDecoder(torch.nn.Module):
    """Latents to pictures: sample float32 [B,C,H,W] to image uint8 [B,height,width,3].

    Beside it finite float32 [B], 1 or 0: what is infinite or not a number would be lost in 8 bits.
    """

    def __init__(self, vae: torch.nn.Module, scaling_factor: float, **options: bool) -> None:
        """`options` are those of the autoencoder's `decode`."""
        super().__init__()
        self.vae, self.scaling_factor, self.options = vae, scaling_factor, options

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the latent scaling, decode, and round to 8 bits as the reference does (half to even)."""
        latents = (sample / self.scaling_factor).to(next(self.vae.parameters()).dtype)
        decoded = self.vae.decode(latents, return_dict=False, **self.options)[0].float()  # type: ignore[operator]
        levels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)
        return levels.permute(0, 2, 3, 1).to(torch.uint8), _finite(decoded)


def _finite(pictures: Tensor) -> Tensor:
    """1 for each of [B,C,H,W] whose values are all finite, else 0, in operators that every backend has.

    A sum keeps what a maximum may lose. One axis at a time, no sum leaves even the range of fp16.
    """
    size = pictures.abs().mean(3).mean(2).mean(1)
    return (size <= _LARGEST).to(torch.float32)  # not so for what is not a number


class ImageEncoder(torch.nn.Module):
    """Pictures to the distribution of their latents, as the denoiser has them.

    image float32 [B,3,height,width] in [-1,1] to mean and standard deviation, each float32 [B,C,H,W].
    """

    def __init__(self, vae: torch.nn.Module, scaling_factor: float) -> None:
        super().__init__()
        self.vae, self.scaling_factor = vae, scaling_factor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode without drawing: the runtime owns the noise."""
        encoded = self.vae.encoder(image.to(next(self.vae.parameters()).dtype))  # type: ignore[operator]
        quant = self.vae.quant_conv
        moments: Tensor = encoded if quant is None else quant(encoded)  # type: ignore[operator]
        mean, logarithm = moments.float().chunk(2, dim=1)
        deviation = torch.exp(0.5 * logarithm.clamp(-30, 20))
        return self.scaling_factor * mean, self.scaling_factor * deviation


class QuantizedEncoder(torch.nn.Module):
    """A VQ model's encoder, without its codebook: image float32 [B,3,height,width] to latents [B,C,H,W].

    Nothing is drawn: the latents are these, not a distribution of them.
    """

    def __init__(self, movq: torch.nn.Module) -> None:
        super().__init__()
        self.movq = movq

    def forward(self, image: Tensor) -> Tensor:
        """Encode as the denoiser has it, without scale."""
        latents: Tensor = self.movq.encode(  # type: ignore[operator]
            image.to(next(self.movq.parameters()).dtype), return_dict=False
        )[0]
        return latents.float()
