"""Facts about the machine, each read where the system keeps it and left out where it does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FEATURES = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
"""The instruction sets that decide how fast a network runs, as Linux spells them."""

_PACKAGES = ("numpy", "tokenizers", "pillow")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA device, as nvidia-smi tells it; memory in bytes."""

    name: str
    memory_total: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """Where allaprima runs. `cores` are those that this process may use; memory in bytes, None if unknown."""

    python: str
    packages: Mapping[str, str]
    system: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    memory_total: int | None
    memory_available: int | None
    gpus: tuple[Gpu, ...]


def read_machine() -> Machine:
    """Read everything; nothing that is missing is an error."""
    cpu = _read_fields(Path("/proc/cpuinfo"))
    memory = _read_fields(Path("/proc/meminfo"))
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return Machine(
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in _PACKAGES},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        features=tuple(name for name in _FEATURES if name in flags),
        memory_total=_kibibytes(memory.get("MemTotal")),
        memory_available=_kibibytes(memory.get("MemAvailable")),
        gpus=_read_gpus(),
    )


def _read_fields(path: Path) -> dict[str, str]:
    """The first value of every "name : value" line; empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _kibibytes(value: str | None) -> int | None:
    number = (value or "").removesuffix(" kB")
    return int(number) * 1024 if number.isdecimal() else None


def _read_gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [
        program,
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return tuple(
        Gpu(name, int(memory) * 2**20, driver, capability)
        for name, memory, driver, capability in (row for row in rows if len(row) == 4)
        if memory.isdecimal()
    )
