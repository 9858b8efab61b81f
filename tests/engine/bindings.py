"""The API of TensorRT's Python bindings as plain data, read in a process of its own.

The bindings of TensorRT import wherever libraries with their sonames offer nine C functions. So stubs do
where there is no TensorRT: nothing can be built with them, but all classes and signatures are there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STUBS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}

READ = """
import ctypes, importlib, inspect, json, sys

for library in sys.argv[2:]:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
if sys.argv[1] == "tensorrt_rtx_bindings":
    from allaprima.runtime.flavours import load
    module = load("tensorrt-rtx")
else:
    module = importlib.import_module(sys.argv[1])

def describe(value):
    if inspect.isclass(value):
        return {"kind": "class", "text": value.__qualname__}
    if isinstance(value, property):
        return {"kind": "property", "text": value.fget.__doc__ or ""}
    if callable(value):
        return {"kind": "method", "text": value.__doc__ or ""}
    return {"kind": "value", "text": type(value).__qualname__}

found = {"": {name: describe(value) for name, value in vars(module).items()}}
todo = [value for value in vars(module).values() if inspect.isclass(value)]
while todo:
    one = todo.pop()
    if one.__qualname__ not in found:
        found[one.__qualname__] = {name: describe(inspect.getattr_static(one, name)) for name in dir(one)}
        todo += [value for value in vars(one).values() if inspect.isclass(value)]
for owner, members in found.items():  # static methods and the like, which only getattr sees through
    for name, member in members.items():
        if owner and member["kind"] == "value" and "method" in member["text"]:
            scope = module
            for part in owner.split("."):
                scope = getattr(scope, part)
            members[name] = describe(getattr(scope, name))
sys.stdout.write(json.dumps(found))
"""


@dataclass(frozen=True)
class Signature:
    """One overload: names of its parameters without self, how many must be given, and what it returns."""

    names: tuple[str, ...]
    required: int
    returns: str

    def takes(self, positional: int, keywords: frozenset[str]) -> bool:
        """Whether it can be called so."""
        by_place, rest = self.names[:positional], self.names[positional:]
        given = positional + len(keywords)
        missing = [name for name in self.names[: self.required] if name not in (*by_place, *keywords)]
        return positional <= len(self.names) >= given and keywords <= set(rest) and not missing


@dataclass(frozen=True)
class Member:
    """Of a class or of the module: `kind` is "class", "property", "method" or "value"."""

    kind: str
    text: str

    @property
    def type(self) -> str:
        """The class that it is or has; of a method nothing."""
        if self.kind == "property":
            found = re.search(r"-> ([\w.]+)", self.text)
            return _plain(found[1]) if found else ""
        return "" if self.kind == "method" else self.text

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All overloads, from the docstring."""
        return tuple(_signatures(self.text))


Bindings = Mapping[str, Mapping[str, Member]]
"""Members by name, by class; "" is the module itself."""


def read_bindings(module: str, folder: Path) -> Bindings:
    """The API of an installed bindings module. `folder` is where stubs may be made."""
    libraries = make_stubs(folder) if module == "tensorrt_bindings" else []
    done = subprocess.run(
        [sys.executable, "-c", READ, module, *map(str, libraries)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {
        owner: {name: Member(**member) for name, member in members.items()}
        for owner, members in json.loads(done.stdout).items()
    }


def make_stubs(folder: Path) -> list[Path]:
    """Libraries in which every function returns 0."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed for the stubs of TensorRT's libraries: install gcc"
    for soname, functions in STUBS.items():
        source = folder / f"{soname}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{soname}",
            "-o",
            str(folder / soname),
            str(source),
        ]
        subprocess.run(command, check=True)
    return [folder / soname for soname in STUBS]


def _signatures(text: str) -> Iterator[Signature]:
    for line in text.splitlines():
        found = re.match(r"(?:\d+\. )?\w+\((.*)\) -> (.+)$", line.strip())
        if found is None:
            continue
        # A default may hold a colon too, as in <Severity.WARNING: 2>, but not after a comma and a word.
        starts = [*re.finditer(r"(?:^|, )(\w+)(?=: )", found[1])]
        ends = [*(start.start() for start in starts[1:]), len(found[1])]
        parts = [found[1][start.end() : end] for start, end in zip(starts, ends, strict=True)]
        pairs = [(start[1], " = " in part) for start, part in zip(starts, parts, strict=True)]
        pairs = pairs[1:] if pairs and pairs[0][0] in ("self", "arg0") else pairs
        required = sum(not optional for _, optional in pairs)
        yield Signature(tuple(name for name, _ in pairs), required, _plain(found[2]))


def _plain(name: str) -> str:
    """Without the module's name."""
    return re.sub(r"^tensorrt\w*\.tensorrt\w*\.", "", name)
