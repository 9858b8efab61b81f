"""Painting with a bundle to see what its denoiser's activations are like, and what a change of it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import Bundle, Component, RequestError, TensorSpec
from allaprima.engine.gauges import Gauge, Ranges, gauged
from allaprima.runtime import Binding, Pipeline, Session, open_session
from allaprima.runtime.families import needed
from allaprima.runtime.memory import Memory, Tensor
from allaprima.runtime.opener import Opener
from allaprima.runtime.stages import OPTIONS

Floats = NDArray[np.float32]
Inputs = Mapping[str, NDArray[Any]]
Listener = Callable[[Mapping[str, Tensor]], None]
"""Is told the tensors of a session on the host after every run, inputs and outputs."""
DENOISER, DECODER = "denoiser", "vae_decoder"
SAMPLES = 8


@dataclass(frozen=True)
class Calibration:
    """How the ranges of activations are found: what the bundle itself paints meanwhile.

    Picture i of `samples` is of prompt i, beginning again after the last, with seed + i; one more is painted
    to measure the error. `steps`, `guidance_scale`, `height` and `width` None are the bundle's own.
    """

    prompts: tuple[str, ...]
    samples: int = SAMPLES
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise RequestError(
                "there are no prompts to calibrate with: give some of the kind that will be painted"
            )
        if self.samples < 1:
            raise RequestError(f"samples is {self.samples}: give at least 1")

    def paint(self, pipeline: Pipeline, index: int) -> None:
        """Picture `index`, as far as its latents. Raises RequestError or BackendError."""
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        options: Any = {name: value for name, value in given.items() if value is not None}
        prompt = self.prompts[index % len(self.prompts)]
        pipeline.generate(prompt, seed=self.seed + index, output_type="latent", **options)


@dataclass(frozen=True)
class Way:
    """A bundle and how it is run: with a backend on this machine's processor, in float32 where that can."""

    bundle: Bundle
    backend: str
    threads: int | None = None

    @property
    def precision(self) -> str | None:
        """What is asked of the backend."""
        return "fp32" if self.backend == "openvino" else None

    def open(self, graph: Path, component: Component) -> Session:
        """A session of any graph. Raises BackendError."""
        return open_session(graph, component, self.backend, precision=self.precision, threads=self.threads)

    @contextmanager
    def pipeline(self, denoiser: Session) -> Iterator[Pipeline]:
        """The bundle's pipeline, as far as latents, around another session of its denoiser."""
        opener = Opener(self.bundle, self.backend, precision=self.precision, threads=self.threads)
        sessions: dict[str, Session] = {DENOISER: denoiser}
        try:
            for role in needed(self.bundle.manifest):
                if role not in (DENOISER, DECODER):
                    sessions[role] = opener.open(role)
            yield Pipeline(self.bundle, sessions, backend=self.backend, opens=opener.open)
        finally:
            for session in sessions.values():
                session.close()


class Watched:
    """A session of a step whose listener is told after every run; it may be another at any time. See Session.

    Outputs beyond the component's own are bound here, and seen by the listener alone.
    """

    def __init__(self, session: Session, component: Component, listener: Listener) -> None:
        self._session, self.listener = session, listener
        self.inputs: Mapping[str, TensorSpec] = session.inputs
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in component.outputs}

    @property
    def precision(self) -> str:
        """See Session.precision."""
        return self._session.precision

    @property
    def memory(self) -> Memory:
        """See Session.memory."""
        return self._session.memory

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        """See Session.bind."""
        hidden = {
            name: (spec.resolve({}), np.float32)
            for name, spec in self._session.outputs.items()
            if name not in self.outputs
        }
        tensors = {**tensors, **self._session.memory.allocate(hidden).tensors}
        return _Watched(self, self._session.bind(tensors), tensors)

    def unload(self) -> None:
        """See Session.unload."""
        self._session.unload()

    def close(self) -> None:
        """See Session.close."""
        self._session.close()


@dataclass(frozen=True)
class _Watched:
    """See Binding."""

    owner: Watched
    binding: Binding
    tensors: Mapping[str, Tensor]

    def run(self) -> None:
        """See Binding.run."""
        self.binding.run()
        self.owner.listener(self.tensors)


@dataclass(frozen=True)
class HeldOut:
    """Steps that ranges were not taken from: their inputs, and what the network predicts, [B,C,H,W] each."""

    steps: Sequence[Inputs]
    predictions: Sequence[Floats]

    def error(self, session: Session) -> float:
        """What another session predicts instead: the root mean square difference over the deviation."""
        made = np.stack(predict(session, self.steps)).astype(np.float64)
        wanted = np.stack(self.predictions).astype(np.float64)
        return float(np.sqrt(np.square(made - wanted).mean()) / max(1e-12, wanted.std()))


def observe(
    way: Way,
    path: Path,
    component: Component,
    gauges: Sequence[Gauge],
    calibration: Calibration,
    tell: Callable[[str], None],
) -> tuple[Ranges, HeldOut]:
    """Paint with a denoiser's graph at `path`, which has gauges, and say what was seen.

    Raises RequestError or BackendError.
    """
    ranges, steps = Ranges(gauges), []
    watched = Watched(way.open(path, gauged(component, gauges)), component, ranges)

    def keep(tensors: Mapping[str, Tensor]) -> None:
        steps.append({spec.name: tensors[spec.name].array.copy() for spec in component.inputs})

    with closing(watched), way.pipeline(watched) as pipeline:
        for index in range(calibration.samples):
            tell(f"painting {index + 1} of {calibration.samples}")
            calibration.paint(pipeline, index)
        tell("painting what is held out")
        watched.listener = keep
        calibration.paint(pipeline, calibration.samples)
        watched.listener = lambda _: None
        return ranges, HeldOut(steps, predict(watched, steps))


def predict(session: Session, steps: Sequence[Inputs]) -> list[Floats]:
    """What the network predicts after guidance, [B,C,H,W] for each step: in place of the sampler's update.

    All steps have one shape. Raises BackendError.
    """
    first = steps[0]
    shapes = {"next_sample": first["sample"].shape, "next_history": first["history"].shape}
    given = session.memory.allocate({name: (array.shape, array.dtype) for name, array in first.items()})
    made = session.memory.allocate({name: (shapes[name], np.float32) for name in session.outputs})
    binding = session.bind({**given.tensors, **made.tensors})
    predictions = []
    for step in steps:
        for name, array in {**step, **_plain_row(step)}.items():
            given.tensors[name].array[...] = array
        binding.run()
        predictions.append(made.tensors["next_sample"].array.copy())
    return predictions


def _plain_row(step: Inputs) -> Inputs:
    """The row of a table with which the next sample is the network's output: p = 0, q = 1, u1 = 1."""
    update = np.zeros_like(step["update"])
    update[:, 1] = 1
    row: dict[str, Any] = {"to_prediction": (0, 1), "bounds": 3e38, "update": update}
    return row | {name: neutral for name, (_, neutral) in OPTIONS.items() if name in step}
