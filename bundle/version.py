"""The version of allaprima, written here and nowhere else (pyproject.toml reads this file)."""

VERSION = "0.1.0"
