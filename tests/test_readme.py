"""What the README shows is run as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from allaprima.cli.main import main
from allaprima.runtime import samplers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```\w+\n(.*?)```", README, re.DOTALL))


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS["From Python"], "README.md", "exec"), {})
    assert Image.open(tmp_path / "picture.png").size == (128, 128)


def test_command_line_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (128, 128), 255).save("mask.png")
    commands = [shlex.split(line, comments=True) for line in BLOCKS["From the command line"].splitlines()]
    for command in commands:
        assert command[0] == "allaprima"
        assert main(command[1:]) == 0, shlex.join(command)
    assert {path.name for path in tmp_path.iterdir()} == {
        "star.png",
        "heart.png",
        "hearts-1.png",
        "hearts-2.png",
        "hearts-3.png",
        "mask.png",
    }
    assert Image.open(tmp_path / "hearts-1.png").size == (192, 128)
    capsys.readouterr()
    assert main(["inspect", "star.png", "--json"]) == 0
    assert "small yellow star" in json.dumps(json.loads(capsys.readouterr().out))


def test_pictures_that_the_readmes_show_exist() -> None:
    for page in (Path("README.md"), Path("models/shapes/README.md")):
        path = Path(__file__).parent.parent / page
        for target in re.findall(
            r"!\[.*?\]\((?!https?:)(.+?)\)", path.read_text(encoding="utf-8"), re.DOTALL
        ):
            assert (path.parent / target).is_file(), f"{page} shows {target}"


def test_list_of_samplers() -> None:
    """docs/samplers.md has a line for each sampler, with what it needs."""
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| `(\w+)` \| (.*?) \| `(\w+)` \| (\d) \| (.*?) \| (\d) \| (.*?) \|", text, re.MULTILINE
    )
    assert lines == [
        (
            info.name,
            ", ".join((info.title, *info.aliases)),
            info.scheduler.removesuffix("Scheduler"),
            str(info.calls),
            info.noise,
            str(info.history),
            ", ".join(f"`{name}`" for name in info.arguments) or "–",
        )
        for info in samplers.names()
    ]
