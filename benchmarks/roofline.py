"""How far a graph is from the machine's limit.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009): a kernel of
I operations a byte cannot do more than min(peak, I * bandwidth) operations a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allaprima.benchmarks.counting import WIDTHS, count_graph
from allaprima.benchmarks.ours import ON_CPU
from allaprima.benchmarks.plan import Work
from allaprima.benchmarks.result import Result, measurements
from allaprima.bundle import AllaprimaError, Bundle, open_bundle, resolve


@dataclass(frozen=True)
class Point:
    """One component of a contestant at one shape: seconds of a call, and what bounds them.

    `operations` of a call and `intensity` in operations a byte; `limit` in operations a second.
    """

    contestant: str
    component: str
    work: Work
    seconds: float
    operations: float
    intensity: float
    limit: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds

    @property
    def share(self) -> float:
        """Of the limit; above 1 where the limit's own measurement did worse than the graph."""
        return self.rate / self.limit


def count_bundle(folder: str, works: Sequence[Work], guidance: float) -> list[dict[str, Any]]:
    """Operations of every component at every shape, as a result holds them. To be called in a new process.

    A component that cannot be counted has the reason. Raises BundleError; ImportError where onnx is missing.
    """
    bundle = open_bundle(resolve(folder))
    found = []
    for work in dict.fromkeys(works):
        for role, component in bundle.manifest.components.items():
            about: dict[str, Any] = {
                "bundle": Path(folder).name,
                "component": role,
                "shape": list(work.shape),
            }
            try:
                extents = _extents(bundle, role, work, guidance)
                shapes = {spec.name: spec.resolve(extents) for spec in component.inputs}
                count = count_graph(bundle.path(component.graph), shapes)
            except (AllaprimaError, KeyError) as error:
                found.append({**about, "error": str(error)})
                continue
            found.append(
                {
                    **about,
                    "operations": dict(count.operations),
                    "weights": count.weights,
                    "activations": count.activations,
                }
            )
    return found


def _extents(bundle: Bundle, role: str, work: Work, guidance: float) -> Mapping[str, int]:
    """The axes of a component as the pipeline runs it: decoding one picture, reading all prompts."""
    latent, branches = bundle.manifest.latent, 2 if guidance != 1 else 1
    texts = role in bundle.manifest.tokenizers
    return {
        "B": branches if texts else 1 if role.startswith("vae") else work.batch,
        "G": branches,
        "H": work.height // latent.downscale,
        "W": work.width // latent.downscale,
        "L": bundle.manifest.length,
        "height": work.height,
        "width": work.width,
    }


def points(result: Result) -> list[Point]:
    """For every contestant whose engines were timed, in every shape: each component that was counted."""
    counts = {
        (each["bundle"], each["component"], tuple(each["shape"])): each
        for each in result["counts"]
        if "error" not in each
    }
    seconds: dict[tuple[str, str, tuple[int, int, int]], tuple[Work, list[float]]] = {}
    for name, _, work, entry in measurements(result):
        for role, engine in (entry["engine"] or {}).items():
            _, calls = seconds.setdefault((name, role, work.shape), (work, []))
            calls += [value / engine["calls"] for value in engine["seconds"]]
    found = []
    for (name, role, shape), (work, calls) in seconds.items():
        contestant = result["contestants"][name]
        count = counts.get((contestant["bundle"], role, shape))
        limit = ceiling(result, name)
        if count and limit:
            operations = sum(count["operations"].values())
            moved = width(contestant) * (count["weights"] + count["activations"])
            intensity = operations / moved
            bound = min(limit[0], intensity * limit[1])
            found.append(Point(name, role, work, statistics.median(calls), operations, intensity, bound))
    return found


def width(about: Mapping[str, Any]) -> int:
    """Bytes of a number as a contestant computes with it, from what a result says of it.

    ONNX Runtime has no kernels for fp16 on a CPU: it widens weights when it loads them, and all that follows.
    """
    return WIDTHS["fp32" if (about["backend"], about["precision"]) == ("ort", "fp16") else about["precision"]]


def ceiling(result: Result, contestant: str) -> tuple[float, float] | None:
    """Operations and bytes in a second that bound a contestant: the best that its backend was seen to do.

    A GPU is the same for all backends, so one that runs only engines is held against another of its kind.
    """
    about = result["contestants"][contestant]
    done = [
        each
        for each in result["rates"]
        if "error" not in each
        and each["precision"] == about["precision"]
        and (each["backend"] in ON_CPU) == (about["backend"] in ON_CPU)
    ]
    mine = [each for each in done if each["backend"] == about["backend"]]
    others = [] if about["backend"] in ON_CPU else done
    found = mine or others
    if not found:
        return None
    return max(each["operations"] for each in found), max(each["bandwidth"] for each in found)
