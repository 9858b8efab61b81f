"""Which steps are taken in full, and what a request says of it."""

from dataclasses import replace

import pytest

from allaprima.bundle import Manifest, RequestError
from allaprima.runtime import Parameters, Request
from allaprima.runtime.image import describe
from allaprima.runtime.step_cache import DEEP, SHALLOW, is_full


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
