"""Which steps are taken in full, and what a request says of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allaprima.bundle import Manifest, RequestError, TensorSpec
from allaprima.runtime import Parameters, Request
from allaprima.runtime.image import describe
from allaprima.runtime.memory import HostBlock, HostMemory, Layout
from allaprima.runtime.sessions.fake import NumpySession
from allaprima.runtime.stages import Denoiser
from allaprima.runtime.step_cache import DEEP, FEATURES, SHALLOW, is_full


@pytest.mark.parametrize(
    ("interval", "full"),
    [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (3, [0, 3, 6]), (5, [0, 5]), (9, [0])],
)
def test_rows(interval: int, full: list[int]) -> None:
    assert [row for row in range(7) if is_full(row, interval)] == full


def test_request(manifest: Manifest) -> None:
    assert Request("").check(manifest).cache_interval == 1
    components = {**manifest.components, **dict.fromkeys((DEEP, SHALLOW), manifest.components["denoiser"])}
    able = replace(manifest, components=components)
    assert Request("", cache_interval=3).check(able).cache_interval == 3
    for bundle in (manifest, replace(manifest, components={**manifest.components, DEEP: components[DEEP]})):
        with pytest.raises(RequestError, match=r"bundle tiny has no graphs for it: .* with --step-cache"):
            Request("", cache_interval=3).check(bundle)


def test_pictures_say_so() -> None:
    made = Parameters("a", None, 4, 3.0, "ddim", 6, 32, 96, 0.0, "tiny", "ort", "fp32", "1")
    assert "Cache interval" not in describe(made)
    assert "Size: 96x32, Cache interval: 3, Model: tiny" in describe(replace(made, cache_interval=3))


class WatchedMemory(HostMemory):
    """Notes what is pushed and pulled."""

    def __init__(self) -> None:
        self.moved: set[str] = set()

    def allocate(self, layout: Layout) -> HostBlock:
        moved = self.moved

        class Block(HostBlock):
            def push(self) -> None:
                moved.update(self.tensors)

            pull = push

        return Block(super().allocate(layout).tensors)


def test_features_go_from_graph_to_graph(manifest: Manifest) -> None:
    """Without the host; steps that are not full take those of the last that was."""
    component = manifest.components["denoiser"]
    features = TensorSpec(FEATURES, "float32", ("G*B", 5, "H", "W"))
    calls: list[str] = []

    def deep(given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        calls.append("deep")
        kept = np.full((4, 5, 4, 8), 100 * given["sample"][0, 0, 0, 0], np.float32)
        return {"next_sample": given["sample"] + 1, "next_history": given["history"], FEATURES: kept}

    def shallow(given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        calls.append("shallow")
        made = given["sample"] + given[FEATURES][:2, :4]
        return {"next_sample": made, "next_history": given["history"]}

    told = tuple(spec for spec in component.inputs if spec.name != "encoder_hidden_states")
    sessions = (
        NumpySession(component.inputs, (*component.outputs, features), deep),
        NumpySession((*told, features), component.outputs, shallow),
    )
    memory = WatchedMemory()
    for session in sessions:
        session.memory = memory
    denoiser = Denoiser(sessions[0], (2, 4, 4, 8), branches=2, history=4, length=77, shallow=sessions[1])
    denoiser.sample[...] = 1
    denoiser.push()
    seen = []
    for row in range(5):
        denoiser.step(full=is_full(row, 3))
        denoiser.pull()
        seen.append(float(denoiser.sample[1, 2, 3, 4]))
    # 1 + 1, then twice what 100 times the first 1 is, 202 + 1, and 100 times 202.
    assert seen == [2, 102, 202, 203, 20403]
    assert calls == ["deep", "shallow", "shallow", "deep", "shallow"]
    assert "sample" in memory.moved
    assert FEATURES not in memory.moved
