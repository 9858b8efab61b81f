"""The graphs around the denoiser: text encoder, image decoder and encoder, each made for the next stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TextEncoder(torch.nn.Module):
    """CLIP's text transformer: input_ids int64 [B,L] to last_hidden_state float32 [B,L,D].

    `layer_weights` float32 [B,N+1] says which hidden states that is before the final layer norm: the sum of
    the embeddings' (the first weight) and of those after each of the N layers. The last one alone is the
    model as it is, the one before is a clip skip of 1.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, layer_weights: Tensor) -> Tensor:
        """States after the final layer norm. No attention mask: Stable Diffusion attends to padding too."""
        hidden = self.model(input_ids, output_hidden_states=True).hidden_states
        stacked = torch.stack(hidden, dim=1).float()
        chosen = (stacked * layer_weights[:, :, None, None]).sum(1)
        tower: Any = getattr(self.model, "text_model", self.model)  # its place before transformers 5.6
        states: Tensor = tower.final_layer_norm(chosen.to(tower.final_layer_norm.weight.dtype))
        return states.float()


class ImageDecoder(torch.nn.Module):
    """Latents to pictures: sample float32 [B,C,H,W] to image uint8 [B,height,width,3]."""

    def __init__(self, vae: torch.nn.Module, scaling_factor: float) -> None:
        super().__init__()
        self.vae, self.scaling_factor = vae, scaling_factor

    def forward(self, sample: Tensor) -> Tensor:
        """Undo the latent scaling, decode, and round to 8 bits as the reference does (half to even)."""
        latents = (sample / self.scaling_factor).to(next(self.vae.parameters()).dtype)
        decoded = self.vae.decode(latents, return_dict=False)[0].float()  # type: ignore[operator]
        levels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


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
