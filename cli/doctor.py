"""`allaprima doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import Any

from allaprima.bundle import VERSION, BackendError, builtin_names
from allaprima.cli.machine import Gpu, Machine, read_machine
from allaprima.cli.output import add_json, print_json, print_table, show_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Look, and tell."""
    from allaprima.engine import compilers
    from allaprima.runtime import backends

    machine, found, bundles = read_machine(), backends(), builtin_names()
    auto, reasons = _decision()
    if options.json:
        report: dict[str, Any] = {"allaprima": VERSION, "machine": asdict(machine), "bundles": list(bundles)}
        report |= {"compilers": [asdict(info) for info in compilers()]}
        print_json({**report, "auto": auto, "backends": [asdict(info) for info in found]})
        return
    facts = [("allaprima", VERSION), *_facts(machine), ("built-in bundles", ", ".join(bundles) or "none")]
    print_table(("", ""), facts)
    print_table(
        ("backend", "works", "version", "precisions", "what to do"),
        [
            (
                info.name,
                "yes" if info.available else "no",
                info.version,
                ", ".join(info.precisions),
                "" if info.available else f"{info.remedy}  ({info.reason})",
            )
            for info in found
        ],
    )
    print_table(("auto takes", "not the faster"), [(auto, reasons)])
    print_table(
        ("compiles for GPUs", "works", "version", "what to do"),
        [(info.name, "yes" if info.available else "no", info.version, info.reason) for info in compilers()],
    )


def _decision() -> tuple[str, str]:
    """What `--backend auto` takes for a bundle that nothing was built for, and why nothing faster."""
    from allaprima.runtime import decide

    try:
        decision = decide()
    except BackendError as cause:
        return "nothing", str(cause)
    reasons: dict[str, list[str]] = {}
    for name, reason in decision.passed:
        reasons.setdefault(reason, []).append(name)
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return decision.backend, told


def _facts(machine: Machine) -> list[tuple[str, str]]:
    memory = [
        f"{show_bytes(size)} {what}"
        for size, what in ((machine.memory_total, "in all"), (machine.memory_available, "free"))
        if size is not None
    ]
    facts = [
        ("python", machine.python),
        *machine.packages.items(),
        ("system", machine.system),
        ("cpu", f"{machine.cpu}, {machine.cores} cores"),
        ("cpu features", ", ".join(machine.features) or "none known"),
        ("memory", ", ".join(memory) or "unknown"),
    ]
    gpus = [_gpu(gpu) for gpu in machine.gpus]
    return facts + [("gpu", gpu) for gpu in gpus or ["none found by nvidia-smi"]]


def _gpu(gpu: Gpu) -> str:
    from allaprima.runtime.flavours import flavour_for

    what = f"{gpu.name}, {show_bytes(gpu.memory_total)}, driver {gpu.driver}, sm {gpu.compute_capability}"
    if not re.fullmatch(r"\d+\.\d+", gpu.compute_capability):
        return what
    return f"{what}: {flavour_for(gpu.compute_capability) or 'too old for TensorRT'}"
