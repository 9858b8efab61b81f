"""Device memory as the driver tells it, by a driver that is made up."""

import ctypes
import threading
from collections.abc import Iterator

import pytest

from allaprima.benchmarks import nvml
from allaprima.benchmarks.nvml import PeakDevice, used_memory


class Driver:
    """Two devices; `fails` names a call that does."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def nvmlDeviceGetCount_v2(self, count: ctypes._Pointer) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 2
        return int(self.fails == "count")

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: ctypes._Pointer) -> int:  # noqa: N802
        ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
        return int(self.fails == "handle")

    def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, memory: ctypes._Pointer) -> int:  # noqa: N802
        assert device.value is not None
        fields = ctypes.cast(memory, ctypes.POINTER(ctypes.c_ulonglong))
        fields[0], fields[1], fields[2] = 100, 100 - 10 * device.value, 10 * device.value
        return int(self.fails == "memory")


def test_all_devices_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_open", Driver)
    assert used_memory() == 10 + 20


@pytest.mark.parametrize("fails", ["count", "handle", "memory"])
def test_a_driver_that_does_not_tell(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_open", lambda: Driver(fails))
    assert used_memory() is None


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_open", lambda: None)
    assert used_memory() is None
    with PeakDevice() as device:
        assert device.peak() is None


def test_the_peak_is_above_the_start_and_between_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others had in use before is not counted, what was let go of again is."""
    monkeypatch.setattr(nvml, "PAUSE", 0.0)
    seen = threading.Event()

    def looks() -> Iterator[int | None]:
        yield 1000
        yield from (1200, 5000, None, 1300)
        seen.set()
        while True:
            yield 1100

    found = looks()
    lock = threading.Lock()

    def read() -> int | None:
        with lock:
            return next(found)

    with PeakDevice(read) as device:
        assert seen.wait(60), "nobody looked"
        assert device.peak() == 4000
    assert device.peak() == 4000
