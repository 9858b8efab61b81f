"""The stages of painting: each a session with its tensors, allocated once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import DTypeLike, NDArray

from allaprima.bundle import BackendError, BundleError, Latent, RequestError
from allaprima.runtime.memory import Layout, Tensor
from allaprima.runtime.samplers import Table, idle_row
from allaprima.runtime.session import Binding, Session
from allaprima.runtime.step_cache import FEATURES

Floats = NDArray[np.float32]

RESCALE = "guidance_rescale"
OPTIONS = {
    "thresholds": ("thresholding", (-1.0, 1.0)),
    "from_limited": ("thresholding", (0.0, 1.0)),
    "learned_variance": ("variance_type", (0.0, 0.0)),
}
"""Inputs of a denoiser that only some graphs have: the scheduler option, and the row that changes nothing."""
POOLED = "text_embeds"
LATENTS = "latents"
"""What an image encoder makes that has no distribution to draw from."""
FINITE = "finite"
"""The decoder's word, 1 or 0, on the values that it rounds to 8 bits."""


def not_finite(component: str, precision: str) -> BackendError:
    """The error for values that are infinite or not a number: which graph made them, and what to try."""
    wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(precision)
    remedies = [f"open the bundle in {wider}, or export the checkpoint so"] if wider else []
    if component == "denoiser":
        remedies.append("use a lower guidance_scale or another sampler")
    damaged = "the weights may be damaged: open the bundle with verify, or export the checkpoint again"
    return BackendError(
        f"the {component} made values that are infinite or not-a-number, in {precision}: "
        + ("; ".join(remedies) or damaged)
    )


class Encoder:
    """Pictures of one size to latents, one at a time."""

    def __init__(self, session: Session, latent: Latent, height: int, width: int) -> None:
        """Allocate for pictures of `height` x `width` pixels.

        Raises RequestError if the bundle's graph is too old.
        """
        self._names = (LATENTS,) if LATENTS in session.outputs else ("mean", "deviation")
        if not all(name in session.outputs for name in self._names):
            raise RequestError(
                "the bundle's image encoder is of an older allaprima: export the checkpoint again"
            )
        self._precision = session.precision
        shape = 1, latent.channels, height // latent.downscale, width // latent.downscale
        self._image = session.memory.allocate({"image": ((1, 3, height, width), np.float32)})
        self._latents = session.memory.allocate(dict.fromkeys(self._names, (shape, np.float32)))
        self._binding = session.bind({**self._image.tensors, **self._latents.tensors})

    def encode(self, image: Floats) -> tuple[Floats, Floats | None]:
        """Mean and standard deviation [C,H,W] of the latents of an image [1,3,height,width] in [-1,1].

        The deviation is None where the graph makes the latents themselves. Valid until the next call. Raises
        BackendError, also for values that are not finite.
        """
        self._image.tensors["image"].array[...] = image
        self._image.push()
        self._binding.run()
        self._latents.pull()
        mean, *deviation = (self._latents.tensors[name].array[0] for name in self._names)
        if not all(np.isfinite(each).all() for each in (mean, *deviation)):
            raise not_finite("vae_encoder", self._precision)
        return mean, deviation[0] if deviation else None


class Decoder:
    """Latents of one size to pixels, one picture at a time: decoding takes the most memory of all stages."""

    def __init__(self, session: Session, latent: Latent, height: int, width: int) -> None:
        """Allocate for pictures of `height` x `width` pixels."""
        self._memory, self._precision = session.memory, session.precision
        sides = height // latent.downscale, width // latent.downscale
        self._sample = self._memory.allocate({"sample": ((1, latent.channels, *sides), np.float32)})
        made: dict[str, tuple[tuple[int, ...], DTypeLike]] = {"image": ((1, height, width, 3), np.uint8)}
        if FINITE in session.outputs:
            made[FINITE] = (1,), np.float32
        self._image = self._memory.allocate(made)
        self._binding = session.bind({**self._sample.tensors, **self._image.tensors})

    def decode(self, sample: Tensor) -> NDArray[np.uint8]:
        """The pixels [height,width,3] of a sample [C,H,W] in the session's memory, valid until the next call.

        Raises BackendError, also if the graph says that they come of values that are not finite; those of
        older bundles do not say.
        """
        self._memory.copy(self._sample.tensors["sample"][0], sample)
        self._binding.run()
        self._image.pull()
        finite = self._image.tensors.get(FINITE)
        if finite is not None and finite.array[0] != 1:
            raise not_finite("vae_decoder", self._precision)
        image: NDArray[np.uint8] = self._image.tensors["image"].array[0]
        return image


def check_table(table: Table, denoiser: Session) -> None:
    """RequestError if the denoiser's graph lacks what the table asks for."""
    for name, (option, _) in OPTIONS.items():
        if getattr(table, name) is not None and name not in denoiser.inputs:
            remedy = (
                "export the checkpoint again with --thresholding"
                if option == "thresholding"
                else "its UNet predicts no variance, so take another variance_type, as 'fixed_small'"
            )
            raise RequestError(
                f"sampler {table.sampler!r} with this scheduler option {option} is more than this bundle's "
                f"denoiser can do: {remedy}, or choose another sampler"
            )


def _check_version(denoiser: Session, history: int) -> None:
    width = denoiser.inputs["update"].shape[-1]
    if width != 4 + history:
        raise BundleError(
            f"the bundle's denoiser is of another version of allaprima (its update has {width} columns, "
            f"not {4 + history}): export the checkpoint again"
        )


class Denoiser:
    """A batch of B lanes, each of which may be at another row of another sampler's table.

    Sample and history exist twice. One binding reads the first pair and writes the second, the other does
    the reverse, so a step is one run of one of them and nothing is ever copied.

    What is written into `sample` and `history` counts from the next `push`, into `noise` from the next
    `push_noise`; coefficients and guidance go along with every step. `pull` brings the present sample and
    history into their arrays. All keep their contents.

    Attributes:
        noise: [B,C,H,W], this step's noise.
        guidance: [G,B], the weights of the branches.
        guidance_rescale: [B], between 0 (off) and 1; None if the graph was exported without.
        conditions: what the model is told, by the graph's names: [G,B,...] where branches differ, as the
            hidden states `encoder_hidden_states` [G,B,L,D] do, else [B,...]. They are written into and count
            from the next `push_conditions`, or are copied into.
    """

    def __init__(
        self,
        session: Session,
        sample: tuple[int, int, int, int],
        *,
        branches: int,
        history: int,
        length: int,
        shallow: Session | None = None,
        bound: bool = True,
    ) -> None:
        """Allocate for `sample` [B,C,H,W], G `branches`, S `history` slots, L = `length` tokens per prompt.

        All lanes are idle at first. `shallow` takes the steps that are not full, with deep features that
        `session` hands out. If it is not `bound` it only holds what others `take` from it, and cannot step.
        Raises BundleError if the session's graph is of an older version, or BackendError if it has other
        shapes.
        """
        _check_version(session, history)
        lanes, memory = sample[0], session.memory
        state = {"sample": (sample, np.float32), "history": ((history, *sample), np.float32)}
        self._states = memory.allocate(state), memory.allocate(state)
        self._noise = memory.allocate({"noise": (sample, np.float32)})
        row = _row_layout(session, lanes, branches, history)
        self._row = memory.allocate(row)
        extents = {"B": lanes, "G": branches, "H": sample[2], "W": sample[3], "L": length}
        others = {*state, *row, "noise"}
        conditions = {name: spec for name, spec in session.inputs.items() if name not in others}
        self._conditions = memory.allocate(
            {name: (spec.resolve(extents), spec.dtype) for name, spec in conditions.items()}
        )
        self.noise: Floats = self._noise.tensors["noise"].array
        self.guidance: Floats = self._row.tensors["guidance"].array
        self.guidance_rescale: Floats | None = (
            self._row.tensors[RESCALE].array if RESCALE in session.inputs else None
        )
        self._history = history
        self._branched = {name for name, spec in conditions.items() if spec.shape[0] == "G*B"}
        self.conditions: Mapping[str, Tensor] = {
            name: tensor.reshape(branches, lanes, *tensor.array.shape[1:])
            if name in self._branched
            else tensor
            for name, tensor in self._conditions.tensors.items()
        }
        tensors = {**self._noise.tensors, **self._row.tensors, **self._conditions.tensors}
        if shallow is not None:
            # Never pushed or pulled: they stay where the graphs are.
            features = session.outputs[FEATURES].resolve(extents)
            self._features = memory.allocate({FEATURES: (features, np.float32)})
            tensors |= self._features.tensors
        self._memory = memory
        self._bindings = self._bind(session, tensors) if bound else ()
        self._shallow = None if shallow is None else self._bind(shallow, tensors)
        self._source = 0
        self.write(idle_row(history), 0)

    def _bind(self, session: Session, tensors: Mapping[str, Tensor]) -> tuple[Binding, Binding]:
        """From the first pair of sample and history to the second, and the reverse."""
        bindings = []
        for source in (0, 1):
            made = self._states[1 - source].tensors
            state = {"next_sample": made["sample"], "next_history": made["history"]}
            given = {**tensors, **self._states[source].tensors, **state}
            known = {*session.inputs, *session.outputs}
            bindings.append(session.bind({name: given[name] for name in given if name in known}))
        return bindings[0], bindings[1]

    @property
    def sample(self) -> Floats:
        """The latents [B,C,H,W]: to be written before the first step, read after a `pull`."""
        array: Floats = self._states[self._source].tensors["sample"].array
        return array

    @property
    def history(self) -> Floats:
        """The history [S,B,C,H,W], newest first.

        To be zeroed when a lane starts: a coefficient of 0 does not silence what is not finite.
        """
        array: Floats = self._states[self._source].tensors["history"].array
        return array

    def lane(self, index: int) -> Tensor:
        """The present latents [C,H,W] of one lane, where the session has them."""
        return self._states[self._source].tensors["sample"][index]

    def push(self) -> None:
        """Start from what was written into sample and history."""
        self._states[self._source].push()

    def push_noise(self) -> None:
        """Take the noise that was written from the next step on."""
        self._noise.push()

    def push_conditions(self) -> None:
        """Take the conditions that were written, in place of all that were there."""
        self._conditions.push()

    def pull_conditions(self) -> None:
        """Bring the conditions, as the next step takes them, into their arrays."""
        self._conditions.pull()

    def pull(self) -> None:
        """Bring sample and history up to date. Waits for all steps taken."""
        self._states[self._source].pull()

    def write(self, table: Table, row: int, lanes: slice | int = slice(None)) -> None:
        """Set the coefficients of the next step for some lanes: one row of a table."""
        tensors = self._row.tensors
        tensors["timestep"].array[lanes] = table.timesteps[row]
        tensors["input_scale"].array[lanes] = table.input_scale[row]
        tensors["to_prediction"].array[lanes] = table.to_prediction[row]
        tensors["bounds"].array[lanes] = table.bounds[row]
        tensors["update"].array[lanes] = table.update[row]
        for name, (_, neutral) in OPTIONS.items():
            if name in tensors:
                values = getattr(table, name)
                tensors[name].array[lanes] = neutral if values is None else values[row]

    def rest(self, lane: int) -> None:
        """Make a lane idle. Its sample and history must be finite, as they are if it was never used."""
        self.write(idle_row(self._history), 0, lane)

    def take(self, lane: int, other: Denoiser, index: int) -> None:
        """Make a lane what lane `index` of another denoiser is, but for the coefficients of its next step.

        Both must be of the same session and, but for B, of the same shape. In order with the work of their
        memory, which is not waited for.
        """
        mine, theirs = self._states[self._source].tensors, other._states[other._source].tensors
        self._memory.copy(mine["sample"][lane], theirs["sample"][index])
        for slot in range(self._history):
            self._memory.copy(mine["history"][slot, lane], theirs["history"][slot, index])
        for name, condition in self.conditions.items():
            given = other.conditions[name]
            if name not in self._branched:
                self._memory.copy(condition[lane], given[index])
                continue
            for branch in range(self.guidance.shape[0]):
                self._memory.copy(condition[branch, lane], given[branch, index])
        self.guidance[:, lane] = other.guidance[:, index]
        if self.guidance_rescale is not None and other.guidance_rescale is not None:
            self.guidance_rescale[lane] = other.guidance_rescale[index]

    def retire(self) -> None:
        """To be called before it is let go of: a device may still be at work in its memory.

        Whether that fails does not matter any more.
        """
        with suppress(BackendError):
            self._memory.synchronize()

    def step(self, *, full: bool = True) -> None:
        """Take one step in all lanes; one that is not `full` takes the deep features of the last that was.

        Raises BackendError; then the present sample is still the old one.
        """
        self._row.push()
        bindings = self._bindings if full or self._shallow is None else self._shallow
        bindings[self._source].run()
        self._source = 1 - self._source


def _row_layout(session: Session, lanes: int, branches: int, history: int) -> Layout:
    """The inputs of a denoiser's graph that change with every step."""
    shapes: dict[str, tuple[int, ...]] = {
        "timestep": (lanes,),
        "input_scale": (lanes,),
        "guidance": (branches, lanes),
        "to_prediction": (lanes, 2),
        "bounds": (lanes,),
        "update": (lanes, 4 + history),
        **{name: (lanes, 2) for name in OPTIONS if name in session.inputs},
    }
    if RESCALE in session.inputs:
        shapes[RESCALE] = (lanes,)
    return {name: (shape, np.float32) for name, shape in shapes.items()}
