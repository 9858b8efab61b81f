"""What a source file uses of TensorRT and of Polygraphy, held against what there is.

Types are followed as far as it takes: from annotations with the protocols of `tensorrt_api.py`, or with an
alias of Any that bears the name of a class; from `load(...)`, which gives the module; from imports of
Polygraphy; through attributes, calls and assignments.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .bindings import Bindings

API = "allaprima.runtime.sessions.tensorrt_api"
FLAVOURS = "allaprima.runtime.flavours"


@dataclass(frozen=True)
class Ours:
    """A value of a class of the bindings, or the class itself; "" is the module."""

    owner: str
    is_class: bool = False


@dataclass(frozen=True)
class Python:
    """Something of Polygraphy: a module, a class, or an instance of one."""

    value: Any
    is_instance: bool = False


Value = Ours | Python | None
"""What an expression is, None if that does not matter here."""


@dataclass
class Report:
    """Names of what is used ("ITensor.dtype", "polygraphy.backend.trt.CreateConfig"), and what is wrong."""

    used: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def examine(source: str, bindings: Bindings, protocols: Mapping[str, str]) -> Report:
    """Walk a file. `protocols` gives the class that each protocol describes."""
    tree = ast.parse(source)
    walker = _Walker(bindings, _annotations(tree, protocols), _loads(tree))
    walker.run(tree)
    return walker.report


def _annotations(tree: ast.Module, protocols: Mapping[str, str]) -> dict[str, str]:
    """Names in this file that annotate values of the bindings, with their classes."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == API:
            names |= {
                alias.asname or alias.name: protocols[alias.name]
                for alias in node.names
                if alias.name in protocols
            }
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
            name = ast.unparse(node.target)
            if node.value is not None and ast.unparse(node.value) == "Any":
                names[name] = name
    return names


def _loads(tree: ast.Module) -> bool:
    """Whether `load` in this file is that of the flavours."""
    return any(
        (
            isinstance(node, ast.ImportFrom)
            and node.module == FLAVOURS
            and "load" in [a.name for a in node.names]
        )
        or (isinstance(node, ast.FunctionDef) and node.name == "load")
        for node in ast.walk(tree)
    )


class _Walker:
    def __init__(self, bindings: Bindings, annotations: Mapping[str, str], loads: bool) -> None:
        self.bindings, self.annotations, self.loads = bindings, annotations, loads
        self.report = Report()
        self.dicts: dict[str, set[str]] = {}

    def run(self, tree: ast.Module) -> None:
        for name in self.annotations.values():
            if name not in self.bindings:
                self.report.wrong.append(f"there is no class {name}")
        attributes: dict[str, Value] = {}
        for _ in range(2):  # what a method assigns to self, others may use above it
            self.report.wrong = [line for line in self.report.wrong if line.startswith("there is")]
            self.visit(tree, attributes, attributes)

    def visit(self, node: ast.AST, names: dict[str, Value], attributes: dict[str, Value]) -> None:
        """Statements in order, every function with its own names."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = {**names, **attributes}
                for argument in ast.walk(child.args):
                    if isinstance(argument, ast.arg):
                        inner[argument.arg] = self.annotated(argument.annotation)
                self.visit(child, inner, attributes)
                attributes |= {
                    key: value for key, value in inner.items() if key.startswith("self.") and value
                }
            elif isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "polygraphy":
                self.bind_imports(child, names)
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                self.assign(child, names)
            elif isinstance(child, ast.expr):
                self.infer(child, names)
            else:
                self.visit(child, names, attributes)

    def bind_imports(self, node: ast.ImportFrom, names: dict[str, Value]) -> None:
        for alias in node.names:
            path = f"{node.module}.{alias.name}"
            try:
                value = importlib.import_module(path)
            except ImportError:
                value = getattr(importlib.import_module(str(node.module)), alias.name, None)
            if value is None:
                self.report.wrong.append(f"line {node.lineno}: there is no {path}")
            names[alias.asname or alias.name] = Python(value)

    def assign(self, node: ast.Assign | ast.AnnAssign, names: dict[str, Value]) -> None:
        value = self.infer(node.value, names) if node.value is not None else None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            self.infer(target, names)
            key = ast.unparse(target)
            if isinstance(node.value, ast.Dict):
                self.dicts[key] = {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
            declared = self.annotated(node.annotation) if isinstance(node, ast.AnnAssign) else None
            names[key] = declared or value

    def annotated(self, annotation: ast.expr | None) -> Value:
        """The class that an annotation names, also as in "Engine | None", but not as in "list[Engine]"."""
        if annotation is None or isinstance(annotation, ast.Subscript):
            return None
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name) and node.id in self.annotations:
                return Ours(self.annotations[node.id])
        return None

    def infer(self, node: ast.AST, names: dict[str, Value]) -> Value:
        """What an expression is; everything that it uses on the way is checked."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value, names)
            return names.get(ast.unparse(node)) if base is None else self.member(base, node)
        if isinstance(node, ast.Call):
            return self.call(node, names)
        if isinstance(node, ast.NamedExpr):
            names[node.target.id] = self.infer(node.value, names)
            return names[node.target.id]
        for child in ast.iter_child_nodes(node):
            self.infer(child, names)
        return None

    def member(self, base: Value, node: ast.Attribute) -> Value:
        if isinstance(base, Python):
            found = getattr(base.value, node.attr, None)
            where = getattr(base.value, "__name__", str(base.value))
            self.note(node, f"{where}.{node.attr}", found is not None)
            return Python(found) if found is not None else None
        assert isinstance(base, Ours)
        known = self.bindings.get(base.owner, {}).get(node.attr)
        self.note(node, f"{base.owner}.{node.attr}" if base.owner else node.attr, known is not None)
        if known is None or known.type not in self.bindings:
            return None
        return Ours(known.type, known.kind == "class")

    def call(self, node: ast.Call, names: dict[str, Value]) -> Value:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.infer(argument, names)
        if isinstance(node.func, ast.Name) and node.func.id == "load" and self.loads:
            return Ours("")
        if isinstance(node.func, ast.Attribute):
            base = self.infer(node.func.value, names)
            if isinstance(base, Ours):
                return self.call_ours(base, node.func, node)
        function = self.infer(node.func, names)
        if isinstance(function, Python):
            return self.call_python(function, node)
        return None

    def call_ours(self, base: Ours, function: ast.Attribute, node: ast.Call) -> Value:
        result = self.member(base, function)
        known = self.bindings.get(base.owner, {}).get(function.attr)
        if known is None:
            return None
        if isinstance(result, Ours) and result.is_class:
            known = self.bindings[result.owner]["__init__"]
        positional, keywords, complete = self.arguments(node)
        fitting = [one for one in known.signatures if one.takes(positional, keywords) or not complete]
        if known.signatures and not fitting:
            self.report.wrong.append(f"line {node.lineno}: {ast.unparse(node)}: no overload takes that")
            return None
        if isinstance(result, Ours) and result.is_class:
            return Ours(result.owner)
        returns = fitting[0].returns if fitting else ""
        return Ours(returns) if returns in self.bindings and returns else None

    def call_python(self, function: Python, node: ast.Call) -> Value:
        positional, keywords, complete = self.arguments(node)
        owner = function.value
        if not callable(owner):
            return None
        known = _parameters(owner)
        unknown = keywords - known
        if unknown:
            self.report.wrong.append(f"line {node.lineno}: {ast.unparse(node.func)} has no {sorted(unknown)}")
        elif complete and not inspect.isclass(owner) and positional > len(known):
            self.report.wrong.append(f"line {node.lineno}: {ast.unparse(node.func)} takes {sorted(known)}")
        return Python(owner) if inspect.isclass(owner) else None

    def arguments(self, node: ast.Call) -> tuple[int, frozenset[str], bool]:
        """How many by place, names of the others, and whether that is all that can be known."""
        keywords, complete = set(), not any(isinstance(one, ast.Starred) for one in node.args)
        for keyword in node.keywords:
            if keyword.arg is not None:
                keywords.add(keyword.arg)
            else:
                keywords |= self.dicts.get(ast.unparse(keyword.value), {f"**{ast.unparse(keyword.value)}"})
        return sum(not isinstance(one, ast.Starred) for one in node.args), frozenset(keywords), complete

    def note(self, node: ast.Attribute, name: str, exists: bool) -> None:
        self.report.used.add(name)
        if not exists:
            self.report.wrong.append(f"line {node.lineno}: there is no {name}")


def _parameters(function: Any) -> set[str]:
    """Names of the parameters; of a class those of all constructors that **kwargs may reach."""
    chain: Iterator[Any] = iter([function])
    if inspect.isclass(function):
        chain = (
            vars(one)["__init__"] for one in function.__mro__ if "__init__" in vars(one) and one is not object
        )
    return {
        name
        for one in chain
        for name, parameter in inspect.signature(one).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
