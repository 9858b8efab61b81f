"""What an engine's own precision and kernels cost: its outputs against the same graph in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allaprima.bundle import BackendError, BuildError, Bundle, Component, Profile, TensorSpec
from allaprima.runtime import Session
from allaprima.runtime.backends import backends, choose, compiles, engine_precision, open_session

Arrays = Mapping[str, NDArray[Any]]


LIMIT = 0.5
"""An engine that is off by more of the standard deviation than this is broken, not just less precise."""


def measure_error(
    bundle: Bundle, name: str, engine: Session, reference: Session, profile: Profile | None = None
) -> float:
    """Root mean square difference over the reference's standard deviation, the worst of all outputs.

    The inputs are random: one sample of a small picture with two guidance branches, or the shapes that
    `profile` serves best. Both sessions are closed.

    Raises:
        BuildError: an output that is not finite, or is off by more than `LIMIT`.
    """
    component, latent = bundle.component(name), bundle.manifest.latent
    side = latent.multiple // latent.downscale
    extents = {"B": 1, "G": 2, "H": 2 * side, "W": 3 * side, "L": bundle.manifest.length}
    if profile is not None:
        extents |= {axis: best for axis, (_, best, _) in profile.extents.items()}
    # All ids up to a special token's have an embedding. CLIP's are its last, T5's its first.
    specials = [1 + max(each.bos or 0, each.eos, each.pad) for each in bundle.manifest.tokenizers.values()]
    inputs = draw_inputs(component, extents, min(specials))
    precision = engine.precision
    wanted = _run(reference, component, inputs, extents)
    outputs = _run(engine, component, inputs, extents)
    for output, value in outputs.items():
        if not np.isfinite(value).all():
            raise BuildError(f"{name}: the engine's output {output} is not finite in {precision}: try fp32")
        if not np.isfinite(wanted[output]).all():
            raise BuildError(f"{name}: the graph's output {output} is not finite on random inputs")
    error = max(_relative(outputs[output], wanted[output]) for output in wanted)
    if error > LIMIT:
        raise BuildError(
            f"{name}: the engine in {precision} is off by {error:.2f} standard deviations: try fp32"
        )
    return error


def draw_inputs(component: Component, extents: Mapping[str, int], vocabulary: int) -> Arrays:
    """Random inputs: ids within the vocabulary, timesteps within the schedule, everything else normal."""
    random = np.random.default_rng(0)
    return {spec.name: _draw(spec, spec.resolve(extents), vocabulary, random) for spec in component.inputs}


def _draw(
    spec: TensorSpec, shape: tuple[int, ...], vocabulary: int, random: np.random.Generator
) -> NDArray[Any]:
    if spec.dtype == "int64":
        return random.integers(0, vocabulary, shape)
    if spec.name.endswith("attention_mask"):
        return np.ones(shape, np.float32)
    if spec.name == "timestep":
        return random.uniform(0, 999, shape).astype(np.float32)
    if spec.name == "time_ids":
        return random.integers(0, 1024, shape).astype(np.float32)
    if spec.name.endswith("attention_mask"):  # padding in the second half
        return np.broadcast_to(np.arange(shape[1]) <= shape[1] // 2, shape).astype(np.float32)
    if spec.name == "pooling_weights":
        return np.full(shape, 1 / shape[1], np.float32)
    if spec.name == "thresholds":
        return np.stack([np.full(shape[0], 0.9), np.full(shape[0], 1.5)], axis=1).astype(np.float32)
    if spec.name == "bounds":
        return np.full(shape, 3e38, np.float32)
    return random.standard_normal(shape).astype(spec.dtype)


def _run(session: Session, component: Component, inputs: Arrays, extents: Mapping[str, int]) -> Arrays:
    try:
        given, made = (
            session.memory.allocate({spec.name: (spec.resolve(extents), spec.dtype) for spec in specs})
            for specs in (component.inputs, component.outputs)
        )
        for name, array in inputs.items():
            given.tensors[name].array[...] = array
        given.push()
        session.bind({**given.tensors, **made.tensors}).run()
        made.pull()
        return {name: tensor.array for name, tensor in made.tensors.items()}
    finally:
        session.close()


def open_reference(bundle: Bundle, name: str, backend: str) -> Session:
    """The graph itself, in float32 if the backend can choose or the bundle has such a graph.

    Else it is in its own precision. For a backend that only runs what was built, it is on the processor.
    Raises BackendError.
    """
    component = bundle.component(name)
    wide = component.widens and (component.overflows_fp16 or not compiles(backend))
    if not compiles(backend):
        backend = "openvino" if component.precision == "bf16" else "ort"
    if wide and any(each.name == "ort" and each.available for each in backends()):
        backend = "ort"  # of a large text encoder the weights stay in their file
    info = next(info for info in backends() if info.name == choose(backend))
    if "fp32" not in info.precisions:
        raise BackendError(f"{backend} cannot compute in fp32 here, so its engines cannot be verified")
    precision = "fp32" if info.converts else engine_precision(component, backend, None)
    return open_session(bundle.path(component.graph), component, backend, precision=precision)


def _relative(value: NDArray[Any], wanted: NDArray[Any]) -> float:
    difference = value.astype(np.float64) - wanted
    # A picture may be nearly of one colour: a hundredth of its largest value stands in for the deviation
    scale = max(1e-12, wanted.std(dtype=np.float64), np.abs(wanted.astype(np.float64)).max() / 100)
    return float(np.sqrt(np.square(difference).mean()) / scale)
