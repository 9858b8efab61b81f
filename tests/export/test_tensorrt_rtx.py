"""Every graph of a real export compiles with TensorRT-RTX, for shapes and devices that are not here."""

from pathlib import Path

import pytest

from allaprima.bundle import BackendError, BuildError, Bundle, find_engine
from allaprima.engine import Options, Progress, build_bundle, entries, prune, tensorrt

try:
    VERSION = tensorrt.version("tensorrt-rtx")
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=["tiny_half_bundle", "tiny_bundle"])
def exported(request: pytest.FixtureRequest) -> Bundle:
    """A real export, in half and in full precision."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


def test_every_graph_of_an_export_compiles(exported: Bundle, cache: Path) -> None:
    stages: list[Progress] = []
    step = exported.manifest.latent.multiple
    built = build_bundle(
        exported,
        backend="tensorrt-rtx",
        sizes=[(2 * step, step), (step, 2 * step)],
        batch=(1, 2),
        options=Options(targets=("8.9", "12.0")),
        progress=stages.append,
    )
    names = list(exported.manifest.components)
    assert [one.component for one in built] == names
    assert [stage.stage for stage in stages[:4]] == [
        f"{names[0]}: {stage}" for stage in ("parse", "build", "verify", "save")
    ]
    assert [stage.done for stage in stages] == list(range(4 * len(names)))
    for one in built:
        key = one.engine.key
        assert (key.backend, key.backend_version, key.precision) == (
            "tensorrt-rtx",
            VERSION,
            exported.component(one.component).precision,
        )
        assert key.device == "compute capability 8.9, 12.0"
        assert one.engine.error is None  # there is no such GPU here to run it on
        plan = (one.folder / one.engine.main).read_bytes()
        assert {name for name, bit in tensorrt.TARGETS.items() if plan[32] & bit} == {"8.9", "12.0"}
        assert find_engine(key) == one.folder / one.engine.main
    denoiser = next(one for one in built if one.component == "denoiser")
    assert len(denoiser.engine.key.profiles) == 4
    assert all(one.stale == "" for one in entries())
    assert prune() == ()
    again = build_bundle(
        exported,
        backend="tensorrt-rtx",
        sizes=[(2 * step, step), (step, 2 * step)],
        batch=(1, 2),
        options=Options(targets=("8.9", "12.0")),
    )
    assert all(one.reused for one in again)


def test_too_little_workspace_is_said(exported: Bundle, cache: Path) -> None:
    with pytest.raises(BuildError, match="cannot compile it"):
        build_bundle(exported, backend="tensorrt-rtx", options=Options(("8.9",), workspace=1024))
    assert not [path for path in cache.iterdir() if "partial" in path.name]
