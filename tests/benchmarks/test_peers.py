"""Other libraries as contestants: what each needs, and whether it paints the picture of diffusers."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allaprima.benchmarks import peer_files, peer_stable_diffusion_cpp, peer_worker
from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.contestants import PEERS, Contestant, Field, find_peers
from allaprima.benchmarks.likeness import psnr
from allaprima.benchmarks.peer_diffusers import DiffusersPainter
from allaprima.benchmarks.peer_files import Shapes, prepared, require_packages
from allaprima.benchmarks.peer_worker import Program, interpreter, variable, versions_there
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import BackendError, RequestError

from ..export.conftest import write_tiny, write_tiny_xl

SETTINGS = Settings("a red circle above a blue square", "euler", seed=7, guidance_scale=3.0, threads=1)
WORKS = (Work(1, 64, 64, 3), Work(2, 96, 64, 3))
OTHER = Work(2, 64, 96, 2)
"""Of a shape that no plan knows."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLAPRIMA_CACHE", str(tmp_path / "cache"))
    for name in PEERS:
        monkeypatch.delenv(variable(name), raising=False)


def paint(contestant: Contestant, works: tuple[Work, ...]) -> list[np.ndarray]:
    """All pictures, and one of a shape that was not planned."""
    painter = contestant.open(SETTINGS, works)
    try:
        made = [painter.paint(work).images for work in (*works, OTHER)]
    finally:
        painter.close()
    for images, work in zip(made, (*works, OTHER), strict=True):
        assert [image.size for image in images] == [(work.width, work.height)] * work.batch
    return [np.asarray(image) for images in made for image in images]


@pytest.mark.parametrize(
    ("name", "write"),
    [("openvino-genai", write_tiny), ("openvino-genai", write_tiny_xl), ("ort", write_tiny_xl)],
)
def test_the_picture_is_that_of_diffusers(name: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    """For every picture of a batch, in any shape, with the tokens, noise and sigmas of the reference."""
    if name == "openvino-genai" and importlib.util.find_spec("openvino_genai") is None:
        pytest.skip("openvino-genai is not installed: it is in the extra 'bench'")
    checkpoint = write(tmp_path / "checkpoint")
    field = Field("tiny", checkpoint, gpu=False)
    reference = DiffusersPainter(checkpoint, "fp32", False, False, SETTINGS, WORKS)
    wanted = [np.asarray(image) for work in (*WORKS, OTHER) for image in reference.paint(work).images]
    contestant = next(each for each in find_peers(name, field) if each.precision == "fp32")
    found = paint(contestant, WORKS)
    likeness = [psnr(*pair) for pair in zip(found, wanted, strict=True)]
    # OpenVINO GenAI cuts the pixels off where diffusers rounds them, and tells SDXL width before height.
    genai = name == "openvino-genai"
    assert likeness[0] > (45 if genai else 60)
    assert min(likeness) > (35 if genai and write is write_tiny_xl else 45 if genai else 60)
    assert psnr(wanted[1], wanted[2]) < 40, "seeds should matter"


@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith("diffusers")])
def test_a_peer_needs_the_checkpoint(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give --checkpoint DIR"):
        find_peers(name, Field("shapes", None, gpu=False))
    with pytest.raises(RequestError, match="no diffusers folder"):
        find_peers(name, Field("shapes", tmp_path, gpu=False))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyV22Pipeline"}')
    with pytest.raises(RequestError, match="is a KandinskyV22Pipeline"):
        find_peers(name, Field("shapes", tmp_path, gpu=False))


@pytest.mark.parametrize("name", ["openvino-genai", "optimum-onnx", "optimum-intel", "stable-diffusion-cpp"])
def test_who_runs_on_no_gpu(name: str) -> None:
    with pytest.raises(BackendError, match="CPU"):
        find_peers(name, Field("shapes", SHAPES, gpu=True))


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(BackendError, match="there_is_none, which is not installed: pip install it"):
        require_packages("peer", ("json", "there_is_none"), "pip install it")


COPY = functools.partial(shutil.copytree, dirs_exist_ok=True)
"""Functions of the standard library, so that the process which calls them need not import this file."""


def test_files_are_made_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("1")
    with pytest.raises(FileExistsError):
        prepared("peer", checkpoint, {}, os.symlink)
    assert not list((tmp_path / "cache" / "peers").iterdir())
    versions = {"python": "3.12", "peer": "1.0"}
    folder = prepared("peer", checkpoint, versions, COPY)
    assert (folder / "weights").read_text() == "1"
    assert prepared("peer", checkpoint, dict(reversed(versions.items())), os.symlink) == folder
    assert prepared("peer", checkpoint, {**versions, "peer": "1.1"}, COPY) != folder
    (checkpoint / "weights").write_text("22")
    assert prepared("peer", checkpoint, versions, COPY) != folder


def test_what_shape_is_fixed() -> None:
    shapes = Shapes(WORKS)
    assert shapes.fixed == (1, 64, 64)
    assert not shapes.changed(Work(1, 64, 64, 50))
    assert shapes.changed(WORKS[1])
    assert shapes.fixed == (2, 96, 64)
    assert shapes.changed(OTHER)
    assert shapes.fixed is None
    assert not shapes.changed(WORKS[0]), "what takes any shape takes this one too"


def test_shapes_in_any_order_are_compiled_for_together() -> None:
    """As by a server: after its warm-up nobody compiles any more."""
    counts = [Work(batch, 64, 64, 3) for batch in (1, 2, 3, 4)]
    shapes = Shapes(counts)
    first, second, *others = counts
    assert [shapes.changed(work) for work in (first, second, first, *others)] == [
        *(False, True, True, False, False)
    ]
    assert shapes.fixed is None
    assert not any(shapes.changed(work) for work in (*counts, *reversed(counts)))


def test_a_sampler_that_openvino_genai_has_not(tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai", reason="it is in the extra 'bench'")
    from allaprima.benchmarks.peer_openvino_genai import choose_scheduler

    with pytest.raises(RequestError, match=r"has no dpmpp_2m: give --sampler, one of ddim, euler, "):
        choose_scheduler("dpmpp_2m", "DDIMScheduler")
    with pytest.raises(RequestError, match="has no UniPCMultistepScheduler"):
        choose_scheduler(None, "UniPCMultistepScheduler")
    assert choose_scheduler(None, "PNDMScheduler") == "PNDM"
    assert choose_scheduler("k_euler", "PNDMScheduler") == "EULER_DISCRETE"


FAKE = """
import numpy as np
from PIL import Image

class StableDiffusion:
    def __init__(self, model_path, n_threads, wtype, rng_type, prediction, **rest):
        print("a library that talks")
        if wtype == "q8_0":
            raise RuntimeError("no such type")
        assert (n_threads, wtype, rng_type, prediction) == (1, "f16", "cpu", "eps")

    def generate_image(self, prompt, width, height, sample_steps, sigmas, seed, **rest):
        if prompt == "crash":
            import os, sys
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        if prompt == "sleep":
            import time
            time.sleep(3600)
        assert len(sigmas.split(",")) == sample_steps + 1
        return [Image.fromarray(np.full((height, width, 3), seed, np.uint8))]
"""


@pytest.fixture
def fake_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Field:
    """An interpreter with a library that only seems to be stable-diffusion.cpp, and a checkpoint for it."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "stable_diffusion_cpp.py").write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/library exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(variable("stable-diffusion-cpp"), str(python))
    checkpoint = write_tiny(tmp_path / "checkpoint")
    monkeypatch.setattr(peer_stable_diffusion_cpp, "WIDTHS", [[32, 64]])
    return Field("tiny", checkpoint, gpu=False)


@pytest.mark.skipif(os.name == "nt", reason="the interpreter is a shell script")
def test_a_library_in_another_interpreter(fake_cpp: Field) -> None:
    whole, quantised = find_peers("stable-diffusion-cpp", fake_cpp)
    assert not whole.same_picture, "its tokens are CLIP's own"
    painter = whole.open(SETTINGS, WORKS)
    try:
        pictures = [np.asarray(image) for image in painter.paint(WORKS[1]).images]
        assert [picture.shape for picture in pictures] == [(64, 96, 3)] * 2
        assert [int(picture.mean()) for picture in pictures] == [7, 8]
        memory = painter.host_memory()
        assert memory is not None
        assert memory > 2**20
        painter.settings = Settings("crash", "euler", 7, 3.0, 1)
        with pytest.raises(BackendError, match="ended with 3: last words"):
            painter.paint(WORKS[0])
    finally:
        painter.close()
    with pytest.raises(BackendError, match="stable-diffusion-cpp: RuntimeError: no such type"):
        quantised.open(SETTINGS, WORKS)
    with pytest.raises(RequestError, match="no sampler ddim: give --sampler, one of euler, heun"):
        whole.open(Settings("a", "ddim", 7, 3.0, 1), WORKS)


@pytest.mark.skipif(os.name == "nt", reason="the interpreter is a shell script")
def test_a_library_in_another_interpreter_has_its_own_versions(fake_cpp: Field) -> None:
    contestant, _ = find_peers("stable-diffusion-cpp", fake_cpp)
    assert contestant.versions["numpy"] == np.__version__
    assert set(contestant.versions) == {"python", "numpy"}, "of the library itself there is only the module"
    with pytest.raises(BackendError, match="peer: false does not tell its versions"):
        versions_there("peer", "false", ())


@pytest.mark.skipif(os.name == "nt", reason="the interpreter is a shell script")
def test_a_program_ends_in_the_middle_of_a_picture_when_nobody_waits(fake_cpp: Field) -> None:
    python = os.environ[variable("stable-diffusion-cpp")]
    options = {"folder": "", "threads": 1, "precision": "f16", "prediction": "eps", "guidance_scale": 1.0}
    options |= {"sampler": "euler"}
    request = {"prompt": "sleep", "batch": 1, "width": 8, "height": 8, "steps": 1, "sigmas": [1.0, 0.0]}
    process = subprocess.Popen(
        [python, str(peer_worker.PROGRAM), "stable-diffusion-cpp", json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        process.stdin.write(json.dumps({**request, "seed": 0}).encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stdout.read() == b"", "the picture would take an hour"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_networks_that_stable_diffusion_cpp_has_not_built_in() -> None:
    with pytest.raises(BackendError, match=r"cannot run a UNet of \[64, 96, 128\] channels"):
        find_peers("stable-diffusion-cpp", Field("shapes", SHAPES, gpu=False))


def test_sigmas_are_those_of_diffusers() -> None:
    from diffusers import EulerDiscreteScheduler

    config: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for more in ({}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}):
        scheduler = EulerDiscreteScheduler(**config, **more)
        scheduler.set_timesteps(7)
        found = peer_stable_diffusion_cpp.euler_sigmas({**config, **more}, 7)
        assert found == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)


def test_an_interpreter_is_named_and_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert variable("optimum-onnx") == "ALLAPRIMA_PYTHON_OPTIMUM_ONNX"
    with pytest.raises(BackendError, match="optimum-onnx has no interpreter: install it"):
        interpreter("optimum-onnx", "json", "install it")
    assert interpreter("optimum-onnx", "json", "install it", default=sys.executable) == sys.executable
    with pytest.raises(BackendError, match=r"not usable in .*No module named 'nothing'.*: install it"):
        interpreter("optimum-onnx", "nothing", "install it", default=sys.executable)
    monkeypatch.setenv("ALLAPRIMA_PYTHON_OPTIMUM_ONNX", str(tmp_path / "none"))
    with pytest.raises(BackendError, match="cannot be run by"):
        interpreter("optimum-onnx", "json", "install it", default=sys.executable)


def test_a_program_that_does_not_start() -> None:
    with pytest.raises(BackendError, match="nobody: KeyError: 'nobody'"):
        Program(sys.executable, "nobody", {})
    assert peer_worker.PROGRAM.is_file()
    assert peer_files.CODE
