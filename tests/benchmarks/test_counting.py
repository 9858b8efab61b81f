"""Operations of graphs whose counts are known, and of a real one against torch's own counter."""

from pathlib import Path

import diffusers
import onnx
import onnx.parser
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from allaprima.benchmarks.checkpoints import SHAPES, UNET
from allaprima.benchmarks.counting import Count, count_graph, count_model
from allaprima.bundle import RequestError, open_bundle, resolve

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER + text)


@pytest.mark.parametrize(
    ("text", "inputs", "wanted"),
    [
        (
            "g (float[B, 3, 4] x, float[B, 4, 5] y) => (float[B, 3, 5] z) { z = MatMul (x, y) }",
            {"x": (2, 3, 4), "y": (2, 4, 5)},
            Count({"MatMul": 2 * 2 * 3 * 4 * 5}, 0, 2 * (12 + 20 + 15)),
        ),
        (
            "g (float[N, 4] x, float[N, 5] y) => (float[A, B] z) { z = Gemm <transA = 1> (x, y) }",
            {"x": (7, 4), "y": (7, 5)},
            Count({"Gemm": 2 * 4 * 7 * 5}, 0, 28 + 35 + 20),
        ),
        (
            "g (float[B, 4, H, W] x, float[6, 2, 3, 3] w) => (float[B, 6, P, Q] z) "
            "{ z = Conv <group = 2, pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) }",
            {"x": (2, 4, 8, 10), "w": (6, 2, 3, 3)},
            Count({"Conv": 2 * (2 * 6 * 4 * 5) * 2 * 9}, 0, 2 * 4 * 80 + 108 + 240),
        ),
        (
            "g (float[B, 4, H, W] x, float[4, 3, 2, 2] w) => (float[B, 3, P, Q] z) "
            "{ z = ConvTranspose <strides = [2, 2]> (x, w) }",
            {"x": (1, 4, 5, 5), "w": (4, 3, 2, 2)},
            Count({"ConvTranspose": 2 * 100 * 12}, 0, 100 + 48 + 300),
        ),
        (
            "g (float[B, 2, L, 8] q, float[B, 2, M, 8] k, float[B, 2, M, 6] v) => (float[B, 2, L, 6] z) "
            "{ z = Attention (q, k, v) }",
            {"q": (3, 2, 5, 8), "k": (3, 2, 7, 8), "v": (3, 2, 7, 6)},
            Count({"Attention": 2 * 3 * 2 * 5 * 7 * (8 + 6)}, 0, 3 * 2 * (40 + 56 + 42 + 30)),
        ),
        (
            "g (float[B, L, 16] q, float[B, M, 16] k, float[B, M, 12] v) => (float[B, L, 12] z) "
            "{ z = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }",
            {"q": (3, 5, 16), "k": (3, 7, 16), "v": (3, 7, 12)},
            Count({"Attention": 2 * 3 * 2 * 5 * 7 * (8 + 6)}, 0, 3 * (80 + 112 + 84 + 60)),
        ),
    ],
    ids=["matmul", "gemm", "conv", "conv-transpose", "attention-4d", "attention-3d"],
)
def test_known_counts(text: str, inputs: dict[str, tuple[int, ...]], wanted: Count) -> None:
    assert count_model(parse(text), inputs) == wanted


def test_weights_are_told_from_activations_even_when_transposed() -> None:
    model = parse(
        "g (float[N, 3] x) => (float[N, 2] z) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> "
        "{ t = Transpose <perm = [1, 0]> (w)  z = MatMul (x, t) }"
    )
    count = count_model(model, {"x": (4, 3)})
    assert count == Count({"MatMul": 2 * 4 * 3 * 2}, 6, 12 + 8)
    assert count.bytes("fp32") == 4 * 26
    assert count.bytes("bf16") == 2 * 26


def test_it_goes_on_after_functions_and_computed_shapes() -> None:
    """Where onnx's own inference stops: GroupNormalization, and a Reshape to a shape made of other shapes."""
    model = parse("""
        g (float[B, 4, H, W] x, float[4, 4, 1, 1] w, float[4] s, float[4] b) => (float[P, Q, R] z)
        <int64[1] rest = {-1}, int64[1] zero = {0}, int64[1] one = {1}> {
            normal = GroupNormalization <num_groups = 2> (x, s, b)
            mixed = Conv (normal, w)
            shape = Shape (mixed)
            batch = Gather (shape, zero)
            channels = Gather (shape, one)
            wanted = Concat <axis = 0> (batch, channels, rest)
            flat = Reshape (mixed, wanted)
            turned = Transpose <perm = [0, 2, 1]> (flat)
            z = MatMul (turned, flat)
        }""")
    inputs = {"x": (2, 4, 6, 5), "w": (4, 4, 1, 1), "s": (4,), "b": (4,)}
    assert count_model(model, inputs).operations == {
        "Conv": 2 * (2 * 4 * 30) * 4,
        "MatMul": 2 * 2 * 30 * 30 * 4,
    }


def test_what_cannot_be_counted_is_named() -> None:
    loop = parse("""
        g (bool c, float[N] x) => (float[N] z) {
            z = If (c) <then_branch = t () => (float[N] a) { a = Identity (x) },
                        else_branch = e () => (float[N] b) { b = Neg (x) }>
        }""")
    with pytest.raises(RequestError, match=r"If .* has a graph inside"):
        count_model(loop, {"c": (), "x": (3,)})
    unknown = parse("""
        g (float[N] x, float[2, 2] w) => (float[P, 2] z) {
            places = NonZero (x)
            kept = Cast <to = 1> (places)
            turned = Transpose <perm = [1, 0]> (kept)
            pair = Concat <axis = 1> (turned, turned)
            z = MatMul (pair, w)
        }""")
    with pytest.raises(RequestError, match="is not all numbers"):
        count_model(unknown, {"x": (3,), "w": (2, 2)})
    with pytest.raises(RequestError, match="no shape was given for the input 'w'"):
        count_model(unknown, {"x": (3,)})


def torch_counts(unet: diffusers.UNet2DConditionModel, branches: int, side: int, width: int) -> int:
    """What torch counts in one call, attention taken apart: it knows no count of the CPU's own kernel."""
    device = next(unet.parameters()).device
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(
            torch.zeros(branches, 4, side, side, device=device),
            torch.zeros(branches, device=device),
            torch.zeros(branches, 77, width, device=device),
        )
    return int(counter.get_total_flops())


def test_a_whole_denoiser_is_counted_as_torch_counts_it() -> None:
    """The exported step may compute once what the branches share, so it may need less, but not much."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(SHAPES / "unet")
    wanted = torch_counts(unet, 2, 16, unet.config.cross_attention_dim)
    bundle = open_bundle(resolve("shapes"))
    component = bundle.component("denoiser")
    extents = {"B": 1, "G": 2, "H": 16, "W": 16, "L": 77}
    shapes = {spec.name: spec.resolve(extents) for spec in component.inputs}
    found = count_graph(bundle.path(component.graph), shapes)
    assert 0.9 * wanted < found.total <= wanted * 1.001
    assert found.weights == pytest.approx(sum(each.numel() for each in unet.parameters()), rel=0.02)


def test_a_step_of_stable_diffusion_is_what_the_anchors_say() -> None:
    """Torch's counter agrees with the published 1.61 TFLOP of a step at 512 x 512 with guidance."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNET)
    assert torch_counts(unet, 2, 64, 768) == pytest.approx(1.61e12, rel=0.01)


def test_the_file_is_read_without_its_weights(tmp_path: Path) -> None:
    path = resolve("shapes") / "vae_decoder" / "model.onnx"
    alone = tmp_path / "model.onnx"
    alone.write_bytes(path.read_bytes())
    assert count_graph(alone, {"sample": (1, 4, 8, 8)}).total > 10**8
