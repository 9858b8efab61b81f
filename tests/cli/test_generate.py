"""`allaprima generate`: how words become a request, and what is written. The painter is a stand-in."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allaprima.bundle import VERSION
from allaprima.runtime import MemoryUse, Parameters, Pipeline, Progress, Result, read_parameters

Allaprima = Callable[..., SimpleNamespace]


class Easel:
    """A pipeline that remembers how it was asked and paints in one colour."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.warnings: tuple[str, ...] = ()
        self.memory: MemoryUse | None = None
        self.preview_every: int | None = None
        self.folder: list[list[str]] = []
        """What was in the current folder after each step."""

    def open(self, bundle: str, **options: Any) -> "Easel":
        self.opened = {"bundle": bundle, **options}
        return self

    def __enter__(self) -> "Easel":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def generate(
        self,
        prompt: str,
        *,
        callback: Callable[[Progress], None],
        preview_every: int | None,
        **request: Any,
    ) -> Result:
        self.asked = {"prompt": prompt, **request}
        self.preview_every = preview_every
        for step in range(1, 5):
            due = preview_every and step % preview_every == 0
            shown = [Image.new("RGB", (8, 8), (0, 0, step))] * (request["num_images"] if due else 0)
            callback(Progress("denoise", step, 4, np.zeros((1, 4, 8, 8), np.float32), tuple(shown)))
            self.folder.append(sorted(path.name for path in Path().iterdir()))
        count, seed = request["num_images"], request["seed"] or 40
        parameters = tuple(
            Parameters(
                prompt=prompt,
                negative_prompt=request["negative_prompt"],
                num_inference_steps=request["num_inference_steps"] or 20,
                guidance_scale=5.0,
                sampler="ddim",
                seed=seed + index,
                height=64,
                width=64,
                eta=0.0,
                bundle="shapes",
                backend="ort",
                precision="fp32",
                version=VERSION,
            )
            for index in range(count)
        )
        images = tuple(Image.new("RGB", (64, 64), "teal") for _ in range(count))
        timings = {"denoise": 1.0, "total": 1.25}
        return Result(images, parameters, timings, self.warnings, memory=self.memory)


@pytest.fixture
def easel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Easel:
    """The stand-in, in an empty current folder."""
    easel = Easel()
    monkeypatch.setattr(Pipeline, "open", easel.open)
    monkeypatch.chdir(tmp_path)
    return easel


def test_one_positional_is_the_prompt(allaprima: Allaprima, easel: Easel) -> None:
    outcome = allaprima("generate", "a red circle", "--seed", "7")
    assert outcome.code == 0
    assert outcome.out == "picture.png  seed 7\n1.25 s on ort in fp32\n"
    assert easel.opened == {
        "bundle": "shapes",
        "backend": "auto",
        "precision": None,
        "threads": None,
        "safety_checker": True,
        "memory_limit": None,
    }
    assert easel.asked == {
        "prompt": "a red circle",
        "negative_prompt": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "sampler": None,
        "seed": 7,
        "height": None,
        "width": None,
        "num_images": 1,
        "eta": 0.0,
        "long_prompts": False,
        "prompt_weights": False,
        "clip_skip": None,
        "guidance_rescale": 0.0,
        "image": None,
        "strength": None,
        "variation_seed": None,
        "variation_strength": 0.0,
        "mask": None,
        "sampling": {},
        "cache_interval": 1,
    }
    assert read_parameters("picture.png")["prompt"] == "a red circle"


def test_what_was_done_for_a_memory_limit(allaprima: Allaprima, easel: Easel) -> None:
    sizes = {"text_encoder": 3_000_000_000, "denoiser": 5_000_000_000}
    roles = tuple(sizes)
    easel.memory = MemoryUse(6_500_000_000, 5_250_000_000, sizes, roles, ("text_encoder",), 1.25)
    told = allaprima("generate", "x", "--memory-limit", "6.5GB").out.splitlines()[-1]
    assert told == (
        "memory: about 5.2 GB at most, of 6.5 GB; 1.2 s to load text_encoder, denoiser; unloaded text_encoder"
    )
    memory = json.loads(allaprima("generate", "x", "--memory-limit", "6.5GB", "--json").out)["memory"]
    assert memory == {
        "limit": 6_500_000_000,
        "peak": 5_250_000_000,
        "components": sizes,
        "loaded": list(roles),
        "unloaded": ["text_encoder"],
        "seconds": 1.25,
    }
    easel.memory = MemoryUse(6_500_000_000, 5_250_000_000, {}, (), (), 0.0)
    told = allaprima("generate", "x", "--memory-limit", "6.5GB").out.splitlines()[-1]
    assert told == "memory: about 5.2 GB at most, of 6.5 GB"
    easel.memory = None
    assert "memory" not in json.loads(allaprima("generate", "x", "--json").out)


def test_a_memory_limit_that_is_none(allaprima: Allaprima) -> None:
    outcome = allaprima("generate", "x", "--memory-limit", "lots")
    assert outcome.code == 2
    assert "memory_limit is 'lots': give bytes, or a text such as '8GB' or '8GiB'" in outcome.err


def test_every_option_reaches_the_pipeline(allaprima: Allaprima, easel: Easel) -> None:
    words = ["--steps", "9", "--guidance", "2.5", "--sampler", "Euler a", "--seed", "3", "--size", "768x512"]
    words += ["--eta", "0.5", "--negative-prompt", "blur", "-n", "2", "-o", "out.webp"]
    words += ["--backend", "ort", "--precision", "fp32", "--threads", "2", "--no-safety-checker"]
    words += ["--memory-limit", "6.5GB"]
    words += ["--image", "start.png", "--strength", "0.6"]
    words += ["--mask", "mask.png", "--cache-interval", "3"]
    words += ["--variation-seed", "5", "--variation-strength", "0.25"]
    words += ["--long-prompts", "--prompt-weights", "--clip-skip", "2", "--guidance-rescale", "0.7"]
    words += ["--timesteps", "999,749.5", "--sigmas", "14.6,0", "--order", "3", "--churn", "5"]
    words += ["--churn-min", "0.1", "--churn-max", "9", "--churn-noise", "1.01"]
    words += ["--scheduler-option", "timestep_spacing=trailing", "--scheduler-option", "steps_offset=2"]
    words += ["--scheduler-option", "clip_sample=true", "--prior-steps", "5", "--prior-guidance", "2"]
    outcome = allaprima("generate", "my bundle", *words, "a cat")
    assert outcome.code == 0
    assert easel.opened == {
        "bundle": "my bundle",
        "backend": "ort",
        "precision": "fp32",
        "threads": 2,
        "safety_checker": False,
        "memory_limit": "6.5GB",
    }
    assert easel.asked == {
        "prompt": "a cat",
        "negative_prompt": "blur",
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "sampler": "Euler a",
        "seed": 3,
        "height": 512,
        "width": 768,
        "num_images": 2,
        "eta": 0.5,
        "long_prompts": True,
        "prompt_weights": True,
        "clip_skip": 2,
        "guidance_rescale": 0.7,
        "image": "start.png",
        "strength": 0.6,
        "variation_seed": 5,
        "variation_strength": 0.25,
        "mask": "mask.png",
        "sampling": {
            "timesteps": [999, 749.5],
            "sigmas": [14.6, 0],
            "order": 3,
            "s_churn": 5.0,
            "s_tmin": 0.1,
            "s_tmax": 9.0,
            "s_noise": 1.01,
            "scheduler": {"timestep_spacing": "trailing", "steps_offset": 2, "clip_sample": True},
        },
        "prior_num_inference_steps": 5,
        "prior_guidance_scale": 2.0,
        "cache_interval": 3,
    }
    assert outcome.out.startswith("out-1.webp  seed 3\nout-2.webp  seed 4\n")
    assert sorted(path.name for path in Path().iterdir()) == ["out-1.webp", "out-2.webp"]


def test_previews(allaprima: Allaprima, easel: Easel) -> None:
    assert allaprima("generate", "a cat", "--preview", "small.png", "--preview-every", "3").code == 0
    assert easel.preview_every == 3
    assert easel.folder == [[], [], ["small.png"], ["small.png"]]  # whole, and nothing beside it
    with Image.open("small.png") as small:
        assert (small.size, small.getpixel((0, 0))) == ((8, 8), (0, 0, 3))


@pytest.mark.parametrize(
    ("words", "every", "files"),
    [
        ([], None, []),
        (["--preview", "small.webp"], 1, ["small.webp"]),
        (["--preview-every", "2"], 2, ["picture.preview.png"]),
        (["--preview-every", "2", "-n", "2"], 2, ["picture.preview-1.png", "picture.preview-2.png"]),
        (["--preview-every", "0"], None, []),
    ],
)
def test_where_previews_go(
    allaprima: Allaprima, easel: Easel, words: list[str], every: int | None, files: list[str]
) -> None:
    assert allaprima("generate", "a cat", *words).code == 0
    assert (easel.preview_every, easel.folder[-1]) == (every, files)


def test_prompts_that_look_like_options(allaprima: Allaprima, easel: Easel) -> None:
    assert allaprima("generate", "--seed", "1", "--", "--- a line").code == 0
    assert (easel.opened["bundle"], easel.asked["prompt"]) == ("shapes", "--- a line")


def test_a_mix_is_in_place_of_the_prompt(allaprima: Allaprima, easel: Easel) -> None:
    Path("photo.png").write_bytes(b"")
    mixed = ["--mix", "a cat=0.3", "--mix", "photo.png=-1"]
    for words in (["my bundle", *mixed], [*mixed, "my bundle", ""]):
        assert allaprima("generate", *words).code == 0
        assert (easel.opened["bundle"], easel.asked["prompt"]) == ("my bundle", "")
        assert easel.asked["mix"] == [("a cat", 0.3), (Path("photo.png"), -1.0)]
    others = ["--prior-image", "a.png", "--prior-strength", "0.5", "--hint", "b.png"]
    assert allaprima("generate", "my bundle", "a cat", *others, "--prior-negative-prompt", "c").code == 0
    asked = {name: easel.asked[name] for name in ("prior_image", "prior_strength", "hint")}
    assert asked == {"prior_image": "a.png", "prior_strength": 0.5, "hint": "b.png"}
    assert easel.asked["prior_negative_prompt"] == "c"


def test_json(allaprima: Allaprima, easel: Easel) -> None:
    easel.warnings = ("the prompt was cut",)
    outcome = allaprima("generate", "ein Kreis, schön", "--json", "--quiet")
    document = json.loads(outcome.out)
    assert outcome.err == ""
    assert document["images"][0]["path"] == "picture.png"
    assert document["images"][0]["prompt"] == "ein Kreis, schön"
    assert document["timings"]["total"] == 1.25
    assert document["warnings"] == ["the prompt was cut"]


def test_warnings_and_quiet(allaprima: Allaprima, easel: Easel) -> None:
    easel.warnings = ("the prompt was cut",)
    assert allaprima("generate", "a").err == "allaprima: warning: the prompt was cut\n"
    outcome = allaprima("generate", "a", "--quiet")
    assert (outcome.out, outcome.err) == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "512"], "argument --size: '512' is not a size: write WIDTHxHEIGHT"),
        (["--size", "-1x4"], "argument --size"),
        (["--timesteps", "9,x"], "argument --timesteps: '9,x' is not a list of numbers"),
        (["--scheduler-option", "clip"], "argument --scheduler-option: 'clip' is not an option: write NAME"),
        (["--mix", "a cat"], "argument --mix: 'a cat' has no weight: write a text or a picture's file"),
        (["--mix", "a=b"], "argument --mix: 'a=b' has no weight"),
        (["--mix", "none.png=0.5"], "argument --mix: 'none.png' is no file: name a picture"),
        (["-o", "picture.bmp"], "picture.bmp: unknown kind of picture"),
        (["-o", "none/picture.png"], "none/picture.png: there is no folder none"),
        (["--preview", "none/small.png"], "none/small.png: there is no folder none"),
        (["--preview", "small.bmp"], "small.bmp: unknown kind of picture"),
    ],
)
def test_refused_before_painting(allaprima: Allaprima, easel: Easel, words: list[str], message: str) -> None:
    outcome = allaprima("generate", "a cat", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert easel.opened == {}
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("bundle", ["", "none", "file"])
def test_bundles_that_are_none(
    allaprima: Allaprima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    outcome = allaprima("generate", bundle, "a cat")
    assert outcome.code == 2
    assert outcome.err.startswith("allaprima: error: ")
    assert outcome.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["file"]
