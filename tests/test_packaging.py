"""What pip sees: the wheel holds every package, and the pins agree with what the project allows."""

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from allaprima.bundle import VERSION

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed() -> None:
    """setuptools cannot find packages that live in folders of other names, so they are written down."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    layers = [name.removeprefix("allaprima.") for name in PROJECT["tool"]["setuptools"]["package-dir"]]
    found = [
        path.parent.relative_to(ROOT) for layer in layers for path in (ROOT / layer).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted("allaprima." + ".".join(path.parts) for path in found)


def test_every_package_is_typed() -> None:
    for name in PROJECT["tool"]["setuptools"]["package-dir"]:
        assert (ROOT / name.removeprefix("allaprima.") / "py.typed").is_file()


def test_pins_agree_with_the_extras() -> None:
    """What `make` installs is pinned, within the bounds of pyproject.toml."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(
        line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#")
    )
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + [line for name in INSTALLED for line in extras[name]]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} excludes its own pin"


INSTALLED = ("export", "openvino", "ort", "tensorrt-rtx", "serve", "bench", "dev")
"""The extras that the Makefile installs."""


def test_installed_extras_are_those_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"'.[{','.join(INSTALLED)}]'" in text


def test_changelog_tells_of_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", VERSION)
