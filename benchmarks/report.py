"""Results on disk: a JSON document that says how and where it was measured, and a table beside it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from allaprima.bundle import VERSION
from allaprima.cli.machine import read_machine

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
_LIBRARIES = (
    *("diffusers", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino"),
    *("openvino-genai", "openvino-tokenizers", "optimum", "optimum-intel", "optimum-onnx"),
    *("stable-diffusion-cpp-python", "tensorrt", "tensorrt-rtx", "torch", "transformers"),
)


def stamp(command: str, model: str, threads: int) -> dict[str, Any]:
    """What every result begins with: command, date, machine and versions."""
    return {
        "schema": SCHEMA,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "threads": threads,
        "machine": asdict(read_machine()),
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str | None]:
    """Ours, and those of the libraries that can be measured here; None is not installed."""
    return {"allaprima": VERSION, **dict.fromkeys(_LIBRARIES), **installed(_LIBRARIES)}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages in this interpreter, as far as they are installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_result(folder: Path, name: str, result: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Write `name`.json and, beside it, `name`.md with the stamp and `lines`; the text of the latter."""
    text = "\n".join(
        [
            f"# {name}",
            "",
            *lines,
            "",
            describe_machine(result),
            "",
            f"    {result['command']}",
            "",
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in (("json", json.dumps(result, indent=2) + "\n"), ("md", text)):
        partial = folder / f"{name}.{kind}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / f"{name}.{kind}")
    return text


def describe_machine(result: Mapping[str, Any]) -> str:
    """The stamp of a result in one line."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    gpus = "".join(f"; {gpu['name']}, driver {gpu['driver']}" for gpu in machine["gpus"])
    return (
        f"{machine['cpu']}, {result['threads']} threads ({', '.join(machine['features'])}){gpus}; "
        f"{machine['system']}; Python {machine['python']}; {versions}; {result['date']}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table, the first column to the left and all others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
