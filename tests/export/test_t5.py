"""T5's encoder: the numbers of transformers, outside fp16, with weights of 16 and of 8 bits."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from allaprima.bundle import BackendError, Component, ExportError, Profile, TokenizerSpec
from allaprima.engine import Options
from allaprima.engine.tensorrt import build_plan
from allaprima.export import export_checkpoint, parity
from allaprima.export.checkpoint import _export_component, _Stages
from allaprima.export.family import Family
from allaprima.export.graph import write_graph
from allaprima.export.kandinsky3 import read_family as read_kandinsky
from allaprima.export.segments import run_graph
from allaprima.export.source import Checkpoint, open_checkpoint
from allaprima.export.stable_diffusion import read_family
from allaprima.export.t5 import T5Encoder, plan_t5, position_buckets
from allaprima.export.widening import write_widened
from allaprima.runtime.backends import backends, compile_engine, open_session
from allaprima.runtime.memory import on_host

LENGTH, WIDTH, VOCABULARY = 24, 64, 100
Arrays = Mapping[str, NDArray[Any]]
AVAILABLE = {info.name: info for info in backends() if info.available}


def make_model(**fields: Any) -> T5EncoderModel:
    torch.manual_seed(5)
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, **{"feed_forward_proj": "gated-silu", **sizes, **fields})
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def make_wide_model() -> T5EncoderModel:
    """As trained ones are: what one feed-forward layer adds is beyond fp16, and the next ones take it."""
    model = make_model()
    with torch.no_grad():
        feed: Any = model.encoder.block[1].layer[-1]
        for weight, factor in ((feed.DenseReluDense.wi_1.weight, 100), (feed.DenseReluDense.wo.weight, 1000)):
            weight.mul_(factor)
    return model


def save(model: T5EncoderModel, folder: Path) -> Checkpoint:
    model.save_pretrained(folder / "text_encoder", max_shard_size="200KB")
    return Checkpoint(folder, {"_class_name": "x", "text_encoder": ["transformers", "T5EncoderModel"]})


def plan_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    tokenizer = TokenizerSpec("tokenizer/tokenizer.json", LENGTH, None, 1, 0)
    return plan_t5(checkpoint, "text_encoder", tokenizer, WIDTH, dtype)


def draw() -> Arrays:
    random = np.random.default_rng(3)
    mask = (np.arange(LENGTH) < np.array([[LENGTH], [7], [1]])).astype(np.float32)
    return {"input_ids": random.integers(0, VOCABULARY, (3, LENGTH)), "attention_mask": mask}


def wanted(model: T5EncoderModel, inputs: Arrays) -> NDArray[Any]:
    """What transformers makes of it in float32, with zeros for padding."""
    ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[:, :, None]).numpy()


def off(got: NDArray[Any], reference: NDArray[Any]) -> float:
    """The root mean square difference over the reference's root mean square."""
    return float(np.sqrt(np.square(got - reference).mean() / np.square(reference).mean()))


def run(
    graph: Path, component: Component, backend: str, inputs: Arrays, precision: str | None = None
) -> tuple[NDArray[Any], str]:
    """The states, and what they were computed in."""
    session = open_session(graph, component, backend, precision=precision, threads=1)
    try:
        states = np.empty((*inputs["input_ids"].shape, WIDTH), np.float32)
        session.bind(on_host({**{k: v.copy() for k, v in inputs.items()}, "last_hidden_state": states})).run()
        return states, session.precision
    finally:
        session.close()


@pytest.mark.parametrize("length", [1, 20, 128, 300])
def test_buckets_are_those_of_transformers(length: int) -> None:
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]
    reference = T5Attention._relative_position_bucket(offset, True, 32, 128)
    assert torch.equal(position_buckets(length, 32, 128), reference)


@pytest.mark.parametrize("kind", ["gated-silu", "gated-gelu", "relu"])
def test_as_transformers(kind: str, tmp_path: Path) -> None:
    model, inputs = make_model(feed_forward_proj=kind), draw()
    encoder = T5Encoder(model, LENGTH)
    with torch.no_grad():
        got = encoder(*(torch.from_numpy(value) for value in inputs.values())).numpy()
    np.testing.assert_allclose(got, wanted(model, inputs), atol=1e-5)
    assert not got[1, 7:].any()


@pytest.fixture(scope="module")
def wide_model() -> T5EncoderModel:
    return make_wide_model()


Encoder = tuple[Path, Component]


@pytest.fixture(scope="module")
def encoder(
    wide_model: T5EncoderModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Encoder]:
    """The graph of the wide model in bf16, with weights in bf16 or in int8."""
    checkpoint = save(wide_model, tmp_path_factory.mktemp("checkpoint"))
    made: dict[bool, Encoder] = {}

    def make(int8: bool) -> Encoder:
        if int8 not in made:
            plan = plan_of(checkpoint, torch.bfloat16)
            graph = tmp_path_factory.mktemp("graph") / "model.onnx"
            write_graph(plan, graph, int8=int8)
            write_widened(graph, graph.with_name("float32.onnx"), folded=False)
            weights = "int8" if int8 else None
            component = Component(
                "model.onnx", "bf16", plan.inputs, plan.outputs, (), True, weights, "float32.onnx"
            )
            made[int8] = graph, component
        return made[int8]

    return make


def test_plain_fp16_would_not_do(wide_model: T5EncoderModel) -> None:
    """So the tests below are about something."""
    feed: Any = make_wide_model().encoder.block[1].layer[-1].DenseReluDense
    sizes: list[float] = []
    with torch.no_grad():
        handle = feed.wo.register_forward_hook(lambda module, given, made: sizes.append(made.abs().max()))
        model = make_wide_model()
        model.encoder.block[1].layer[-1].DenseReluDense = feed
        inputs = draw()
        assert np.isfinite(wanted(model, inputs)).all()
        handle.remove()
        assert max(sizes) > 2 * 65504
        half = T5Encoder(make_wide_model().half(), LENGTH)
        made = half(*(torch.from_numpy(value) for value in inputs.values()))
    assert not torch.isfinite(made).all()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("precision", [None, "fp16", "bf16", "fp32"])
def test_wide_values_survive(
    encoder: Callable[[bool], Encoder], wide_model: T5EncoderModel, backend: str, precision: str | None
) -> None:
    """In bf16 where the backend has it and in float32 else; asked for fp16, none computes in that."""
    if precision not in (None, "fp16", *AVAILABLE[backend].precisions):
        pytest.skip(f"{backend} has no {precision} here")
    graph, component = encoder(False)
    inputs = draw()
    states, computed = run(graph, component, backend, inputs, precision)
    assert computed in (("fp32",) if backend == "ort" else ("fp32", "bf16"))
    assert not states[1, 7:].any()
    if backend == "ort":  # exactly what the rounded weights make
        rounded = make_wide_model().to(torch.bfloat16).float()
        assert off(states, wanted(rounded, inputs)) < 1e-4
    assert off(states, wanted(wide_model, inputs)) < 0.04


def test_the_weights_are_there_once(encoder: Callable[[bool], Encoder], wide_model: T5EncoderModel) -> None:
    graph, _ = encoder(False)
    names = set(load_names(graph))
    assert names == {name for name in wide_model.state_dict() if name != "shared.weight"}
    size = sum(weight.numel() for weight in wide_model.parameters())
    assert 2 * size <= graph.with_name("weights.safetensors").stat().st_size < 2.2 * size
    operators = Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)
    assert operators["Attention"] == 3
    assert "Log" not in operators
    assert "If" not in operators


def load_names(graph: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(graph.with_name("weights.safetensors"), "pt") as file:
        return list(file.keys())


def test_the_position_bias_is_a_weight(encoder: Callable[[bool], Encoder]) -> None:
    """And no constant made of it, which would hold T times T numbers for each head."""
    model = onnx.load(encoder(False)[0])
    embedded = [tensor for tensor in model.graph.initializer if tensor.dims == [4, LENGTH, LENGTH]]
    assert embedded == []
    tables = [each for each in model.graph.initializer if each.name.endswith("attention_bias.weight")]
    assert [list(table.dims) for table in tables] == [[32, 4]]


def test_int8_weights_are_half_of_bf16(encoder: Callable[[bool], Encoder]) -> None:
    graph, _ = encoder(True)
    model = onnx.load(graph, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["DequantizeLinear"] == operators["MatMul"] == 3 * 7
    narrow = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert len(narrow) == 3 * 7
    before, after = (
        encoder(int8)[0].with_name("weights.safetensors").stat().st_size for int8 in (False, True)
    )
    kept = 2 * (VOCABULARY * WIDTH)
    assert after - kept < 0.6 * (before - kept)


def test_int8_is_the_nearest_of_its_steps(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.q.weight[3] = 0  # a channel of nothing
    write_graph(plan_of(save(model, tmp_path), torch.float32), tmp_path / "model.onnx", int8=True)
    stored = load_file(tmp_path / "weights.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    weight, scale = model.state_dict()[name].numpy(), stored[name + "_scale"]
    assert stored[name].dtype == np.int8
    assert np.abs(stored[name]).max() == 127
    np.testing.assert_allclose(scale[:3], np.abs(weight[:3]).max(1) / 127, rtol=1e-6)
    assert np.abs(stored[name].T * scale[:, None] - weight).max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize("backend", AVAILABLE)
def test_int8_runs(encoder: Callable[[bool], Encoder], wide_model: T5EncoderModel, backend: str) -> None:
    graph, component = encoder(True)
    inputs = draw()
    reference = wanted(wide_model, inputs)
    states, _ = run(graph, component, backend, inputs)
    assert 1e-3 < off(states, reference) < 0.08
    # It is the quantization's error, not the backend's: what is computed from the same weights is nearer.
    exact = run_graph(graph, [dict(inputs)], widen=True)[0]["last_hidden_state"]
    assert off(states, exact) < (0.01 if backend == "ort" else 0.03)


def test_int8_stays_int8_in_onnxruntime(encoder: Callable[[bool], Encoder], tmp_path: Path) -> None:
    """Widened at load, weights would take four times the memory."""
    pytest.importorskip("onnxruntime")
    graph, component = encoder(True)
    engine = compile_engine(graph, component, tmp_path, "ort")
    size = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".onnx")
    matrices = sum(np.prod(weight.shape) for name, weight in stored(graph).items() if weight.dtype == np.int8)
    assert size < 1.3 * matrices + 4 * VOCABULARY * WIDTH
    operators = Counter(node.op_type for node in onnx.load(engine, load_external_data=False).graph.node)
    assert operators["MatMulNBits"] == 3 * 7


def test_bf16_stays_bf16_in_onnxruntime(encoder: Callable[[bool], Encoder], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph, component = encoder(False)
    compile_engine(graph, component, tmp_path, "ort")
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    source = sum(graph.with_name(name).stat().st_size for name in ("weights.safetensors", "float32.onnx"))
    assert size < 1.3 * source


def stored(graph: Path) -> dict[str, NDArray[Any]]:
    from safetensors.torch import load_file as load

    weights = load(graph.with_name("weights.safetensors"))
    return {
        name: weight.float().numpy() if weight.is_floating_point() else weight.numpy()
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("int8", [False, True])
def test_tensorrt_rtx_compiles_it(encoder: Callable[[bool], Encoder], int8: bool) -> None:
    from allaprima.runtime import flavours

    try:
        flavours.load("tensorrt-rtx")
    except BackendError as error:
        pytest.skip(str(error))
    graph, component = encoder(int8)
    profile, options = Profile({"B": (1, 1, 2)}), Options(("8.9",))
    plan = build_plan(graph, component, [profile], "tensorrt-rtx", options, None, lambda stage: None)
    assert len(plan) > 100_000


def export_text(family: Family, precision: str, folder: Path) -> Component:
    make = family.plans({"fp16": torch.float16, "fp32": torch.float32}[precision])["text_encoder"]
    return _export_component(make, "text_encoder", precision, family, folder, _Stages(None, 1))


def test_kandinsky_keeps_it_out_of_fp16(kandinsky3_checkpoint: Path, tmp_path: Path) -> None:
    family = replace(read_kandinsky(open_checkpoint(str(kandinsky3_checkpoint))), text_encoder_weights="int8")
    component = export_text(family, "fp16", tmp_path)
    assert (component.precision, component.overflows_fp16, component.weights) == ("bf16", True, "int8")
    assert component.float32_graph == "text_encoder/float32.onnx"
    assert (tmp_path / component.float32_graph).is_file()
    assert all(1e-4 < parity.relative < 0.3 for parity in component.parity)
    assert Component.from_json(component.to_json()) == component


def test_other_text_encoders_have_int8_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    family = replace(read_family(open_checkpoint(str(tiny_checkpoint))), text_encoder_weights="int8")
    component = export_text(family, "fp16", tmp_path)
    assert (component.precision, component.overflows_fp16, component.weights) == ("fp16", False, "int8")
    assert component.float32_graph == "text_encoder/float32.onnx"
    assert all(1e-4 < parity.relative < 0.3 for parity in component.parity)
    for backend in AVAILABLE:
        for precision in (None, *(component.precisions if backend == "ort" else ())):
            path = tmp_path / component.graph
            open_session(path, component, backend, precision=precision, threads=1).close()
    assert family.weights("denoiser") is None


def test_a_wrong_scale_is_found(encoder: Callable[[bool], Encoder], tmp_path: Path) -> None:
    """By the check at export: int8 has a wide tolerance, but it is one."""
    model = make_model()
    plan = plan_of(save(model, tmp_path), torch.float32)
    write_graph(plan, tmp_path / "model.onnx", int8=True)
    trials = parity.reference(plan, [{"B": 2}])
    assert parity.check("text_encoder", tmp_path / "model.onnx", "fp32", trials, "int8")[0].relative < 0.3
    spoiled = onnx.load(tmp_path / "model.onnx")
    scale = next(
        each
        for each in spoiled.graph.initializer
        if each.name.endswith("0.layer.1.DenseReluDense.wo.weight_scale")
    )
    values = onnx.numpy_helper.to_array(scale) * np.float32(4)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(spoiled, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"in int8 is off .* leave out --text-encoder-weights int8"):
        parity.check("text_encoder", tmp_path / "model.onnx", "fp32", trials, "int8")


def test_unknown_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="unknown text_encoder_weights 'int4': choose int8, or leave it out"
    ):
        export_checkpoint(str(tiny_checkpoint), tmp_path / "out", text_encoder_weights="int4")
