"""A session without a backend: a NumPy function with specs, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from allaprima.bundle import BackendError, TensorSpec
from allaprima.runtime.memory import HOST, Memory, Tensor
from allaprima.runtime.session import check_tensors

Function = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


class NumpySession:
    """A session whose graph is `function`: the inputs by name to the outputs by name."""

    precision = "fp32"
    memory: Memory = HOST

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], function: Function
    ) -> None:
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in outputs}
        self._function: Function | None = function

    def bind(self, tensors: Mapping[str, Tensor]) -> NumpyBinding:
        """See Session.bind."""
        if self._function is None:
            raise BackendError("the session is closed")
        check_tensors(self.inputs, self.outputs, tensors)
        given = {name: tensors[name].array for name in self.inputs}
        return NumpyBinding(self._function, given, {name: tensors[name].array for name in self.outputs})

    def unload(self) -> None:
        """Nothing to do: see Session.unload."""

    def close(self) -> None:
        """See Session.close."""
        self._function = None


class NumpyBinding:
    """See Binding."""

    def __init__(
        self, function: Function, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> None:
        self._function = function
        self._inputs = inputs
        self._outputs = outputs

    def run(self) -> None:
        """See Binding.run."""
        try:
            results = self._function(self._inputs)
            for name, buffer in self._outputs.items():
                if results[name].shape != buffer.shape:
                    raise ValueError(f"{name} is {results[name].shape}, its buffer {buffer.shape}")
                buffer[...] = results[name]
        except Exception as error:
            raise BackendError(f"the function failed: {error}") from error
