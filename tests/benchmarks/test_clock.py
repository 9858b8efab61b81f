"""Time of engines told apart from the rest, on the host and on a stream that is made up."""

import numpy as np
import pytest

from allaprima.benchmarks.clock import TRANSFER, EngineClock, Share, TimedMemory
from allaprima.bundle import TensorSpec
from allaprima.runtime import Pipeline
from allaprima.runtime.memory import HOST, Memory, on_host
from allaprima.runtime.session import Session
from allaprima.runtime.sessions.fake import NumpySession


def make_session() -> NumpySession:
    spec = {name: TensorSpec(name, "float32", ("N",)) for name in ("x", "y")}
    return NumpySession((spec["x"],), (spec["y"],), lambda given: {"y": given["x"] * 2})


def test_runs_are_counted_until_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("allaprima.benchmarks.clock.perf_counter", lambda: float(next(ticks)) ** 2)
    clock = EngineClock()
    session = clock.watch("denoiser", make_session())
    arrays = {name: np.ones(3, np.float32) for name in ("x", "y")}
    binding = session.bind(on_host(arrays))
    binding.run()
    binding.run()
    assert arrays["y"].tolist() == [2, 2, 2]
    assert clock.take() == {"denoiser": Share((1 - 0) + (9 - 4), 2)}
    assert clock.take() == {}
    assert not clock.on_device


def test_a_watched_session_is_the_same_otherwise() -> None:
    inner = make_session()
    session = EngineClock().watch("denoiser", inner)
    assert (session.inputs, session.outputs, session.precision) == (inner.inputs, inner.outputs, "fp32")
    assert session.memory is HOST
    session.unload()
    session.close()
    with pytest.raises(Exception, match="closed"):
        inner.bind({})


class Stream:
    """Marks are places in a queue, a millisecond apart; they can be read once it was waited for."""

    def __init__(self) -> None:
        self.marks, self.reached = 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def seconds(self, begin: int, end: int) -> float:
        assert end <= self.reached, "read before it was reached"
        return (end - begin) / 1000

    def synchronize(self) -> None:
        self.reached = self.marks


class DeviceMemory:
    """The host's, but not by that name."""

    allocate, copy, attach = HOST.allocate, HOST.copy, HOST.attach


def test_on_a_device_marks_are_read_when_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allaprima.benchmarks.clock.CudaMemory", DeviceMemory)
    stream = Stream()
    clock = EngineClock(lambda: stream)
    inner = make_session()
    memory: Memory = DeviceMemory()
    inner.memory = memory
    session: Session = clock.watch("denoiser", inner)
    assert isinstance(session.memory, TimedMemory)
    block = session.memory.allocate(dict.fromkeys(("x", "y"), ((3,), np.float32)))
    binding = session.bind(block.tensors)
    block.push()
    binding.run()
    session.memory.copy(block.tensors["x"], block.tensors["y"])
    block.pull()
    assert stream.reached == 0
    found = clock.take()
    assert found == {TRANSFER: Share(pytest.approx(0.003), 3), "denoiser": Share(pytest.approx(0.001), 1)}
    assert clock.on_device


def test_watching_changes_no_picture() -> None:
    clock = EngineClock()
    pictures = []
    for watch in (None, clock.watch):
        with Pipeline.open("shapes", backend="ort", threads=1, watch=watch) as pipeline:
            result = pipeline.generate("a red circle", num_inference_steps=2, seed=3, height=64, width=64)
        pictures.append(result.images[0].tobytes())
    assert pictures[0] == pictures[1]
    found = clock.take()
    assert {role: share.calls for role, share in found.items()} == {
        "text_encoder": 1,
        "denoiser": 2,
        "vae_decoder": 1,
    }
    assert sum(share.seconds for share in found.values()) < result.timings["total"]
