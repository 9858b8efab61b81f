"""`allaprima bench quality`, and how peers are named."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save
from PIL import Image

from allaprima.benchmarks import fidelity

from .conftest import Allaprima


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 3 pictures of noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    """Features that are the means of the channels."""
    sizes = {"x": ["B", 3, "H", "W"], "y": ["B", 3, 1, 1]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sizes.items()]
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    graph = helper.make_graph([node], "mean", values[:1], values[1:])
    path = tmp_path / "mean.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_pictures_of_a_folder(allaprima: Allaprima, pictures: Path, inception: Path, tmp_path: Path) -> None:
    """Their distance to themselves is none; to other statistics it is that of the means."""
    arguments = ("bench", "quality", "--pictures", str(pictures), "--inception", str(inception), "--json")
    outcome = allaprima(*arguments, "--reference", str(pictures))
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["scores"]["pictures"]
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert (found["pictures"], found["clip"]) == (3, None)

    features = np.array([np.asarray(Image.open(path)).mean((0, 1)) / 255 for path in pictures.iterdir()])
    mean, covariance = features.mean(0) + 2, np.cov(features, rowvar=False)
    np.savez(tmp_path / "far.npz", mu=mean, sigma=covariance)
    outcome = allaprima(*arguments, "--reference", str(tmp_path / "far.npz"))
    assert json.loads(outcome.out)["scores"]["pictures"]["fid"] == pytest.approx(12, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pictures", "nowhere"), "nowhere is no folder with pictures"),
        (("--pictures", "{pictures}"), "--inception and --reference, or --clip"),
        (("--pictures", "{pictures}", "--clip", "x"), "give --texts FILE"),
        (("--pictures", "{pictures}", "--inception", "x.onnx"), "give both or none"),
        (
            ("--pictures", "{pictures}", "--clip", "x", "--texts", "{short}"),
            "3 pictures have only 1 captions",
        ),
        (
            ("--pictures", "{torn}", "--inception", "{inception}", "--reference", "{pictures}"),
            "torn.png cannot be read as a picture",
        ),
        (("--captions", "0"), "captions is 0"),
        (("--precision", "bf16", "--backend", "ort"), "nothing could be scored: allaprima-ort-bf16: onnxr"),
        (("--peer-python", "optimum-onnx"), "write NAME=PYTHON"),
        (("--peer-python", "nobody=python"), "NAME one of diffusers"),
    ],
)
def test_bad_requests(
    allaprima: Allaprima,
    pictures: Path,
    inception: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "short.txt").write_text("one\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "torn.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    places = {"pictures": pictures, "short": tmp_path / "short.txt", "torn": tmp_path / "torn"}
    places |= {"inception": inception}
    given = [argument.format(**places) for argument in arguments]
    outcome = allaprima("bench", "quality", *given, "-o", str(tmp_path / "out"), "--threads", "1")
    assert outcome.code != 0
    assert message in " ".join(outcome.err.split())


def test_a_folder_that_cannot_be_written(allaprima: Allaprima, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = allaprima("bench", "quality", "shapes", "--captions", "1", "-o", str(tmp_path / "file" / "out"))
    assert outcome.code == 2
    assert "cannot be written" in outcome.err


def test_mlperfs_gate_is_for_who_asks(
    allaprima: Allaprima, pictures: Path, inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of any model may be as many as it takes."""
    monkeypatch.setattr(fidelity, "MLPERF_SDXL", replace(fidelity.MLPERF_SDXL, samples=3))
    (pictures.parent / "texts.txt").write_text("a\n" * 3)
    arguments = ["bench", "quality", "--pictures", str(pictures), "--inception", str(inception)]
    arguments += ["--reference", str(pictures), "--texts", str(pictures.parent / "texts.txt")]
    silent = allaprima(*arguments)
    assert (silent.code, silent.err) == (0, "")
    asked = allaprima(*arguments, "--mlperf")
    assert asked.code == 0, "it could not be judged"
    assert "pictures: not judged: the gate of MLPerf Inference, Stable Diffusion XL needs" in asked.err
    monkeypatch.setattr(fidelity, "judge", lambda gate, count, fid, clip: (False, "FID is outside"))
    failed = allaprima(*arguments, "--mlperf")
    assert failed.code == 1
    assert "fails MLPerf's gate: FID is outside" in failed.err


def test_our_own_pictures_are_judged(
    allaprima: Allaprima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a peer without an interpreter is listed with what to do."""
    monkeypatch.setitem(os.environ, "ALLAPRIMA_PYTHON_OPTIMUM_ONNX", str(tmp_path / "none"))
    settings = (
        "--steps",
        "4",
        "--guidance",
        "2",
        "--threads",
        "1",
        "--backend",
        "openvino",
        "--precision",
        "fp32",
    )
    outcome = allaprima(
        *("bench", "quality", "shapes", "--captions", "2", *settings, "--vs", "optimum-onnx"),
        *("-o", str(tmp_path / "out"), "--json"),
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert set(found["scores"]) == {"allaprima-openvino-fp32"}
    assert 0 <= found["scores"]["allaprima-openvino-fp32"]["things"] <= 1
    assert "cannot be run by" in found["absent"]["optimum-onnx"]
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["scores"] == found["scores"]
    assert (tmp_path / "out" / "pictures" / "allaprima-openvino-fp32" / "00001.png").is_file()
