"""`allaprima generate` with SDXL: second prompts, sizes, and a refiner. The pipelines are stand-ins here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from allaprima.runtime import MemoryUse, Pipeline, Result, read_parameters

from .test_generate import Easel

Allaprima = Callable[..., SimpleNamespace]
WriteBundle = Callable[..., Path]


class Easels(Easel):
    """Keeps every request; what is asked for latents gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def generate(self, prompt: str, **request: Any) -> Result:
        result = super().generate(prompt, **request)
        self.requests.append((self.opened["bundle"], self.asked))
        told = tuple(
            replace(one, bundle=Path(self.opened["bundle"]).name, denoising_end=request.get("denoising_end"))
            for one in result.parameters
        )
        if request.get("output_type") == "latent":
            return replace(result, images=(), parameters=told, latents=np.zeros((1, 4, 8, 8), np.float32))
        return replace(result, parameters=told)


@pytest.fixture
def easels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Easels:
    easels = Easels()
    monkeypatch.setattr(Pipeline, "open", easels.open)
    monkeypatch.chdir(tmp_path)
    return easels


def test_sizes_are_width_by_height_on_the_command_line(allaprima: Allaprima, easels: Easels) -> None:
    words = ["--prompt-2", "oil", "--negative-prompt-2", "", "--original-size", "2048x1024", "--crop", "8,16"]
    words += ["--target-size", "64x32", "--negative-original-size", "1x2", "--negative-crop", "3,4"]
    words += ["--negative-target-size", "5x6", "--aesthetic-score", "7", "--negative-aesthetic-score", "2"]
    assert allaprima("generate", "xl", "a cat", *words).code == 0
    ((_, asked),) = easels.requests
    assert {
        name: value for name, value in asked.items() if name.endswith(("_2", "size", "left", "score"))
    } == {
        "prompt_2": "oil",
        "negative_prompt_2": "",
        "original_size": (1024, 2048),
        "crops_coords_top_left": (16, 8),
        "target_size": (32, 64),
        "negative_original_size": (2, 1),
        "negative_crops_coords_top_left": (4, 3),
        "negative_target_size": (6, 5),
        "aesthetic_score": 7.0,
        "negative_aesthetic_score": 2.0,
    }
    assert "denoising_end" not in asked


def test_base_and_refiner(allaprima: Allaprima, easels: Easels, write_bundle: WriteBundle) -> None:
    refiner = write_bundle(Path("finish"))
    words = ["--refiner", str(refiner), "--prompt-2", "oil", "--seed", "3", "--size", "64x64"]
    words += ["--target-size", "64x32", "--original-size", "64x32", "--aesthetic-score", "7", "--eta", "0.5"]
    outcome = allaprima("generate", "base", "a cat", "--negative-prompt", "dull", *words)
    assert outcome.code == 0
    assert outcome.out.endswith("2.50 s on ort in fp32\n")
    (first, base), (second, finish) = easels.requests
    assert (first, second) == ("base", str(refiner))
    assert (base["denoising_end"], base["output_type"], base["prompt_2"]) == (0.8, "latent", "oil")
    assert "aesthetic_score" not in base
    assert (finish["denoising_start"], finish["prompt"], finish["negative_prompt"]) == (0.8, "oil", "dull")
    assert (finish["seed"], finish["sampler"], finish["num_inference_steps"]) == (3, "ddim", 20)
    assert (finish["original_size"], finish["aesthetic_score"], finish["eta"]) == ((32, 64), 7.0, 0.5)
    assert finish["image"].shape == (1, 4, 8, 8)
    assert not finish.keys() & {
        "target_size",
        "prompt_2",
        "height",
        "output_type",
        "denoising_end",
        "strength",
    }
    told = read_parameters("picture.png")
    assert (told["bundle"], told["refiner"], told["denoising_end"]) == ("base", "finish", 0.8)


def test_both_tell_what_they_did_for_a_memory_limit(
    allaprima: Allaprima, easels: Easels, write_bundle: WriteBundle
) -> None:
    easels.memory = MemoryUse(900, 800, {"denoiser": 700}, ("denoiser",), ("denoiser",), 1.5)
    words = ["--refiner", str(write_bundle(Path("finish"))), "--memory-limit", "900B", "--json"]
    memory = json.loads(allaprima("generate", "base", "a cat", *words).out)["memory"]
    both = ["denoiser", "the refiner's denoiser"]
    assert memory == {
        "limit": 900,
        "peak": 800,
        "components": dict.fromkeys(both, 700),
        "loaded": both,
        "unloaded": both,
        "seconds": 3.0,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--refiner", "nowhere"), "nowhere"),
        (("--refiner-start", "0.5"), "--refiner-start is 0.5, but there is no --refiner: name one"),
        (("--crop", "8"), "'8' is not a corner: write X,Y in pixels"),
        (("--original-size", "8"), "'8' is not a size: write WIDTHxHEIGHT"),
        (
            ("--refiner", "shapes", "--cache-interval", "2"),
            "cache_interval is 2, but the bundle shapes has no",
        ),
    ],
)
def test_what_is_refused_before_painting(
    allaprima: Allaprima, easels: Easels, words: tuple[str, ...], message: str
) -> None:
    outcome = allaprima("generate", "base", "a cat", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert easels.requests == []
