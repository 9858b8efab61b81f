"""diffusers as a contestant: its first picture, and what torch compiles of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from allaprima.benchmarks.contestants import Field, find_peers
from allaprima.benchmarks.peer_diffusers import FIRST, compile_on_gpu, reference
from allaprima.benchmarks.plan import Settings, Work
from allaprima.bundle import BackendError, RequestError

from ..export.conftest import write_tiny

WORK = Work(1, 64, 64, 3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_karras", None])
def test_the_first_picture_is_that_of_a_turn(
    sampler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it takes the same steps by the same sampler: Stable Diffusion's own calls the model once more."""
    checkpoint = write_tiny(tmp_path / "checkpoint")
    settings = Settings("a red circle", sampler, seed=11, guidance_scale=3.0, threads=1)
    contestant = find_peers("diffusers", Field("tiny", checkpoint, gpu=False))[0]
    assert (contestant.precision, contestant.checkpoint) == ("fp32", checkpoint)
    painter = contestant.open(settings, [WORK])
    wanted = np.asarray(painter.paint(WORK).images[0], np.int16)
    assert contestant.first_picture is not None
    command = contestant.first_picture(settings, WORK, tmp_path / "a.png")
    assert command[:3] == [sys.executable, "-c", FIRST]
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(compile(FIRST, "first", "exec"), {})
    with Image.open(tmp_path / "a.png") as image:
        assert np.abs(np.asarray(image, np.int16) - wanted).max() <= 1


def test_the_first_picture_loads_no_safety_checker(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": ["diffusers", "Checker"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (contestant, *_) = find_peers("diffusers", Field("tiny", tmp_path, gpu=False))
    assert contestant.first_picture is not None
    settings = Settings("a", "euler", 7, 3.0, 1)
    asked = json.loads(contestant.first_picture(settings, WORK, tmp_path / "a.png")[3])
    assert asked["loading"] == {"safety_checker": None, "requires_safety_checker": False}
    assert asked["scheduler"] == "EulerDiscreteScheduler"


def test_who_is_compared_with(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint")
    found = reference(Field("tiny", checkpoint, gpu=True))
    assert (found.name, found.precision, found.gpu) == ("diffusers-fp32", "fp32", True)
    with pytest.raises(RequestError, match="give --checkpoint DIR"):
        reference(Field("tiny", None, gpu=False))


def test_without_torch_there_is_no_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint")
    monkeypatch.setattr("allaprima.benchmarks.peer_diffusers.MODULES", ("torch", "there_is_none"))
    for name in ("diffusers", "diffusers-compile"):
        with pytest.raises(BackendError, match=r"there_is_none.*pip install 'allaprima\[bench,export\]'"):
            find_peers(name, Field("tiny", checkpoint, gpu=False))


class Torch:
    """Compiles as torch does to a CUDA graph: every replay writes to the same memory."""

    def __init__(self) -> None:
        self.modes: list[str] = []
        self.steps = 0

    def compile(self, function: Any, *, mode: str, dynamic: bool) -> Any:
        assert not dynamic
        self.modes.append(mode)
        memory = torch.zeros(4)

        def replay(*arguments: Any, **options: Any) -> tuple[torch.Tensor]:
            return (memory.copy_(function(*arguments, **options)[0]),)

        return replay

    def mark(self) -> None:
        self.steps += 1


@pytest.mark.parametrize("upcast", [False, True])
def test_on_a_gpu_all_is_a_cuda_graph_whose_outputs_last(
    upcast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Torch()
    monkeypatch.setattr(torch, "compile", fake.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", fake.mark)
    unet = SimpleNamespace(forward=lambda value, return_dict: (torch.full((4,), value),))
    vae = SimpleNamespace(
        decode=lambda value, return_dict: (torch.full((4,), -value),),
        dtype=torch.float16,
        config=SimpleNamespace(force_upcast=upcast),
    )
    compile_on_gpu(SimpleNamespace(unet=unet, vae=vae))
    # A decoder that is taken to fp32 and back has its weights in another place each time.
    assert fake.modes == ["max-autotune", "max-autotune-no-cudagraphs" if upcast else "max-autotune"]
    first, second = (unet.forward(value, return_dict=False)[0] for value in (1.0, 2.0))
    assert (first[0], second[0]) == (1.0, 2.0)
    assert vae.decode(3.0, return_dict=False)[0][0] == -3.0
    assert fake.steps == 2 + (not upcast)
