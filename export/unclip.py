"""The two steps of an unCLIP: of a prior on embeddings, and of a UNet that is told an embedding, not text."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from allaprima.export.denoiser import Denoiser
from allaprima.export.update import VARIANCE


class PriorDenoiser(Denoiser):
    """A prior transformer as one step on embeddings: samples are [B,D,1,1], and a `Denoiser` in all else.

    Beside the text's states [G*B,L,D] it is told text_embeds [G*B,D], the text's projection, and
    attention_mask [G*B,L], 1 for tokens and 0 for padding.
    """

    def _predict(
        self, sample: Tensor, timestep: Tensor, guidance: Tensor, states: Tensor, named: dict[str, Tensor]
    ) -> Tensor:
        branches, kind = guidance.shape[0], self.precision
        output = self.unet(
            sample.flatten(1).unsqueeze(0).expand(branches, -1, -1).flatten(0, 1).to(kind),
            timestep.unsqueeze(0).expand(branches, -1).flatten(),
            proj_embedding=named["text_embeds"].to(kind),
            encoder_hidden_states=states.to(kind),
            attention_mask=named["attention_mask"] > 0.5,
            return_dict=False,
        )[0].float()
        made: Tensor = output.unflatten(0, guidance.shape)[..., None, None]
        return made


class ImageDenoiser(Denoiser):
    """Kandinsky's UNet, which is told image_embeds [G*B,D] in place of a text's states.

    hint_embeds [B,4,H,W] are further channels, of a depth map that it follows (see `hint.HintEncoder`).

    It always makes a variance too, which is left out unless the option learned_variance takes it; then it is
    that of the last branch.
    """

    channels: ClassVar[tuple[str, ...]] = ("masked_image_latents", "mask", "hint_embeds")

    def _predict(
        self, sample: Tensor, timestep: Tensor, guidance: Tensor, states: Tensor, named: dict[str, Tensor]
    ) -> Tensor:
        branches, kind = guidance.shape[0], self.precision
        output = self.unet(
            sample.unsqueeze(0).expand(branches, -1, -1, -1, -1).flatten(0, 1).to(kind),
            timestep.unsqueeze(0).expand(branches, -1).flatten(),
            None,
            added_cond_kwargs={"image_embeds": states.to(kind)},
            return_dict=False,
        )[0].float()
        if VARIANCE[0] not in self.options:
            output = output[:, : output.shape[1] // 2]
        made: Tensor = output.unflatten(0, guidance.shape)
        return made
