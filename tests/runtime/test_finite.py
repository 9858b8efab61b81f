"""Values that are infinite or not a number: never a black picture, but an error that names the graph."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

from allaprima.bundle import BackendError, Bundle, TensorSpec
from allaprima.runtime import Pipeline, Session, open_session
from allaprima.runtime.sessions.fake import NumpySession
from allaprima.runtime.stages import not_finite

from .conftest import DENOISER, HEADER, SPECS, TEXT_ENCODER, VAE_DECODER

PROMPT = "a red circle"
BACKENDS = ("ort", "openvino")
# As export writes it: a mean over one axis after the other, compared.
WORD = """
    size = Abs (shifted)
    rows = ReduceMean <keepdims = 0> (size, deepest)
    columns = ReduceMean <keepdims = 0> (rows, deeper)
    picture = ReduceMean <keepdims = 0> (columns, axis)
    fits = LessOrEqual (picture, largest)
    finite = Cast <to = 1> (fits)
}
"""
HONEST = (
    VAE_DECODER.rstrip()
    .removesuffix("}")
    .replace("3] image)", "3] image, float[B] finite)")
    .replace(
        "float zero = {0}>",
        "float zero = {0}, float largest = {60000}, int64[1] deepest = {3}, int64[1] deeper = {2}>",
    )
    + WORD
)


def spoiled(graph: str, line: str) -> str:
    """A graph in which one line's result is divided by zero."""
    name = line.strip().partition(" ")[0]
    assert graph.count(line) == 1
    broken = (
        line.replace(name, "whole", 1)
        + f"\n    nothing = Sub (whole, whole)\n    {name} = Div (whole, nothing)"
    )
    return graph.replace(line, broken)


def with_graph(bundle: Bundle, role: str, text: str, **fields: object) -> Bundle:
    """The bundle with another graph for one component."""
    onnx.save(onnx.parser.parse_model(HEADER + text), bundle.path(bundle.component(role).graph))
    component = replace(bundle.component(role), **fields)  # type: ignore[arg-type]
    components = {**bundle.manifest.components, role: component}
    return Bundle(bundle.folder, replace(bundle.manifest, components=components))


def opened(bundle: Bundle, backend: str) -> Pipeline:
    sessions = {
        role: open_session(
            bundle.path(bundle.component(role).graph),
            bundle.component(role),
            backend,
            precision="fp32",
            threads=1,
        )
        for role in SPECS
    }
    return Pipeline(bundle, sessions, backend=backend)


@pytest.fixture
def honest(bundle: Bundle) -> Bundle:
    """The tiny bundle with a decoder that says whether its values are finite."""
    image = SPECS["vae_decoder"][2]
    return with_graph(
        bundle, "vae_decoder", HONEST, outputs=(*image, TensorSpec("finite", "float32", ("B",)))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("role", "graph", "line"),
    [
        ("text_encoder", TEXT_ENCODER, "    phase = Mul (column, weights)"),
        ("denoiser", DENOISER, "    outputs = Tanh (summed)"),
        ("vae_decoder", HONEST, "    halved = Mul (large, half)"),
    ],
)
def test_the_graph_is_named(honest: Bundle, backend: str, role: str, graph: str, line: str) -> None:
    with opened(honest, backend) as pipeline:
        assert len(pipeline.generate(PROMPT, seed=1, num_images=2).images) == 2
    with (
        opened(with_graph(honest, role, spoiled(graph, line)), backend) as pipeline,
        pytest.raises(
            BackendError, match=f"the {role} made values that are infinite or not-a-number, in fp32"
        ),
    ):
        pipeline.generate(PROMPT, seed=1)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_is_enough(honest: Bundle, backend: str, value: float) -> None:
    """Of a whole picture, and only for the one of a batch that has it."""
    component = honest.component("vae_decoder")
    session = open_session(honest.path(component.graph), component, backend, precision="fp32", threads=1)
    made = session.memory.allocate(
        {
            "sample": ((2, 4, 64, 64), "float32"),
            "image": ((2, 512, 512, 3), "uint8"),
            "finite": ((2,), "float32"),
        }
    )
    binding = session.bind(made.tensors)
    made.tensors["sample"].array[...] = 3.0
    binding.run()
    assert made.tensors["finite"].array.tolist() == [1, 1]
    made.tensors["sample"].array[1, 2, 63, 0] = value
    binding.run()
    assert made.tensors["finite"].array.tolist() == [1, 0]


def test_a_decoder_that_does_not_say(bundle: Bundle) -> None:
    """Bundles of older versions paint as before."""
    with opened(bundle, "ort") as pipeline:
        assert pipeline.generate(PROMPT, seed=1).images[0].size == (32, 64)


@pytest.fixture
def strange(bundle: Bundle) -> Iterator[Pipeline]:
    """A pipeline whose image encoder makes a deviation that is not finite."""
    latents = ("B", 4, "H", "W")
    specs = (
        (TensorSpec("image", "float32", ("B", 3, "8*H", "8*W")),),
        (TensorSpec("mean", "float32", latents), TensorSpec("deviation", "float32", latents)),
    )

    def encode(role: str) -> Session:
        assert role == "vae_encoder"
        zeros, endless = np.zeros((1, 4, 8, 4), np.float32), np.full((1, 4, 8, 4), np.inf, np.float32)
        return NumpySession(*specs, lambda _: {"mean": zeros, "deviation": endless})

    sessions = {
        role: open_session(bundle.path(component.graph), component, "ort", threads=1)
        for role, component in bundle.manifest.components.items()
    }
    with Pipeline(bundle, sessions, backend="ort", opens=encode) as pipeline:
        yield pipeline


def test_an_image_encoder(strange: Pipeline) -> None:
    with pytest.raises(
        BackendError, match="the vae_encoder made values that are infinite or not-a-number, in fp32"
    ):
        strange.generate(PROMPT, image=Image.new("RGB", (32, 64)))


@pytest.mark.parametrize(
    ("component", "precision", "remedy"),
    [
        ("vae_decoder", "fp16", "open the bundle in bf16 or fp32, or export the checkpoint so$"),
        ("text_encoder", "bf16", "open the bundle in fp32, or export the checkpoint so$"),
        ("denoiser", "fp16", "in bf16 or fp32, .* so; use a lower guidance_scale or another sampler$"),
        ("denoiser", "fp32", "in fp32: use a lower guidance_scale or another sampler$"),
        ("vae_decoder", "fp32", "in fp32: the weights may be damaged: open the bundle with verify"),
    ],
)
def test_what_to_try(component: str, precision: str, remedy: str) -> None:
    with pytest.raises(BackendError, match=remedy):
        raise not_finite(component, precision)
