"""The one tree of errors.

```
AllaprimaError
├── BundleError     a bundle or its manifest is missing, damaged, too new, or may not be written there
├── ExportError     a checkpoint cannot be turned into a bundle
├── BuildError      a bundle cannot be compiled for the target
├── BackendError    a backend is absent, or refuses a graph, a precision or a buffer
└── RequestError    the caller asked for something that cannot be done
```

A message says what was wrong, with the value, and what to do next. The cause stays chained.
"""


class AllaprimaError(Exception):
    """Anything that allaprima refuses to do; `str(error)` is one line meant for the user."""


class BundleError(AllaprimaError):
    """A bundle or its manifest is missing, damaged, too new, or may not be written there."""


class ExportError(AllaprimaError):
    """A checkpoint cannot be turned into a bundle."""


class BuildError(AllaprimaError):
    """A bundle cannot be compiled for the target."""


class BackendError(AllaprimaError):
    """A backend is absent, or refuses a graph, a precision or a buffer."""


class RequestError(AllaprimaError):
    """The caller asked for something that cannot be done."""
