"""What our code uses of TensorRT and Polygraphy exists, in the real bindings and with these names."""

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pytest

from allaprima.runtime.sessions import tensorrt_api

from .bindings import Bindings, Member, Signature, read_bindings
from .usage import examine

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "tensorrt_bindings": "tensorrt-cu13-bindings",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings and onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
BOTH = {protocol.__name__: name for protocol, name in tensorrt_api.COUNTERPARTS.items()}
RTX = {protocol.__name__: name for protocol, name in tensorrt_api.RTX_COUNTERPARTS.items()}
SOURCES = [
    path
    for layer in ("engine", "runtime")
    for path in sorted((ROOT / layer).rglob("*.py"))
    if path.name != "tensorrt_api.py"
]


def read(module: str, factory: pytest.TempPathFactory) -> Bindings:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install {PACKAGES[module]}")
    return read_bindings(module, factory.mktemp("stubs"))


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    return read("tensorrt_bindings", tmp_path_factory)


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    return read("tensorrt_rtx_bindings", tmp_path_factory)


@pytest.fixture(scope="module", params=list(PACKAGES))
def bindings(request: pytest.FixtureRequest) -> Bindings:
    found: Bindings = request.getfixturevalue(
        request.param.removesuffix("_bindings").replace("tensorrt_", "")
    )
    return found


@pytest.fixture(autouse=True)
def flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygraphy decides when it is first imported, and other tests in this process compile with RTX."""
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install polygraphy")


def test_our_code_uses_what_there_is(bindings: Bindings) -> None:
    used: set[str] = set()
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        protocols = BOTH | (RTX if "ComputeCapability" in bindings[""] else {})
        report = examine(source, bindings, protocols)
        assert report.wrong == [], path
        used |= report.used
    # If the walk lost track of these, it would check nothing.
    assert {
        "__version__",
        "MemoryPoolType.WORKSPACE",
        "INetworkDefinition.get_input",
        "INetworkDefinition.num_outputs",
        "ITensor.dtype",
        "DataType.name",
        "polygraphy.backend.trt.CreateConfig",
        "polygraphy.backend.tensorrt_rtx.CreateConfigRTX",
        "polygraphy.config.USE_TENSORRT_RTX",
    } <= used


PREAMBLE = """
from typing import Any, TypeAlias
from allaprima.runtime.flavours import load
from allaprima.runtime.sessions.tensorrt_api import Context, Engine, TensorrtModule
INetworkDefinition: TypeAlias = Any
"""


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("def f(n: INetworkDefinition):\n    return n.get_imput(0)", "INetworkDefinition.get_imput"),
        ("def f(n: INetworkDefinition):\n    return n.get_input(0).dtyp", "ITensor.dtyp"),
        ("def f(n: INetworkDefinition):\n    t = n.get_input(0)\n    return t.dtype.nam", "DataType.nam"),
        ("def f(n: INetworkDefinition):\n    return n.get_input(position=0)", "no overload"),
        ("def f(n: INetworkDefinition):\n    return n.get_input()", "no overload"),
        ("def f(n: INetworkDefinition):\n    return [n.get_inputs(i) for i in range(3)]", "get_inputs"),
        ("def f():\n    return load('tensorrt').MemoryPoolTyp.WORKSPACE", "MemoryPoolTyp"),
        (
            "def f():\n    m = load('tensorrt')\n    return m.MemoryPoolType.WORKSPAC",
            "MemoryPoolType.WORKSPAC",
        ),
        ("def f(m: TensorrtModule):\n    return m.Runtime()", "no overload"),
        ("def f(m: TensorrtModule, l):\n    return m.Runtime(l).deserialise(b'')", "Runtime.deserialise"),
        ("def f(e: Engine | None):\n    e.create_execution_context(1, 2)", "no overload"),
        ("def f(e: Engine):\n    c = e.create_execution_context(1)\n    c.execute_v3(0)", "execute_v3"),
        ("def f(c: Context):\n    c.set_input_shape(name='x', shap=(1,))", "no overload"),
        ("def f(c: Context):\n    if c.execute_async_v3(strem=1):\n        pass", "no overload"),
        (
            "class S:\n    def f(self):\n        self.c.infer_shape()\n"
            "    def __init__(self, c: Context):\n        self.c = c",
            "infer_shape",
        ),
        ("Nothing: TypeAlias = Any", "no class Nothing"),
        ("def f():\n    from polygraphy.backend import trt\n    trt.CreateConfi()", "CreateConfi"),
        ("def f():\n    from polygraphy.backend import trt\n    trt.CreateConfig(profile=1)", "profile"),
        (
            "def f():\n    from polygraphy.backend import trt\n    d = {'pro': 1}\n    trt.CreateConfig(**d)",
            "pro",
        ),
        (
            "def f():\n    from polygraphy.backend import tensorrt_rtx as r\n    r.CreateConfigRTX(levels=1)",
            "levels",
        ),
        (
            "def f():\n    from polygraphy.backend import trt\n    p = trt.Profile()\n    p.ad('x')",
            "Profile.ad",
        ),
        ("def f():\n    from polygraphy.backend import trtx", "polygraphy.backend.trtx"),
    ],
)
def test_a_planted_mistake_is_found(tensorrt: Bindings, source: str, wrong: str) -> None:
    report = examine(PREAMBLE + source, tensorrt, BOTH)
    assert len(report.wrong) == 1, report.wrong
    assert wrong in report.wrong[0]


def test_what_is_right_is_let_pass(tensorrt: Bindings) -> None:
    source = """
def f(e: Engine, m: TensorrtModule, log):
    c = e.create_execution_context(m.ExecutionContextAllocationStrategy.USER_MANAGED)
    c.set_input_shape(name="x", shape=(1,))
    c.set_device_memory(0, size=3)
    engine = m.Runtime(log).deserialize_cuda_engine(b"")
    return engine.num_io_tensors, m.ILogger.Severity.ERROR
"""
    report = examine(PREAMBLE + source, tensorrt, BOTH)
    assert report.wrong == []
    assert {
        "ICudaEngine.num_io_tensors",
        "ILogger.Severity",
        "Runtime.deserialize_cuda_engine",
    } <= report.used


def mismatches(protocol: type[Any], members: dict[str, Member] | Any) -> list[str]:
    """In what a protocol differs from the class that it describes."""
    wrong = []
    for one in protocol.__mro__:
        if one is object or one is Protocol or not getattr(one, "_is_protocol", False):
            continue
        for name in {*vars(one), *inspect.get_annotations(one)}:
            if name.startswith("_") and name != "__version__":
                continue
            ours, theirs = vars(one).get(name), members.get(name)
            if theirs is None:
                wrong.append(f"{protocol.__name__}.{name} does not exist")
            elif inspect.isfunction(ours):
                wrong += _mismatch(f"{protocol.__name__}.{name}", ours, theirs)
            elif theirs.kind == "method":
                wrong.append(f"{protocol.__name__}.{name} is a method")
    return wrong


def _mismatch(name: str, ours: Any, theirs: Member) -> list[str]:
    if theirs.kind != "method":
        return [f"{name} is no method"]
    parameters = list(inspect.signature(ours).parameters.values())[1:]
    if any(_fits(parameters, one) for one in theirs.signatures):
        return []
    return [f"{name}: {[str(one) for one in parameters]} fits none of {theirs.signatures}"]


def _fits(parameters: list[inspect.Parameter], signature: Signature) -> bool:
    if not signature.required <= len(parameters) <= len(signature.names):
        return False
    return all(
        one.kind is inspect.Parameter.POSITIONAL_ONLY or one.name == name
        for one, name in zip(parameters, signature.names, strict=False)
    )


@pytest.mark.parametrize("protocol", tensorrt_api.COUNTERPARTS, ids=lambda protocol: protocol.__name__)
def test_protocols_describe_both(bindings: Bindings, protocol: type[Any]) -> None:
    assert mismatches(protocol, bindings[tensorrt_api.COUNTERPARTS[protocol]]) == []


@pytest.mark.parametrize("protocol", tensorrt_api.RTX_COUNTERPARTS, ids=lambda protocol: protocol.__name__)
def test_protocols_describe_rtx(rtx: Bindings, protocol: type[Any]) -> None:
    assert mismatches(protocol, rtx[tensorrt_api.RTX_COUNTERPARTS[protocol]]) == []


def test_every_protocol_is_compared() -> None:
    found = {value for value in vars(tensorrt_api).values() if getattr(value, "_is_protocol", False)} - {
        Protocol
    }
    assert found == {*tensorrt_api.COUNTERPARTS, *tensorrt_api.RTX_COUNTERPARTS}


def test_only_rtx_has_what_is_said_to_be_only_there(tensorrt: Bindings, rtx: Bindings) -> None:
    for name in ("get_engine_validity", "engine_header_size"):
        assert name in rtx["Runtime"]
        assert name not in tensorrt["Runtime"]


class Wrong(Protocol):
    """A context that is none."""

    def execute_async_v4(self, stream_handle: int) -> bool: ...
    def execute_async_v3(self, stream: int) -> bool: ...
    def infer_shapes(self, twice: bool) -> list[str]: ...
    @property
    def set_tensor_address(self) -> int: ...
    def name(self) -> str: ...


def test_a_wrong_protocol_is_found(tensorrt: Bindings) -> None:
    found = sorted(mismatches(Wrong, tensorrt["IExecutionContext"]))
    assert len(found) == 5, found
    assert found[0].startswith("Wrong.execute_async_v3: ['stream: int'] fits none of")
    assert found[1] == "Wrong.execute_async_v4 does not exist"
