"""Post-training quantization: a bundle whose denoiser computes in 8 bits what takes most of its time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from allaprima.bundle import (
    BackendError,
    Bundle,
    BundleError,
    BundleWriter,
    Component,
    Quantization,
    RequestError,
)
from allaprima.engine.calibration import DENOISER, Calibration, HeldOut, Way, observe
from allaprima.engine.gauges import write_gauged
from allaprima.engine.graph import Graph
from allaprima.engine.layers import find_entrances
from allaprima.engine.qdq import Rounded, plan_rounding, write_rounded
from allaprima.engine.sensitivity import keep_best, measure_each
from allaprima.runtime import backends, choose

LIMIT = 0.1
"""An activation whose rounding is a larger share of it than this stays in float, with its layers."""
WORST = 0.5
"""A prediction that is off by more of its standard deviation than this is no good for anything."""
_ABLE = ("openvino", "ort")
_GAUGED = "gauged.onnx"


@dataclass(frozen=True)
class Progress:
    """Where a quantization is: a stage in words, and how many of `total` are done before it."""

    stage: str
    done: int
    total: int


def quantize_bundle(
    source: Bundle,
    target: Path,
    calibration: Calibration,
    *,
    name: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    most: float | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Write a bundle that is as `source`, but for the denoiser: its large layers compute in int8.

    Ranges are those seen while `source` paints with `backend`, "openvino" or "ort" ("auto" is the first that
    works). All other files are linked where the disk allows, else copied. `name` is the source's with -int8.
    With `most` the layers that cost most stay in float, until the error is about that or less: it takes as
    many runs of the denoiser as it has activations to round, times three.

    Raises:
        BundleError: the denoiser is quantized already, or shares its weights; or `target` is taken.
        RequestError: the calibration's pictures cannot be painted.
        BackendError: neither backend works here, or the result is too far off.
    """
    component, manifest = _check(source), source.manifest
    if most is not None and not most > 0:
        raise RequestError(f"the largest error is {most}: give a share of the deviation above 0, as 0.03")
    way = Way(source, _choose(backend), threads)
    tell = _Teller(progress, calibration.samples + 3)
    with BundleWriter(target, overwrite=overwrite) as writer:
        _take_over(source, writer.folder)
        if wide := source.component(DENOISER).float32_graph:
            (writer.folder / wide).unlink()
        path = writer.folder / component.graph
        graph = Graph(path)
        entrances, total = find_entrances(graph)
        if not entrances:
            raise BundleError(f"{source.folder}: its denoiser has no layer that could compute in int8")
        gauges = write_gauged(graph, entrances, path.with_name(_GAUGED))
        ranges, held_out = observe(way, path.with_name(_GAUGED), component, gauges, calibration, tell)
        tell("rounding")
        plan = [plan_rounding(graph, each, ranges.seen(each)) for each in entrances]
        kept = [each for each in plan if each.error <= LIMIT]
        if most is not None:
            tell.total += len(kept)
            errors = measure_each(way, graph, kept, component, held_out, tell)
            kept = keep_best(kept, errors, most)
        _replace(graph, kept, path)
        tell("measuring the error")
        made = Quantization(
            dtype="int8",
            layers=sum(len(each.entrance.layers) for each in kept),
            total=total,
            error=0.0,
            held_out=len(held_out.steps),
            samples=calibration.samples,
            steps=len(held_out.steps),
        )
        component = replace(component, parity=(), weights="int8", quantization=made)
        made = replace(made, error=_measure(way, path, component, held_out))
        components = {**manifest.components, DENOISER: replace(component, quantization=made)}
        return writer.commit(replace(manifest, name=name or f"{manifest.name}-int8", components=components))


def _check(source: Bundle) -> Component:
    component = source.component(DENOISER)
    if component.quantization is not None or component.weights is not None:
        raise BundleError(
            f"{source.folder}: its denoiser is quantized already: take the bundle that it was made of"
        )
    folder = Path(component.graph).parent
    sharing = [
        role
        for role, each in source.manifest.components.items()
        if role != DENOISER and Path(each.graph).parent == folder
    ]
    if sharing:
        raise BundleError(
            f"{source.folder}: {' and '.join(sharing)} share the denoiser's weights, and would still compute "
            "in float: export the checkpoint without --step-cache"
        )
    return replace(component, float32_graph=None)  # that one would not be quantized


def _choose(backend: str) -> str:
    if backend not in ("auto", *_ABLE):
        raise BackendError(
            f"the backend {backend} cannot calibrate: choose from auto, {', '.join(_ABLE)}; the bundle that "
            "is made runs with all of them"
        )
    able = [info.name for info in backends() if info.available and info.name in _ABLE]
    return choose(able[0] if backend == "auto" and able else _ABLE[0] if backend == "auto" else backend)


class _Teller:
    """Tells of one stage after the other: each picture, the held-out one, rounding and measuring."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self._progress, self._done, self.total = progress, 0, total

    def __call__(self, stage: str) -> None:
        if self._progress is not None:
            self._progress(Progress(stage, self._done, self.total))
        self._done += 1


def _take_over(source: Bundle, folder: Path) -> None:
    """All files, linked where possible: what is linked is never written to."""
    for relative in source.manifest.files:
        path, copy = source.path(relative).resolve(), folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not os.access(path, os.W_OK):  # it would stay so, and could not be removed or synced
                raise OSError
            os.link(path, copy)
        except OSError:
            _copy(path, copy)


def _copy(path: Path, copy: Path) -> None:
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise BundleError(f"{path} cannot be copied to {copy.parent}: {error.strerror}") from error


def _replace(graph: Graph, kept: Sequence[Rounded], path: Path) -> None:
    """Write the graph in place of the one that was taken over, and its weights."""
    made = path.parent / "made"
    made.mkdir()
    try:
        write_rounded(graph, kept, made / path.name)
        for each in made.iterdir():
            os.replace(each, path.parent / each.name)
        made.rmdir()
        path.with_name(_GAUGED).unlink()
    except OSError as error:
        raise BundleError(f"{path.parent} cannot be written: {error.strerror}") from error


def _measure(way: Way, path: Path, component: Component, held_out: HeldOut) -> float:
    """The error of the graph at `path`. Raises BackendError if it is no good."""
    with closing(way.open(path, component)) as session:
        error = held_out.error(session)
    if not error <= WORST:
        raise BackendError(
            f"the denoiser in int8 is off by {error:.2f} standard deviations of its predictions: calibrate "
            "with more samples, steps and prompts of the kind that will be painted, or leave it in float"
        )
    return error
