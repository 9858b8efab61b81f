"""`allaprima samplers` and `allaprima doctor`."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import allaprima.cli.machine as machine
from allaprima.runtime import BackendInfo, backends, samplers

Allaprima = Callable[..., SimpleNamespace]


def test_samplers(allaprima: Allaprima) -> None:
    table, document = allaprima("samplers").out, json.loads(allaprima("samplers", "--json").out)
    names = [info.name for info in samplers.names()]
    assert [entry["name"] for entry in document] == names
    for name in names:
        assert f" {name} " in table


def test_doctor(allaprima: Allaprima) -> None:
    table, document = allaprima("doctor").out, json.loads(allaprima("doctor", "--json").out)
    for info in backends():
        assert f" {info.name} " in table
    assert [entry["name"] for entry in document["backends"]] == [info.name for info in backends()]
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["packages"].keys() == {"numpy", "tokenizers", "pillow"}


def test_doctor_says_what_to_install(allaprima: Allaprima, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = 'pip install "allaprima[ort]"'
    absent = BackendInfo("ort", False, reason="No module named 'onnxruntime'", remedy=remedy)
    monkeypatch.setattr("allaprima.runtime.backends", lambda: (absent,))
    assert remedy in allaprima("doctor").out


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """nvidia_smi(text): a machine whose nvidia-smi prints it."""

    def set_text(text: str) -> None:
        monkeypatch.setattr("allaprima.cli.machine.shutil.which", lambda name: f"/bin/{name}")
        done = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr("allaprima.cli.machine.subprocess.run", lambda *_, **__: done)

    return set_text


def test_gpus_are_read(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("NVIDIA H200, 143771, 570.10, 9.0\nbroken line\nNVIDIA X, [N/A], 1, 2\n")
    assert machine.read_machine().gpus == (machine.Gpu("NVIDIA H200", 143771 * 2**20, "570.10", "9.0"),)


def test_a_failing_nvidia_smi_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr("allaprima.cli.machine.shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("allaprima.cli.machine.subprocess.run", fail)
    assert machine.read_machine().gpus == ()


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda name: Path("/none") / name.lstrip("/"))
    found = machine.read_machine()
    assert (found.features, found.memory_total, found.memory_available) == ((), None, None)
    assert found.cpu


def test_doctor_says_what_a_gpu_takes(allaprima: Allaprima, nvidia_smi: Callable[[str], None]) -> None:
    lines = [
        "NVIDIA H200, 143771, 570.10, 9.0",
        "NVIDIA L4, 23034, 570.10, 8.9",
        "NVIDIA V100, 16384, 570.10, 7.0",
        "NVIDIA Old, 16384, 390.10, [N/A]",
    ]
    nvidia_smi("\n".join(lines))
    said = allaprima("doctor").out
    for text in ("sm 9.0: tensorrt ", "sm 8.9: tensorrt-rtx", "sm 7.0: too old for TensorRT", "sm [N/A] "):
        assert text in said
