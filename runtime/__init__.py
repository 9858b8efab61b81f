"""Painting: a bundle, a backend and a prompt in, pictures out. Needs NumPy, Pillow and tokenizers only."""

from allaprima.runtime.backends import BackendInfo, Decision, backends, choose, decide, open_session
from allaprima.runtime.image import check_writable, encode_image, read_parameters, save_image, save_preview
from allaprima.runtime.pipeline import Pipeline
from allaprima.runtime.request import Request
from allaprima.runtime.result import MemoryUse, Parameters, Progress, Result
from allaprima.runtime.sampling import Sampling
from allaprima.runtime.session import Binding, Session
from allaprima.runtime.settings import Settings

__all__ = [
    "BackendInfo",
    "Binding",
    "Decision",
    "MemoryUse",
    "Parameters",
    "Pipeline",
    "Progress",
    "Request",
    "Result",
    "Sampling",
    "Session",
    "Settings",
    "backends",
    "check_writable",
    "choose",
    "decide",
    "encode_image",
    "open_session",
    "read_parameters",
    "save_image",
    "save_preview",
]
