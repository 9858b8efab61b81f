"""Strict JSON for frozen dataclasses: the fields' types are the format."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from allaprima.bundle.errors import BundleError

LATER: Mapping[str, Any] = {"later": True}
"""Metadata of a field that its schema had not from the start: where it is absent, its default is meant."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A frozen dataclass that is also a JSON object.

    Fields may be `str`, `int`, `float`, `bool`, `Any`, another `Record`, `tuple[X, ...]`, `Mapping[str, X]`
    or a union of these, of which at most one, the first, is a JSON object. Every field must be present in the
    JSON, even one with a default: a default is a convenience for Python code, never a guess about a file. But
    a field whose metadata is `LATER` is left out where it has its default.
    """

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, in the order of the fields."""
        return {
            field.name: _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or not _is_later(field)
        }

    @classmethod
    def from_json(cls, value: object, path: str = "") -> Self:
        """The record that `value` (as `json.load` gives it) describes; `path` is its place in the document.

        Raises BundleError naming the path of a field that is unknown, missing, of another type or out of
        range.
        """
        given = _expect(value, dict, "an object", path)
        kinds = get_type_hints(cls)
        later = {field.name for field in dataclasses.fields(cls) if _is_later(field)}
        for name in given:
            if name not in kinds:
                raise BundleError(f"unknown field '{_join(path, name)}'")
        for name in kinds:
            if name not in given and name not in later:
                raise BundleError(f"missing field '{_join(path, name)}'")
        fields = {
            name: _decode(kind, given[name], _join(path, name))
            for name, kind in kinds.items()
            if name in given
        }
        try:
            return cls(**fields)
        except ValueError as error:
            raise BundleError(f"field '{path}': {error}" if path else str(error)) from error


def _is_later(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("later"))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _decode(kind: Any, value: object, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Mapping:
        entries = _expect(value, dict, "an object", path)
        return {key: _decode(arguments[1], item, _join(path, key)) for key, item in entries.items()}
    if origin is tuple:
        items = _expect(value, list, "an array", path)
        return tuple(_decode(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    if origin in (types.UnionType, Union):
        # At most one member is a record, and the first; of scalars the first that fits is the only one.
        member = next((member for member in arguments if type(value) is member), arguments[0])
        return _decode(member, value, path)
    if issubclass(kind, Record):
        return kind.from_json(value, path)
    return _decode_scalar(kind, value, path)


def _decode_scalar(kind: type, value: object, path: str) -> Any:
    if kind is float:
        if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
            return float(value)
        raise _mismatch("a finite number", value, path)
    names = {str: "a string", int: "an integer", bool: "true or false"}
    if type(value) is not kind:  # not isinstance: to Python, True is an integer
        raise _mismatch(names[kind], value, path)
    return value


def _expect(value: object, kind: type, wanted: str, path: str) -> Any:
    if not isinstance(value, kind):
        raise _mismatch(wanted, value, path)
    return value


def _mismatch(wanted: str, value: object, path: str) -> BundleError:
    shown = repr(value)
    place = f"field '{path}'" if path else "the document"
    return BundleError(f"{place} should be {wanted}, not {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
