"""Pictures of many captions: painted once, judged, and compared with the reference."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allaprima.benchmarks.captions import (
    Caption,
    CaptionsRun,
    held_out_captions,
    paint_captions,
    places,
    read_captions,
)
from allaprima.benchmarks.contestants import Contestant, Painted
from allaprima.benchmarks.plan import Plan, Settings, Work, grid
from allaprima.benchmarks.quality import choose_reference, compare_pictures, picture_name
from allaprima.benchmarks.scores import HEAD, list_pictures, rows, score_captions, score_fidelity
from allaprima.bundle import RequestError
from allaprima.models.shapes.scenes import render

SETTINGS = Settings("a", "euler", seed=1, guidance_scale=2.0, threads=1)
CAPTIONS = [Caption("a", 7, 32, 16), Caption("b", 8, 16, 16), Caption("c", 9, 32, 16)]


@dataclass
class Painter:
    """Paints its seed, and fails at a caption."""

    settings: Settings
    works: Sequence[Work]
    fails_at: str

    def paint(self, work: Work) -> Painted:
        if self.settings.prompt == self.fails_at:
            raise ValueError("no paint")
        assert work in self.works
        pixels = np.full((work.height, work.width, 3), self.settings.seed, np.uint8)
        return Painted([Image.fromarray(pixels)])

    def host_memory(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def open_painter(fails_at: str, settings: Settings, works: Sequence[Work]) -> Painter:
    return Painter(settings, works, fails_at)


def contestant(name: str, precision: str = "fp32", *, fails_at: str = "", same: bool = True) -> Contestant:
    return Contestant(name, precision, functools.partial(open_painter, fails_at), same_picture=same)


def job(folder: Path, **fields: object) -> CaptionsRun:
    return replace(
        CaptionsRun(contestant("one"), SETTINGS, tuple(CAPTIONS), 4, folder, None),
        **fields,  # type: ignore[arg-type]
    )


def test_each_caption_has_its_seed_and_size(tmp_path: Path) -> None:
    assert sorted(paint_captions(job(tmp_path))) == [0, 1, 2]
    for caption, path in zip(CAPTIONS, places(tmp_path, CAPTIONS), strict=True):
        with Image.open(path) as image:
            assert image.size == (caption.width, caption.height)
            assert image.getpixel((0, 0)) == (caption.seed,) * 3


def test_a_run_that_was_cut_short_goes_on_and_another_one_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no paint"):
        list(paint_captions(job(tmp_path, contestant=contestant("one", fails_at="c"))))
    assert list(paint_captions(job(tmp_path))) == [2], "those of one size together, the smallest first"
    assert list(paint_captions(job(tmp_path))) == []
    assert len(list(paint_captions(job(tmp_path, steps=5)))) == 3
    assert len(list(paint_captions(job(tmp_path, steps=5, settings=replace(SETTINGS, sampler="ddim"))))) == 3


def test_pictures_of_another_model_are_painted_again(tmp_path: Path) -> None:
    bundle, checkpoint = tmp_path / "bundle", tmp_path / "checkpoint"
    for folder, name in ((bundle, "bundle.json"), (checkpoint, "weights")):
        folder.mkdir()
        (folder / name).write_text("1")
    one = replace(contestant("one"), bundle=str(bundle), checkpoint=checkpoint, versions={"peer": "1.0"})
    asked = job(tmp_path / "pictures", contestant=one)
    assert len(list(paint_captions(asked))) == 3
    assert list(paint_captions(asked)) == []
    (bundle / "bundle.json").write_text("2")
    assert len(list(paint_captions(asked))) == 3
    (checkpoint / "weights").write_text("other")
    assert len(list(paint_captions(asked))) == 3
    newer = replace(asked, contestant=replace(one, versions={"peer": "1.1"}))
    assert len(list(paint_captions(newer))) == 3
    assert list(paint_captions(newer)) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        list(paint_captions(job(tmp_path / "file" / "one")))


def test_captions_of_files(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "coco.tsv").write_text('id\tcaption\tseed\n1\ta "big" cat\t4\n2\ta dog\t5\n')
    plain = read_captions(tmp_path / "plain.txt", 64, 32, seed=3)
    assert plain == [Caption("a cat", 3, 64, 32), Caption("a dog", 4, 64, 32)]
    assert [each.text for each in read_captions(tmp_path / "coco.tsv", 1, 1, 0)] == ['a "big" cat', "a dog"]


def test_files_without_captions(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.tsv").write_text("id\ttext\n1\ta\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "short.tsv").write_text("id\tcaption\n1\ta cat\n2\n")
    for name, message in {
        "empty.txt": "has no captions",
        "short.tsv": "has no caption in line 3",
        "other.tsv": "has no column 'caption'",
        "bytes.txt": "cannot be read",
        "none.txt": "cannot be read",
    }.items():
        with pytest.raises(RequestError, match=f"{name} {message}"):
            read_captions(tmp_path / name, 1, 1, 0)


def test_held_out_captions_are_those_of_the_scenes() -> None:
    first, second = held_out_captions(2)
    assert (first.seed, second.seed) == (0, 1)
    assert first.scene is not None
    assert (first.width, first.height) == (first.scene.width, first.scene.height)
    with pytest.raises(RequestError, match="captions is 0"):
        held_out_captions(0)


def test_the_right_scene_scores(tmp_path: Path) -> None:
    """One contestant paints every scene, another the next one's."""
    captions = held_out_captions(4)
    scenes = [caption.scene for caption in captions if caption.scene is not None]
    field = [
        contestant("diffusers-fp32"),
        contestant("mad"),
        contestant("other", same=False),
        contestant("none"),
    ]
    for each, shift in zip(field[:3], (0, 1, 0), strict=True):
        (tmp_path / each.name).mkdir()
        for index, path in enumerate(places(tmp_path / each.name, captions)):
            wanted = captions[index]
            picture = Image.fromarray(render(scenes[(index + shift) % len(scenes)]))
            picture.resize((wanted.width, wanted.height)).save(path)
    found = score_captions(field, captions, tmp_path)
    assert set(found) == {"diffusers-fp32", "mad", "other"}
    assert found["diffusers-fp32"] == {"things": 1.0, "relations": found["diffusers-fp32"]["relations"]}
    assert found["mad"]["things"] < 0.5
    assert found["mad"]["reference"] == "diffusers-fp32"
    assert found["mad"]["psnr"]["smallest"] < 20
    assert found["mad"]["psnr"]["below 35"] > 0
    assert found["mad"]["ssim"]["median"] < 0.99
    assert "psnr" not in found["other"]
    head, *_ = rows(found)
    assert len(head) == len(HEAD)
    assert head[:2] == ("diffusers-fp32", "100.0%")
    assert head[3:] == ("–",) * 5


def test_one_picture_is_compared(tmp_path: Path) -> None:
    work = Work(1, 16, 16, 4)
    colours = {"first": 100, "diffusers-fp32": 101, "half": 90, "other": 0}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / name / picture_name(work))
    field = [
        contestant("first"),
        contestant("diffusers-fp32"),
        contestant("half", "bf16"),
        contestant("other", same=False),
        contestant("absent"),
    ]
    plan = Plan((work,), SETTINGS, 1, 1)
    found = compare_pictures(field, plan, tmp_path)
    assert (found["batch"], found["steps"]) == (1, 4)
    assert found["reference"] == "diffusers-fp32"
    assert found["psnr"]["first"] == pytest.approx(48.13, abs=0.01)
    assert set(found["psnr"]) == set(found["ssim"]) == {"first", "half"}
    assert found["ssim"]["half"] < found["ssim"]["first"] < 1
    assert found["other"] == ["other"]
    assert compare_pictures(field[2:], plan, tmp_path) == {}
    assert choose_reference(field[2:4]) is None


def test_every_configuration_is_compared(tmp_path: Path) -> None:
    works = grid((1, 20), ((16, 16),), (1, 2))
    plan = Plan(works, SETTINGS, 1, 1)
    field = [contestant("a"), contestant("b", "bf16"), contestant("c", "bf16")]
    for each, colour in zip(field, (100, 101, 110), strict=True):
        (tmp_path / each.name).mkdir()
        for work in works if each.name != "c" else works[:1]:
            shade = colour + work.steps * (each.name == "b")
            Image.new("RGB", (16, 16), (shade,) * 3).save(tmp_path / each.name / picture_name(work))
    found = compare_pictures(field, plan, tmp_path)
    assert [(each["batch"], each["steps"], set(each["psnr"])) for each in found["configurations"]] == [
        *((1, 1, {"b", "c"}), (1, 20, {"b"}), (2, 1, {"b"}), (2, 20, {"b"})),
    ]
    at_one, at_twenty = (each["psnr"]["b"] for each in found["configurations"][:2])
    assert at_one > at_twenty + 10
    assert (found["batch"], found["steps"], found["psnr"]) == (1, 20, {"b": at_twenty})
    (tmp_path / "a" / picture_name(works[1])).unlink()
    found = compare_pictures(field, plan, tmp_path)
    assert (found["batch"], found["steps"]) == (1, 1), "of an interrupted run, what there is"
    (tmp_path / "b" / picture_name(works[0])).write_text("no picture")
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        compare_pictures(field, plan, tmp_path)


def test_fidelity_needs_both_halves(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="both"):
        score_fidelity([], [], inception=tmp_path, reference=None, clip=None)
    with pytest.raises(RequestError, match="no folder with pictures"):
        list_pictures(tmp_path)
    assert "mlperf_sdxl" not in score_fidelity([], [], inception=None, reference=None, clip=None)
    found = score_fidelity([tmp_path], ["a"], inception=None, reference=None, clip=None, gate=True)
    assert found["mlperf_sdxl"] == {
        "passed": None,
        "reason": "the gate of MLPerf Inference, Stable Diffusion XL is for 5000 pictures, not 1",
    }
    assert json.dumps(found)
