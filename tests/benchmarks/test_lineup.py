"""Who is measured, and the rates of the machine that they are measured against."""

import functools
import importlib.util
import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from PIL import Image

from allaprima.benchmarks import lineup
from allaprima.benchmarks.contestants import PEERS, Contestant, Field, find_peers
from allaprima.benchmarks.lineup import Asked, line_up
from allaprima.benchmarks.ours import Way, contestant, ways
from allaprima.benchmarks.peer_diffusers import DiffusersPainter
from allaprima.benchmarks.plan import Settings, Work
from allaprima.benchmarks.rates import Rates, measure_rates
from allaprima.benchmarks.roofline import count_bundle
from allaprima.bundle import BackendError, BundleError, RequestError

SMALL = ((64, 64),)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup, "in_new_process", lambda function, *arguments: function(*arguments))


def test_the_defaults_are_the_models() -> None:
    found = line_up(Asked(("shapes",)), table=True)
    assert found.name == "shapes"
    assert [str(work) for work in found.plan.works] == [
        f"{steps} step{'s' * (steps > 1)}, batch 1, 128x128" for steps in (1, 4, 8, 20, 30, 50)
    ]
    assert (found.plan.settings.sampler, found.plan.settings.guidance_scale) == ("euler", 2.0)
    assert [each.bundle for each in found.contestants] == ["shapes"]
    alone = line_up(Asked(("shapes",)), table=False)
    assert [work.steps for work in alone.plan.works] == [20]


def test_backends_and_precisions_and_peers() -> None:
    asked = Asked(
        ("shapes",),
        sizes=SMALL,
        backends=("openvino", "ort"),
        precisions=("fp32", "auto"),
        peers=("diffusers",),
        fixed=True,
    )
    found = line_up(asked, table=True)
    names = [each.name for each in found.contestants]
    assert {"allaprima-openvino-fp32", "allaprima-openvino-fp32-fixed", "allaprima-ort-fp32"} <= set(names)
    assert names[-2:] == ["diffusers-fp32", "diffusers-bf16"]
    assert len(set(names)) == len(names)


def test_one_precision_of_a_peer() -> None:
    found = line_up(
        Asked(("shapes",), sizes=SMALL, peers=("diffusers:bf16", "diffusers-compile:fp8")), table=True
    )
    assert [each.name for each in found.contestants[1:]] == ["diffusers-bf16"]
    assert "diffusers-compile is not measured in fp8 here, but in fp32, bf16" in found.absent.values()


def test_a_peer_without_its_checkpoint_is_listed(tmp_path: Path) -> None:
    asked = Asked(("shapes",), sizes=SMALL, peers=("diffusers", "diffusers-compile"), checkpoint=tmp_path)
    found = line_up(asked, table=True)
    assert len(found.contestants) == 1
    assert list(found.absent) == ["diffusers", "diffusers-compile"]
    assert "has no model_index.json" in found.absent["diffusers"]
    with pytest.raises(RequestError, match="give --checkpoint DIR"):
        find_peers("diffusers", Field("some", None, False))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PackageNotFoundError("torch"), "PackageNotFoundError: No package metadata was found for torch"),
        (MemoryError("too much"), "MemoryError: too much"),
        (BackendError("it is not here"), "it is not here"),
    ],
)
def test_a_peer_that_cannot_be_made_ready_is_listed(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, field: Field) -> list[Contestant]:
        raise error

    monkeypatch.setattr(lineup, "find_peers", find)
    found = line_up(Asked(("shapes",), sizes=SMALL, peers=("ort", "diffusers")), table=True)
    assert found.absent == {"ort": words, "diffusers": words}
    assert len(found.contestants) == 1


@pytest.mark.parametrize(("name", "extra"), [("ort", "bench,export,ort"), ("openvino-genai", "openvino")])
def test_what_a_peer_needs_is_checked_before_it_is_made(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment without torch, which makes the graphs of both."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(BackendError, match=rf"needs torch, which is not installed: pip .*{extra}\]'"):
        find_peers(name, Field("shapes", lineup.SHAPES, gpu=False))


def test_somebody_is_in_fp32_to_be_compared_with() -> None:
    half = Asked(("shapes",), sizes=SMALL, backends=("ort",), precisions=("fp16",))
    found = line_up(half, table=True)
    assert found.reference is not None
    assert (found.reference.name, found.reference.precision) == ("diffusers-fp32", "fp32")
    assert found.reference.name not in [each.name for each in found.contestants]
    whole = replace(half, peers=("diffusers:fp32",))
    assert line_up(whole, table=True).reference is None


def test_a_checkpoint_of_another_model_is_doubted(tmp_path: Path) -> None:
    asked = Asked(("shapes",), sizes=SMALL, backends=("ort",), precisions=("fp16",))
    same = line_up(asked, table=True)
    assert (same.notes, same.sdxl) == ((), False)
    (tmp_path / "unet").mkdir()
    config = tmp_path / "unet" / "config.json"
    config.write_text('{"in_channels": 9, "out_channels": 4, "cross_attention_dim": 128}')
    assert line_up(replace(asked, checkpoint=tmp_path), table=True).notes == (), "that of inpainting"
    config.write_text('{"in_channels": 16, "out_channels": 16, "cross_attention_dim": 768}')
    other = line_up(replace(asked, checkpoint=tmp_path), table=True)
    assert "16 channels of latents, the bundle 4" in other.notes[0]
    assert "text embeddings of width 768, the bundle of 128" in other.notes[1]
    assert all("give --checkpoint DIR of the bundle's" in note for note in other.notes)
    assert other.reference is None, "its picture would say nothing"
    for text, reason in (("{", "cannot be read"), ("[]", "is no configuration of a UNet")):
        config.write_text(text)
        (note,) = line_up(replace(asked, checkpoint=tmp_path), table=True).notes
        assert note.startswith(f"{tmp_path.name}/unet/config.json {reason}")
    config.write_text('{"in_channels": 4, "out_channels": 4, "cross_attention_dim": [128, 128]}')
    assert line_up(replace(asked, checkpoint=tmp_path), table=True).notes == ()


def test_bad_words() -> None:
    with pytest.raises(RequestError, match=f"unknown peer 'torch': choose from {', '.join(PEERS)}"):
        line_up(Asked(("shapes",), peers=("torch",)), table=True)
    with pytest.raises(
        BackendError, match="unknown backend or precision 'cuda': choose from auto, all, tensorrt"
    ):
        line_up(Asked(("shapes",), backends=("cuda",)), table=True)
    with pytest.raises(BackendError, match="unknown backend or precision 'int3': choose from auto, fp32"):
        line_up(Asked(("shapes",), precisions=("int3",)), table=True)
    with pytest.raises(BundleError, match="nowhere"):
        line_up(Asked(("nowhere",)), table=True)
    with pytest.raises(RequestError, match="65"):
        line_up(Asked(("shapes",), sizes=((65, 64),)), table=True)
    with pytest.raises(RequestError, match="best"):
        line_up(Asked(("shapes",), sampler="best"), table=True)
    with pytest.raises(RequestError, match="two contestants of one name"):
        line_up(Asked(("shapes", "shapes"), backends=("ort",)), table=True)


def test_what_a_backend_refuses_is_a_reason() -> None:
    (way,) = ways("shapes", ("tensorrt",), ("fp16",))
    if not way.refused:
        pytest.skip("TensorRT works here")
    assert (way.backend, way.precision) == ("tensorrt", "fp16")
    assert "pip install" in way.refused


def test_gpus_race_in_half_precision() -> None:
    checkpoint = lineup.SHAPES
    names = [
        each.name
        for name in ("diffusers", "diffusers-compile")
        for each in find_peers(name, Field("shapes", checkpoint, gpu=True))
    ]
    assert names == ["diffusers-fp16", "diffusers-compile-fp16"]


def test_contestants_paint_the_same_picture() -> None:
    settings, work = Settings("a red circle", "dpmpp_2m", 7, 2.0, threads=1), Work(2, 64, 64, 2)
    ours = contestant("shapes", Way("ort", "fp16")).open(settings, [work])
    theirs = DiffusersPainter(lineup.SHAPES, "fp32", False, False, settings, [work])
    painted = [painter.paint(work) for painter in (ours, theirs)]
    for painter in (ours, theirs):
        painter.close()
    for one, other in zip(*(each.images for each in painted), strict=True):
        assert isinstance(one, Image.Image)
        difference = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
        assert max(difference) < 32
        assert sum(difference) / len(difference) < 1
    assert list(painted[0].stages) == ["text", "denoise", "decode"]
    assert {role: share.calls for role, share in painted[0].engine.items()} == {
        "text_encoder": 1,
        "denoiser": 2,
        "vae_decoder": 2,
    }


def test_engines_for_the_shapes_alone(cache: Path) -> None:
    settings, works = Settings("a red circle", None, 7, 2.0, threads=1), [Work(1, 64, 64, 1)]
    fixed = contestant("shapes", Way("openvino", "fp32"), fixed=True)
    assert fixed.build is not None
    fixed.build(works)
    painter = fixed.open(settings, works)
    assert painter.paint(works[0]).images[0].size == (64, 64)
    painter.close()
    assert any(
        json.loads(path.read_text())["key"]["profiles"] for path in cache.rglob("*.json") if path.is_file()
    )


def test_the_command_of_a_first_picture_is_allaprimas_own(tmp_path: Path) -> None:
    from allaprima.cli.main import main

    settings = Settings("a red circle", "ddim", 7, 2.0, threads=1)
    first = contestant("shapes", Way("ort", "fp16")).first_picture
    assert isinstance(first, functools.partial)
    words = first(settings, Work(1, 64, 64, 1), tmp_path / "a.png")
    assert main(words[words.index("generate") :]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_every_component_is_counted() -> None:
    found = count_bundle("shapes", [Work(1, 64, 64, 4), Work(1, 64, 64, 8), Work(2, 64, 64, 4)], 2.0)
    shapes = {(each["component"], tuple(each["shape"])): each for each in found if "error" not in each}
    assert len(found) == 3 * 4
    one, two = (sum(shapes["denoiser", (batch, 64, 64)]["operations"].values()) for batch in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    decoders = [shapes["vae_decoder", (batch, 64, 64)]["operations"] for batch in (1, 2)]
    assert decoders[0] == decoders[1]


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "fp32"), ("ort", "fp32")])
def test_the_rates_of_the_machine(backend: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allaprima.benchmarks.rates.SIDE", {False: 64, True: 64})
    monkeypatch.setattr("allaprima.benchmarks.rates.MOVED", 1 << 16)
    monkeypatch.setattr("allaprima.benchmarks.rates.SECONDS", 0.0)
    rates = measure_rates(backend, precision, 1)
    assert isinstance(rates, Rates)
    assert 1e5 < rates.operations < 1e15
    assert 1e5 < rates.bandwidth < 1e14
    assert f"64 x 64 matrices by {backend} in {precision}" in rates.how


def test_engines_alone_have_no_rate() -> None:
    with pytest.raises(RequestError, match="runs only engines"):
        measure_rates("tensorrt", "fp16", 1)
