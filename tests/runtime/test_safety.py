"""The safety checker in a pipeline: which pictures it looks at, and what comes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from allaprima.bundle import Bundle, BundleError, BundleWriter, Component, TensorSpec
from allaprima.runtime import Pipeline, Result

from .conftest import HEADER

# Both "cosines" are the mean of the picture's red channel, which is normalised to -1 .. 1.
GRAPH = """
safety_checker (float[B, 3, 16, 16] clip_input) => (float[B, 1] special, float[B, 1] concepts) {
    start = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [1]> ()
    red = Slice (clip_input, start, end, axis)
    sides = Constant <value_ints = [2, 3]> ()
    special = ReduceMean <keepdims = 0> (red, sides)
    concepts = Identity (special)
}
"""
SETTINGS = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "special": [2.0], "concepts": [0.0]}


def watch(bundle: Bundle, folder: Path, threshold: float = 0.0) -> Bundle:
    """The small bundle with a checker that does not like red."""
    component = Component(
        "safety_checker/model.onnx",
        "fp32",
        (TensorSpec("clip_input", "float32", ("B", 3, 16, 16)),),
        (TensorSpec("special", "float32", ("B", 1)), TensorSpec("concepts", "float32", ("B", 1))),
        (),
    )
    manifest = bundle.manifest
    components = {**manifest.components, "safety_checker": component}
    with BundleWriter(folder / "watched") as writer:
        for name in manifest.files:
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_bytes(bundle.path(name).read_bytes())
        (writer.folder / "safety_checker").mkdir()
        onnx.save(onnx.parser.parse_model(HEADER + GRAPH), writer.folder / component.graph)
        settings = json.dumps({**SETTINGS, "concepts": [threshold]})
        (writer.folder / "safety_checker" / "settings.json").write_text(settings)
        return writer.commit(replace(manifest, components=components, files={}))


def paint(bundle: Bundle, *, safety_checker: bool = True) -> Result:
    with Pipeline.open(bundle.folder, backend="ort", threads=1, safety_checker=safety_checker) as pipeline:
        return pipeline.generate("a red circle", seed=1, num_images=6, num_inference_steps=2)


def test_flagged_pictures_are_blurred(bundle: Bundle, tmp_path: Path) -> None:
    plain = paint(bundle)
    assert plain.flagged is None
    reds = [
        float(np.asarray(image)[16:-16, :, 0].mean()) for image in plain.images
    ]  # of the middle, a square
    limit = np.mean(sorted(reds)[2:4])
    result = paint(watch(bundle, tmp_path, threshold=limit / 127.5 - 1))
    red = [each > limit for each in reds]
    assert result.flagged == tuple(red)
    assert sum(red) == 3
    for before, after, bad in zip(plain.images, result.images, red, strict=True):
        old, new = (np.asarray(image).astype(np.float64) for image in (before, after))
        assert old.shape == new.shape
        if bad:
            assert np.abs(np.diff(old, axis=0)).max() > 100 > 2 * np.abs(np.diff(new, axis=0)).max()
            assert abs(new.mean() - old.mean()) < 8
        else:
            assert np.array_equal(old, new)
    wanted = [
        f"picture {index + 1} was flagged by the model's safety checker and is blurred"
        for index, bad in enumerate(red)
        if bad
    ]
    assert list(result.warnings) == wanted


def test_switched_off(bundle: Bundle, tmp_path: Path) -> None:
    plain, result = paint(bundle), paint(watch(bundle, tmp_path, -9.0), safety_checker=False)
    assert result.flagged is None
    assert result.warnings == ()
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in plain.images]


def test_settings_that_cannot_be_read(bundle: Bundle, tmp_path: Path) -> None:
    watched = watch(bundle, tmp_path)
    path = watched.path("safety_checker/settings.json")
    path.write_text(path.read_text().replace("16", '"6'))
    with pytest.raises(BundleError, match="settings of the safety checker cannot be read"):
        paint(watched)
