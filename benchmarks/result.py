"""The document that a benchmark leaves: raw measurements, and where and how they were taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.plan import Plan, Work
from allaprima.benchmarks.report import stamp
from allaprima.benchmarks.turns import Picture, Turn
from allaprima.bundle import RequestError

KIND, SCHEMA = "allaprima bench", 2
FILE = "result.json"
Result = dict[str, Any]
"""See docs/benchmarks.md for its fields."""


def new_result(command: str, model: str, plan: Plan) -> Result:
    """A result without measurements, marked incomplete."""
    return {
        **stamp(command, model, plan.settings.threads),
        "schema": SCHEMA,
        "kind": KIND,
        "complete": False,
        "stopped": None,
        "plan": {
            "configurations": [asdict(work) for work in plan.works],
            "settings": asdict(plan.settings),
            "rounds": plan.rounds,
            "repeats": plan.repeats,
        },
        "contestants": {},
        "absent": {},
        "cold": [],
        "rates": [],
        "counts": [],
        "scenarios": [],
        "quality": {},
        "notes": [],
    }


def about(contestant: Contestant) -> dict[str, Any]:
    """What a result says of a contestant before its first turn; no path of the machine."""
    name = Path(contestant.bundle).name if contestant.bundle else None
    return {
        "precision": contestant.precision,
        "backend": contestant.backend or None,
        "bundle": name,
        "versions": dict(contestant.versions) or None,
        "turns": [],
    }


def turn_to_json(turn: Turn) -> dict[str, Any]:
    """A turn, its pictures by configuration in the order in which they were painted."""
    groups: dict[Work, list[Picture]] = {}
    for picture in turn.pictures:
        groups.setdefault(picture.work, []).append(picture)
    return {
        "round": turn.round,
        "complete": turn.complete,
        "load": turn.load,
        "warm_up": turn.warm_up,
        "memory": turn.memory,
        "device_memory": turn.device_memory,
        "pictures": [_pictures_to_json(work, pictures) for work, pictures in groups.items()],
    }


def _pictures_to_json(work: Work, pictures: Sequence[Picture]) -> dict[str, Any]:
    first = pictures[0]
    stages = {name: [picture.stages[name] for picture in pictures] for name in first.stages}
    engine = None
    if first.engine is not None:
        engine = {
            role: {
                "seconds": [(picture.engine or {})[role][0] for picture in pictures],
                "calls": calls,
            }
            for role, (_, calls) in first.engine.items()
        }
    return {
        **asdict(work),
        "seconds": [picture.seconds for picture in pictures],
        "png": [picture.png for picture in pictures],
        "stages": stages,
        "engine": engine,
    }


def measurements(result: Result) -> Iterator[tuple[str, Mapping[str, Any], Work, Mapping[str, Any]]]:
    """Contestant, turn, configuration and what was measured of it."""
    for name, contestant in result["contestants"].items():
        for turn in contestant["turns"]:
            for entry in turn["pictures"]:
                yield name, turn, read_work(entry), entry


def read_work(entry: Mapping[str, Any]) -> Work:
    """The configuration that an entry of a result is about."""
    return Work(entry["batch"], entry["width"], entry["height"], entry["steps"])


def write(folder: Path, result: Result) -> Path:
    """Write `result.json`, whole or not at all. Raises RequestError if the folder cannot be written."""
    text = json.dumps(_rounded(result), indent=1, ensure_ascii=False)
    # One line for each list of numbers: a diff of two results is then readable, and half as long.
    text = re.sub(r"\[[\s\d.,eE+-]*\]", lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "["), text)
    path = folder / FILE
    partial = folder / f".{FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(text.replace(" ]", "]") + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read(path: Path) -> Result:
    """Read a result: its file, or the folder of its report.

    Raises RequestError if it cannot be read, or is of another kind or schema.
    """
    if path.is_dir():
        path = path / FILE
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or "schema" not in result:
        raise RequestError(f"{path} is no result of allaprima bench: it has no schema")
    if result["schema"] != SCHEMA or result.get("kind") != KIND:
        raise RequestError(
            f"{path} has the schema {result['schema']} of '{result.get('kind', 'an older benchmark')}', "
            f"not {SCHEMA} of '{KIND}': measure again, or compare with the version that made it"
        )
    return result


def _rounded(value: Any) -> Any:
    """Floats to six digits: more were not measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
