"""The manifest's JSON: a faithful round trip, and a refusal with its place for everything else."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allaprima.bundle import BundleError, FileEntry, Latent, Manifest, Parity, Quantization, TensorSpec
from allaprima.bundle.manifest import check_relative

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def document(manifest: Manifest) -> dict[str, Any]:
    """The JSON of a whole manifest, files included."""
    files = {path: FileEntry(3, "0" * 64) for path in ("denoiser/model.onnx", "tokenizer/tokenizer.json")}
    value: dict[str, Any] = json.loads(json.dumps(dataclasses.replace(manifest, files=files).to_json()))
    return value


def test_round_trip(document: dict[str, Any]) -> None:
    manifest = Manifest.from_json(document)
    assert manifest.to_json() == document
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.components["denoiser"].inputs[0].shape == ("B", 4, "H", "W")
    assert manifest.components["denoiser"].parity[0].shapes["sample"] == (2, 4, 8, 12)
    assert manifest.scheduler["trained_betas"] is None


def test_a_tokenizer_without_a_beginning(document: dict[str, Any]) -> None:
    tokenizers = document["tokenizers"]
    assert Manifest.from_json(document).tokenizers["text_encoder"].room == 75
    tokenizers["text_encoder"]["bos"] = None
    manifest = Manifest.from_json(document)
    assert manifest.tokenizers["text_encoder"].room == 76
    assert manifest.to_json() == document
    tokenizers["text_encoder"]["bos"] = "<s>"
    with pytest.raises(BundleError, match="bos' should be an integer, not '<s>'"):
        Manifest.from_json(document)


def test_later_fields_may_be_absent(document: dict[str, Any], manifest: Manifest) -> None:
    """As in bundles that were written before there were any; where they say something, they are kept."""
    plain = document["components"]["denoiser"]
    assert not {"weights", "float32_graph"} & plain.keys()
    assert Manifest.from_json(document).components["denoiser"].weights is None
    plain |= {"weights": "int8", "float32_graph": "denoiser/float32.onnx"}
    read = Manifest.from_json(document)
    assert read.components["denoiser"].weights == "int8"
    assert read.components["denoiser"].precisions == ("fp16", "fp32")
    assert manifest.components["denoiser"].precisions == ("fp16",)
    assert set(read.required()) - set(manifest.required()) == {"denoiser/float32.onnx"}
    assert read.to_json() == document
    plain["weights"] = 8
    with pytest.raises(BundleError, match=r"components\.denoiser\.weights"):
        Manifest.from_json(document)
    plain |= {"weights": None, "float32_graph": "../other.onnx"}
    with pytest.raises(BundleError, match="leaves the bundle"):
        Manifest.from_json(document)


def test_what_is_said_of_a_quantized_graph(document: dict[str, Any]) -> None:
    plain = document["components"]["denoiser"]
    assert "quantization" not in plain
    said: dict[str, Any] = {"dtype": "int8", "layers": 3, "total": 4, "error": 0.01}
    said |= {"held_out": 20, "samples": 8, "steps": 20}
    plain["quantization"] = said
    read = Manifest.from_json(document)
    assert read.components["denoiser"].quantization == Quantization("int8", 3, 4, 0.01, 20, 8, 20)
    assert read.to_json() == document
    for change, words in (
        ({"error": "small"}, "error"),
        ({"layers": 5}, "5 of 4 layers"),
        ({"error": -1}, "-1"),
    ):
        plain["quantization"] = said | change
        with pytest.raises(BundleError, match=rf"components\.denoiser\.quantization.*{words}"):
            Manifest.from_json(document)
    plain["quantization"] = {"dtype": "int8"}
    with pytest.raises(BundleError, match=r"missing field 'components\.denoiser\.quantization\.layers'"):
        Manifest.from_json(document)


def test_every_field_of_every_record_is_demanded(document: dict[str, Any]) -> None:
    """Remove each key of the document in turn, except where keys are free (mappings by name)."""
    free = ("scheduler", "versions", "files", "components", "shapes", "tokenizers")

    def visit(node: Any, path: str, parent: str) -> None:
        if isinstance(node, list):
            for index, item in enumerate(node):
                visit(item, f"{path}[{index}]", "")
        if not isinstance(node, dict):
            return
        for key in list(node):
            place = f"{path}.{key}" if path else key
            if parent not in free:
                value = node.pop(key)
                with pytest.raises(BundleError) as caught:
                    Manifest.from_json(document)
                assert str(caught.value) == f"missing field '{place}'"
                node[key] = value
            if parent != "scheduler":
                visit(node[key], place, key)

    document = copy.deepcopy(document)
    visit(document, "", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "unknown field 'colour'"),
        (lambda d: d["latent"].update(x=1), "unknown field 'latent.x'"),
        (lambda d: d.update(name=3), "field 'name' should be a string, not 3"),
        (lambda d: d.update(history=True), "field 'history' should be an integer, not True"),
        (lambda d: d.update(history=1.0), "field 'history' should be an integer, not 1.0"),
        (lambda d: d.update(history=-1), "history is -1"),
        (lambda d: d.update(components=[]), r"field 'components' should be an object, not \[\]"),
        (
            lambda d: d["defaults"].update(guidance_scale="5"),
            "'defaults.guidance_scale' should be a finite number",
        ),
        (lambda d: d["defaults"].update(guidance_scale=float("nan")), "should be a finite number, not nan"),
        (lambda d: d["defaults"].update(height=0), "field 'defaults': .*height=0"),
        (lambda d: d["latent"].update(multiple=12), "field 'latent': .*multiple=12"),
        (
            lambda d: d["components"]["denoiser"].update(inputs={}),
            "'components.denoiser.inputs' should be an array",
        ),
        (lambda d: d["components"]["denoiser"]["inputs"][1].update(shape=[None]), r"inputs\[1\].shape\[0\]'"),
        (
            lambda d: d["files"]["denoiser/model.onnx"].update(sha256="0" * 63),
            "field 'files.denoiser/model.onnx'",
        ),
        (lambda d: d["files"]["denoiser/model.onnx"].update(size=-1), "size -1"),
        (lambda d: d["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}), "'../x' leaves the bundle"),
        (
            lambda d: d["tokenizers"]["text_encoder"].update(file="/etc/passwd"),
            "'/etc/passwd' leaves the bundle",
        ),
        (lambda d: d["components"]["denoiser"].update(graph="a/../../b"), "leaves the bundle"),
        (lambda d: d.update(schema=1), "older allaprima, schema 1 < 2: export the checkpoint again"),
        (lambda d: d.update(tokenizers={}), "there should be tokenizers, all of one length"),
        (lambda d: d.update(preview={"matrix": [[1.0]], "offset": [0.0] * 3}), "not a map to three colours"),
        (lambda d: d.update(schema="1"), "field 'schema' should be an integer"),
    ],
)
def test_refusals_name_the_field(document: dict[str, Any], change: Change, message: str) -> None:
    change(document)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(document)


def test_newer_schema_is_told_before_unknown_fields() -> None:
    with pytest.raises(BundleError, match="written by a newer allaprima, schema 7 > 2: upgrade allaprima"):
        Manifest.from_json({"schema": 7, "marvel": []})


@pytest.mark.parametrize("value", [None, [], "manifest", 1])
def test_not_an_object(value: object) -> None:
    with pytest.raises(BundleError, match="the document should be an object"):
        Manifest.from_json(value)


def test_long_values_are_cut() -> None:
    with pytest.raises(BundleError) as caught:
        Latent.from_json({"channels": "x" * 1000, "downscale": 8, "multiple": 64})
    assert len(str(caught.value)) < 150


@given(
    st.builds(
        TensorSpec,
        name=st.text(),
        dtype=st.sampled_from(["float32", "int64", "uint8"]),
        shape=st.lists(st.integers(0, 2**40) | st.text()).map(tuple),
    )
)
def test_any_spec_survives_json_text(spec: TensorSpec) -> None:
    assert TensorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**50), 2**50))
def test_numbers_survive_json_text(max_abs: float, relative: int) -> None:
    text = json.dumps({"shapes": {"x": [1, 2]}, "max_abs": max_abs, "relative": relative})
    assert Parity.from_json(json.loads(text)) == Parity({"x": (1, 2)}, max_abs, float(relative))


@pytest.mark.parametrize(
    "path", ["", "/a", "../a", "a/..", "a//b", "a/", "./a", "a\\b", "C:/a", "C:a", "a\0b"]
)
def test_paths_that_leave(path: str) -> None:
    with pytest.raises(ValueError, match="plain relative path"):
        check_relative(path)


@pytest.mark.parametrize("path", ["a", "a/b.c", "a/..b", "tokenizer/tokenizer.json"])
def test_paths_that_stay(path: str) -> None:
    assert check_relative(path) == path
