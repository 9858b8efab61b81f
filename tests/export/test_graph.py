"""The exported files: names, operators, precision, shapes, and the gate that compares them with torch."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

from allaprima.bundle import Bundle, Component, ExportError, TensorSpec
from allaprima.export import parity
from allaprima.export.graph import GraphPlan, write_graph
from allaprima.export.parity import Trial
from allaprima.export.source import open_checkpoint
from allaprima.export.stable_diffusion import read_family
from allaprima.export.weights import StoredTensor, open_weights
from allaprima.runtime.backends import backends, open_session
from allaprima.runtime.memory import on_host

COMPONENTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
# The part of the checkpoint, the name of its module in the graph's, and the weights that the graph uses.
WEIGHTS = {
    "text_encoder": ("text_encoder", "model.", ("",)),
    "denoiser": ("unet", "unet.", ("",)),
    "vae_decoder": ("vae", "vae.", ("decoder.", "post_quant_conv.")),
    "vae_encoder": ("vae", "vae.", ("encoder.", "quant_conv.")),
}
# No extent is that of the trace or of the check at export; the last has three branches.
EXTENTS = (
    {"B": 1, "G": 1, "H": 2, "W": 2, "L": 77},
    {"B": 4, "G": 2, "H": 6, "W": 4, "L": 30},
    {"B": 2, "G": 3, "H": 4, "W": 18, "L": 308},
)
Arrays = dict[str, NDArray[Any]]
AVAILABLE = {info.name: info for info in backends() if info.available}


@pytest.fixture(scope="module")
def trials(tiny_checkpoint: Path) -> Mapping[str, list[Trial]]:
    """Random inputs of each component and what torch makes of them."""
    plans = read_family(open_checkpoint(str(tiny_checkpoint))).plans(torch.float32)
    return {name: parity.reference(make(), EXTENTS, seed=5) for name, make in plans.items()}


def run(
    bundle: Bundle, name: str, inputs: Mapping[str, NDArray[Any]], backend: str, precision: str | None = None
) -> Arrays:
    component = bundle.component(name)
    graph = bundle.path(component.graph)
    session = open_session(graph, component, backend, precision=precision, threads=1)
    try:
        buffers = {key: np.array(value) for key, value in inputs.items()}
        outputs = {
            spec.name: np.empty(spec.resolve(extents_of(component, inputs)), spec.dtype)
            for spec in component.outputs
        }
        session.bind(on_host({**buffers, **outputs})).run()
        return outputs
    finally:
        session.close()


def extents_of(component: Component, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The value of every symbol: those that stand alone on an axis, and those multiplied with a number."""
    found: dict[str, int] = {}
    for spec in component.inputs:
        for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True):
            if isinstance(axis, str):
                number, _, symbol = axis.rpartition("*")
                if not number or number.isdigit():
                    found[symbol] = size // int(number or 1)
    return found


def load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.path(bundle.component(name).graph))


def relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    difference = np.abs(got.astype(np.float64) - wanted)
    return float(difference.max() / max(1e-12, wanted.astype(np.float64).std()))  # `finite` has none


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_weight_is_there_under_its_name(tiny_bundle: Bundle, tiny_checkpoint: Path, name: str) -> None:
    """With its own values in its own layout, so that it can be swapped for another."""
    part, prefix, used = WEIGHTS[name]
    (file,) = (tiny_checkpoint / part).glob("*.safetensors")
    found = {tensor.name: tensor for tensor in load(tiny_bundle, name).graph.initializer}
    weights = {key: value for key, value in load_file(file).items() if key.startswith(used)}
    assert len(weights) > 20
    for key, value in weights.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(found[prefix + key]), value, err_msg=key)


@pytest.mark.parametrize("name", COMPONENTS)
def test_only_standard_operators(tiny_bundle: Bundle, name: str) -> None:
    model = load(tiny_bundle, name)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not any(attribute.g.node for node in model.graph.node for attribute in node.attribute)


def test_attention_and_norms_are_whole(tiny_bundle: Bundle) -> None:
    operators = [node.op_type for node in load(tiny_bundle, "denoiser").graph.node]
    assert operators.count("Attention") == 8
    assert "Softmax" not in operators
    assert operators.count("GroupNormalization") > 10
    assert "InstanceNormalization" not in operators


@pytest.mark.parametrize("name", COMPONENTS)
def test_nothing_of_this_machine_is_in_the_files(
    tiny_bundle: Bundle, tiny_checkpoint: Path, name: str
) -> None:
    model = onnx.load(tiny_bundle.path(tiny_bundle.component(name).graph), load_external_data=False)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]
    for owner in (model, model.graph, *model.graph.node, *values):
        assert not owner.metadata_props
        assert not owner.doc_string
    data = tiny_bundle.path(tiny_bundle.component(name).graph).read_bytes()
    here = [Path(torch.__file__).parents[1], Path(__file__).parents[2], tiny_checkpoint, Path.home()]
    for trace in ("site-packages", "stack_trace", *map(str, here)):
        assert trace == "/" or trace.encode() not in data
    (entry,) = {entry.value for one in model.graph.initializer for entry in one.external_data[:1]}
    assert entry == "weights.safetensors"


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("name", COMPONENTS)
def test_other_shapes(
    tiny_bundle: Bundle, trials: Mapping[str, list[Trial]], name: str, backend: str
) -> None:
    for trial in trials[name]:
        outputs = run(tiny_bundle, name, trial.inputs, backend, "fp32")
        for key, wanted in trial.outputs.items():
            got = outputs[key]
            assert got.dtype == wanted.dtype
            if got.dtype == np.uint8:
                assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1
            else:
                assert relative(got, wanted) < 1e-3, f"{key} at {trial.extents}"


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_smallest_size_first(
    tiny_bundle: Bundle, trials: Mapping[str, list[Trial]], backend: str
) -> None:
    """One session for all: nothing of a picture with a single token at the deepest level stays behind."""
    component = tiny_bundle.component("denoiser")
    graph = tiny_bundle.path(component.graph)
    session = open_session(graph, component, backend, precision="fp32", threads=1)
    for trial in trials["denoiser"]:
        outputs = {spec.name: np.empty(spec.resolve(trial.extents), spec.dtype) for spec in component.outputs}
        session.bind(
            on_host({**{key: np.array(value) for key, value in trial.inputs.items()}, **outputs})
        ).run()
        for key, wanted in trial.outputs.items():
            assert relative(outputs[key], wanted) < 1e-3, f"{key} at {trial.extents}"
    session.close()


def lane(component: Component, inputs: Mapping[str, NDArray[Any]], index: int) -> Arrays:
    """One sample's share of the inputs of a batch."""
    taken = {}
    for spec in component.inputs:
        value = inputs[spec.name]
        if "G*B" in spec.shape:
            batch = extents_of(component, inputs)["B"]
            taken[spec.name] = value[index::batch]
        else:
            axis = spec.shape.index("B")
            taken[spec.name] = np.take(value, [index], axis)
    return {key: np.ascontiguousarray(value) for key, value in taken.items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_sample_is_the_same_in_any_company(
    tiny_bundle: Bundle, trials: Mapping[str, list[Trial]], name: str
) -> None:
    component = tiny_bundle.component(name)
    batch = trials[name][1].inputs
    together = run(tiny_bundle, name, batch, "ort")
    for index in range(4):
        alone = run(tiny_bundle, name, lane(component, batch, index), "ort")
        for spec in component.outputs:
            mine = np.take(together[spec.name], [index], spec.shape.index("B"))
            np.testing.assert_array_equal(alone[spec.name], mine, err_msg=spec.name)


def test_an_idle_lane_stands_still(tiny_bundle: Bundle, trials: Mapping[str, list[Trial]]) -> None:
    """u0 = 1 and the rest 0: the sample passes through, whatever the network says."""
    inputs = {key: np.array(value) for key, value in trials["denoiser"][0].inputs.items()}
    inputs["update"][:] = np.eye(1, inputs["update"].shape[1], dtype=np.float32)
    outputs = run(tiny_bundle, "denoiser", inputs, "ort")
    np.testing.assert_array_equal(outputs["next_sample"], inputs["sample"])
    np.testing.assert_array_equal(outputs["next_history"][1:], inputs["history"][:-1])


def test_bounds_clamp_the_prediction(tiny_bundle: Bundle, trials: Mapping[str, list[Trial]]) -> None:
    inputs = {key: np.array(value) for key, value in trials["denoiser"][0].inputs.items()}
    free, held = (
        run(tiny_bundle, "denoiser", {**inputs, "bounds": np.full(1, limit, np.float32)}, "ort")[
            "next_history"
        ][0]
        for limit in (3e38, 0.25)
    )
    assert np.abs(free).max() > 0.5
    np.testing.assert_array_equal(held, np.clip(free, -0.25, 0.25))


def spoil(folder: Path, prefix: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Change one weight of a graph, the middle one of its matrices and kernels."""
    model = onnx.load(folder / "model.onnx")
    chosen = [one for one in model.graph.initializer if one.name.startswith(prefix) and len(one.dims) > 1]
    tensor = chosen[len(chosen) // 2]
    tensor.CopyFrom(
        onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), tensor.name)
    )
    onnx.save(model, folder / "model.onnx")


def nothing(weight: NDArray[Any]) -> NDArray[Any]:
    return weight


def turn(weight: NDArray[Any]) -> NDArray[Any]:
    return weight[::-1].copy()


def poison(weight: NDArray[Any]) -> NDArray[Any]:
    weight.reshape(-1)[0] = math.nan
    return weight


@pytest.mark.parametrize("change", [turn, poison])
@pytest.mark.parametrize("name", COMPONENTS)
def test_the_gate_sees_a_changed_weight(
    tiny_bundle: Bundle,
    trials: Mapping[str, list[Trial]],
    tmp_path: Path,
    name: str,
    change: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    folder = tmp_path / name
    shutil.copytree(tiny_bundle.path(name), folder)
    spoil(folder, WEIGHTS[name][1], nothing)
    assert len(parity.check(name, folder / "model.onnx", "fp32", trials[name])) == 3
    spoil(folder, WEIGHTS[name][1], change)
    with pytest.raises(ExportError, match=rf"^{name} in fp32 is off by .* the limit is .* --precision fp32"):
        parity.check(name, folder / "model.onnx", "fp32", trials[name])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_gate_refuses_what_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"model\.onnx is not an ONNX file"):
        parity.check("denoiser", tmp_path / "model.onnx", "fp32", [])


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_half_bundle", "tiny_bf16_bundle"])
def test_the_manifest_tells_of_the_check(request: pytest.FixtureRequest, kind: str) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    precision = bundle.manifest.precision
    assert tuple(bundle.manifest.components) == COMPONENTS
    for name, component in bundle.manifest.components.items():
        assert component.precision == precision
        assert len({tuple(one.shapes.items()) for one in component.parity}) == 2
        for one in component.parity:
            assert set(one.shapes) == {spec.name for spec in component.inputs}
            limit = parity.LEVELS[precision] if name == "vae_decoder" else math.inf
            assert 0 <= one.max_abs <= limit
            assert name == "vae_decoder" or one.relative <= parity.TOLERANCE[precision]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("tiny_half_bundle", onnx.TensorProto.FLOAT16),
        ("tiny_bf16_bundle", onnx.TensorProto.BFLOAT16),
    ],
)
@pytest.mark.parametrize("name", COMPONENTS)
def test_narrow_weights(
    request: pytest.FixtureRequest,
    tiny_bundle: Bundle,
    tiny_checkpoint: Path,
    kind: str,
    dtype: int,
    name: str,
) -> None:
    """Weights are narrow, under the same names; the graph's edges are not."""
    bundle: Bundle = request.getfixturevalue(kind)
    model = load(bundle, name)
    prefix = WEIGHTS[name][1]
    weights = {one.name: one for one in model.graph.initializer if one.name.startswith(prefix)}
    wide = {one.name for one in load(tiny_bundle, name).graph.initializer if one.name.startswith(prefix)}
    floats = {key for key, one in weights.items() if one.data_type != onnx.TensorProto.INT64}
    assert weights.keys() == wide
    assert {weights[key].data_type for key in floats} == {dtype}
    edges = {one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)}
    assert dtype not in edges
    assert bundle.component(name).inputs == tiny_bundle.component(name).inputs
    assert bundle.component(name).outputs == tiny_bundle.component(name).outputs
    data = [one.path(f"{name}/weights.safetensors").stat().st_size for one in (bundle, tiny_bundle)]
    assert data[0] < 0.6 * data[1]


@pytest.mark.parametrize("name", COMPONENTS)
def test_half_precision_runs(tiny_half_bundle: Bundle, trials: Mapping[str, list[Trial]], name: str) -> None:
    for backend in AVAILABLE:
        precision = "fp32" if AVAILABLE[backend].converts else "fp16"
        for trial in trials[name][:2]:
            outputs = run(tiny_half_bundle, name, trial.inputs, backend, precision)
            for key, wanted in trial.outputs.items():
                assert relative(outputs[key], wanted) < 0.05, f"{backend}: {key}"


@pytest.mark.parametrize("name", COMPONENTS)
def test_bf16_runs(tiny_bf16_bundle: Bundle, trials: Mapping[str, list[Trial]], name: str) -> None:
    for backend, info in AVAILABLE.items():
        for precision in {"fp32", "bf16"} & set(info.precisions):
            outputs = run(tiny_bf16_bundle, name, trials[name][1].inputs, backend, precision)
            for key, wanted in trials[name][1].outputs.items():
                assert relative(outputs[key], wanted) < 0.3, f"{backend} in {precision}: {key}"


class Twins(torch.nn.Module):
    """Two layers with equal weights, which an optimizer would merge, and one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def plan_of(module: torch.nn.Module, **changes: Any) -> GraphPlan:
    spec = TensorSpec("x", "float32", ("B", 3, 4))
    facts: dict[str, Any] = {
        "name": "twins",
        "module": module,
        "example": {"x": torch.randn(2, 3, 4)},
        "axes": {"x": {0: "B"}},
        "inputs": (spec,),
        "outputs": (TensorSpec("y", "float32", spec.shape),),
    }
    return GraphPlan(**{**facts, **changes})


def test_equal_weights_are_not_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = Twins()
    plan = plan_of(module)
    write_graph(plan, tmp_path / "deep" / "model.onnx")
    model = onnx.load(tmp_path / "deep" / "model.onnx")
    assert module.state_dict().keys() <= {one.name for one in model.graph.initializer}
    trials = parity.reference(plan, [{"B": 1}, {"B": 5}])
    (small, large) = parity.check("twins", tmp_path / "deep" / "model.onnx", "fp32", trials)
    assert (small.shapes, large.shapes) == ({"x": (1, 3, 4)}, {"x": (5, 3, 4)})
    assert capfd.readouterr() == ("", "")


class Tied(torch.nn.Module):
    """Layers that share a weight on disk, one of another dtype, and one that was computed."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in "abcd"})
        for name, weight in {"a": weights["w"], "c": weights["v"].float(), "d": weights["w"] + 1}.items():
            self.layers[name].weight = torch.nn.Parameter(weight, requires_grad=False)
        self.layers["b"].weight = self.layers["a"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_weights_on_disk(tmp_path: Path) -> None:
    """Written once where they are shared, next to those of memory; the module has them again."""
    values = {"w": torch.randn(4, 4), "v": torch.randn(4, 4).half()}
    save_file(values, tmp_path / "given.safetensors")
    module = Tied(open_weights([tmp_path / "given.safetensors"]))
    kinds = {name: type(weight) for name, weight in module.named_parameters()}
    assert list(kinds.values()).count(StoredTensor) == 2
    write_graph(plan_of(module), tmp_path / "model.onnx")
    assert {name: type(weight) for name, weight in module.named_parameters()} == kinds
    written = load_file(tmp_path / "weights.safetensors")
    assert written.keys() == {"b.weight", "c.weight", "d.weight"}
    np.testing.assert_array_equal(written["b.weight"], values["w"].numpy())
    np.testing.assert_array_equal(written["c.weight"], values["v"].float().numpy())
    write_graph(plan_of(Tied(values)), tmp_path / "memory" / "model.onnx")
    for file in ("model.onnx", "weights.safetensors"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / file).read_bytes()
    trials = parity.reference(plan_of(module), [{"B": 2}])
    x = torch.from_numpy(np.array(trials[0].inputs["x"]))
    wanted = x @ values["w"].mT @ values["w"].mT @ values["v"].float().mT @ (values["w"] + 1).mT
    assert relative(trials[0].outputs["y"], wanted.numpy()) < 1e-5
    assert parity.check("tied", tmp_path / "model.onnx", "fp32", trials)[0].relative < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_is_wide(tmp_path: Path, dtype: torch.dtype) -> None:
    """With rounded weights, and nothing else rounded, whatever the module asks for."""

    class Narrow(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.layer = torch.nn.Conv1d(3, 3, 1)
            self.layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.layer.bias = torch.nn.Parameter(weight[:, 0, 0], requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ones = torch.ones(1, dtype=self.layer.weight.dtype)
            return (self.layer(x.to(self.layer.weight.dtype)) * ones).to(dtype).float()

    weight = torch.randn(3, 3, 1)
    save_file({"w": weight}, tmp_path / "given.safetensors")
    module = Narrow(open_weights([tmp_path / "given.safetensors"])["w"].to(dtype))
    (trial,) = parity.reference(plan_of(module), [{"B": 2}])
    x, rounded = torch.from_numpy(np.array(trial.inputs["x"])), weight.to(dtype).float()
    wanted = torch.nn.functional.conv1d(x, rounded, rounded[:, 0, 0])
    assert relative(trial.outputs["y"], wanted.numpy()) < 1e-6
    assert {one.dtype for one in module.parameters()} == {dtype}


class Untraceable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_module_that_does_not_trace(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="twins does not trace to ONNX"):
        write_graph(plan_of(Untraceable()), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_breaks_its_contract(tmp_path: Path) -> None:
    outputs = tuple(TensorSpec(name, "float32", ("B", 3, 4)) for name in ("y", "z"))
    with pytest.raises(ExportError, match="twins"):
        write_graph(plan_of(Twins(), outputs=outputs), tmp_path / "model.onnx")


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        write_graph(plan_of(Twins()), tmp_path / "file" / "model.onnx")
