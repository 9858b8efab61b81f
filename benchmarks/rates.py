"""What the machine can do, measured beside what it did: products of matrices, and moving of memory.

The products run through the same backend in the same precision as the model, so the rate is what that library
reaches on this machine when nothing else is asked of it; not what the processor's makers promise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from allaprima.benchmarks.clock import EngineClock
from allaprima.benchmarks.ours import ON_CPU
from allaprima.bundle import Component, RequestError, TensorSpec
from allaprima.runtime.flavours import FLAVOURS
from allaprima.runtime.memory import Tensor

SIDE, LAYERS = {False: 2048, True: 8192}, 4
"""Rows of the square matrices, on a CPU and on a GPU, and how many are multiplied one after the other."""
MOVED = 1 << 28
"""Bytes that are copied at once: more than the caches hold."""
SECONDS = 0.5
"""How long each rate is measured, at least."""


@dataclass(frozen=True)
class Rates:
    """Operations and bytes in a second; how both were measured, in words."""

    operations: float
    bandwidth: float
    how: str


def measure_rates(backend: str, precision: str, threads: int) -> Rates:
    """The rates of a backend in a precision. To be called in a new process.

    Raises BackendError; RequestError where the backend runs only engines that were built before.
    """
    if backend in FLAVOURS:
        raise RequestError(f"{backend} runs only engines: measure it beside the backend ort-cuda")
    gpu = backend not in ON_CPU
    side = SIDE[gpu]
    with tempfile.TemporaryDirectory() as folder:
        operations = _products(Path(folder), backend, precision, threads, side)
    bandwidth = _device_copies() if gpu else _copies(threads)
    how = (
        f"{LAYERS} products of {side} x {side} matrices by {backend} in {precision}; "
        f"copies of {MOVED >> 20} MiB {'on the device' if gpu else f'by {threads} threads'}, read and written"
    )
    return Rates(operations, bandwidth, how)


def _products(folder: Path, backend: str, precision: str, threads: int, side: int) -> float:
    from allaprima.runtime.backends import open_session

    # OpenVINO computes what is stored in fp16 in any precision; the others in the one it is stored in.
    graph, component = folder / "model.onnx", _component("fp16" if backend == "openvino" else precision)
    write_products(graph, component.precision, side)
    session = open_session(
        graph, component, backend, precision=precision, threads=threads if backend in ON_CPU else None
    )
    clock = EngineClock()
    watched = clock.watch("product", session)
    layout = dict.fromkeys(("x", "y"), ((side, side), np.float32))
    block = watched.memory.allocate(layout)
    block.tensors["x"].array[...] = np.random.default_rng(0).standard_normal((side, side), np.float32)
    block.push()
    binding = watched.bind(block.tensors)
    binding.run()
    clock.take()

    def multiply() -> float:
        binding.run()
        return clock.take()["product"].seconds

    return 2 * LAYERS * side**3 / _best(multiply)


def _component(precision: str) -> Component:
    spec = {name: TensorSpec(name, "float32", ("N", "N")) for name in ("x", "y")}
    return Component("model.onnx", precision, (spec["x"],), (spec["y"],), ())


def write_products(path: Path, precision: str, side: int) -> None:
    """A graph of `LAYERS` products y = x W W W W in a precision, as the layers of a model are: W is constant.

    Raises RequestError for another precision than fp32, fp16 and bf16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    if precision not in kinds:
        raise RequestError(f"unknown precision '{precision}': choose from {', '.join(kinds)}")
    kind = kinds[precision]
    # Orthogonal on average, so that the products neither grow nor vanish.
    weight = np.random.default_rng(1).standard_normal((side, side), np.float32) / np.sqrt(
        side, dtype=np.float32
    )
    named = numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(kind)), "W")
    nodes = [helper.make_node("Cast", ["x"], ["h0"], to=kind)]
    nodes += [helper.make_node("MatMul", [f"h{i}", "W"], [f"h{i + 1}"]) for i in range(LAYERS)]
    nodes.append(helper.make_node("Cast", [f"h{LAYERS}"], ["y"], to=TensorProto.FLOAT))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "N"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], [named])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)


def _copies(threads: int) -> float:
    """Bytes a second, read and written, of all threads copying at once."""
    size = MOVED // threads
    source = [np.ones(size, np.uint8) for _ in range(threads)]
    target = [np.ones(size, np.uint8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> float:
            started = perf_counter()
            list(pool.map(np.copyto, target, source))  # which lets go of the interpreter's lock
            return perf_counter() - started

        return 2 * size * threads / _best(copy)


def _device_copies() -> float:
    from allaprima.runtime.cuda import CudaMemory, default_gpu

    gpu = default_gpu()
    memory = CudaMemory(gpu)
    block = memory.allocate(dict.fromkeys(("source", "target"), ((MOVED,), np.uint8)))

    def copy(source: Tensor, target: Tensor) -> float:
        begin = gpu.mark()
        memory.copy(target, source)
        end = gpu.mark()
        gpu.synchronize()
        return gpu.seconds(begin, end)

    return 2 * MOVED / _best(partial(copy, block.tensors["source"], block.tensors["target"]))


def _best(measure: Callable[[], float]) -> float:
    """The smallest of what is measured for `SECONDS`, five times at least: a limit, so the best counts."""
    measure()
    started, found = perf_counter(), [measure() for _ in range(5)]
    while perf_counter() - started < SECONDS:
        found.append(measure())
    return min(found)
