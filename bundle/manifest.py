"""The manifest, `bundle.json`: everything that the later stages know about a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath
from typing import Any, Self

from allaprima.bundle.errors import BundleError
from allaprima.bundle.record import LATER, Record

SCHEMA = 2
"""The schema that this version writes and reads."""


@dataclass(frozen=True)
class TensorSpec(Record):
    """One input or output of a graph.

    `dtype` is NumPy's name ("float32", "int64", "uint8"); a string in `shape` is a symbolic axis ("B", "G*B",
    "8*h").
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, extents: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbolic axis ("H", "8*H", "G*B") replaced by the product of its parts."""
        return tuple(
            axis
            if isinstance(axis, int)
            else math.prod(int(part) if part.isdigit() else extents[part] for part in axis.split("*"))
            for axis in self.shape
        )


@dataclass(frozen=True)
class Parity(Record):
    """The error of a graph against the torch module, measured at export with random inputs of these shapes.

    `max_abs` is the largest absolute difference over all outputs, `relative` is that over the reference's
    standard deviation.
    """

    shapes: Mapping[str, tuple[int, ...]]
    max_abs: float
    relative: float


@dataclass(frozen=True)
class Quantization(Record):
    """What of a graph computes in 8 bits, and what that costs.

    `layers` of the graph's `total` convolutions and matrix products with weights take both factors rounded to
    `dtype`. `error` is the root mean square difference of what the network predicts, after guidance, over
    its standard deviation, against the graph before: measured on `held_out` steps of the bundle's own
    pipeline that the ranges were not taken from. Those are of `samples` pictures of `steps` steps.
    """

    dtype: str
    layers: int
    total: int
    error: float
    held_out: int
    samples: int
    steps: int

    def __post_init__(self) -> None:
        if not (0 <= self.layers <= self.total and self.error >= 0):
            raise ValueError(f"{self.layers} of {self.total} layers with an error of {self.error} cannot be")


@dataclass(frozen=True)
class Component(Record):
    """One ONNX graph.

    `graph` is its path in the bundle, `precision` that of its weights: "fp32", "fp16" or "bf16".
    `overflows_fp16`: its values leave the range of fp16, so it must be computed in another precision.
    `weights` is "int8" where those of matrix products are stored so, None where all are in `precision`.
    `float32_graph`, beside `graph`, computes the same in float32 over the same weights, as ONNX Runtime does
    it best on a CPU; None where there is none. `weight_bytes`: how much it uses of a file of weights
    that belongs to another component, None where the file is its own. `quantization` is there where not only
    weights are int8, but the arithmetic too; `parity` is then empty, since the torch module knows nothing of
    it.
    """

    graph: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: tuple[Parity, ...]
    overflows_fp16: bool = False
    weights: str | None = field(default=None, metadata=LATER)
    float32_graph: str | None = field(default=None, metadata=LATER)
    weight_bytes: int | None = field(default=None, metadata=LATER)
    quantization: Quantization | None = field(default=None, metadata=LATER)

    @property
    def precisions(self) -> tuple[str, ...]:
        """What there is a graph in: its own precision, and "fp32" where there is one of float32."""
        return tuple(dict.fromkeys((self.precision, *(() if self.float32_graph is None else ("fp32",)))))

    @property
    def widens(self) -> bool:
        """Whether there is a graph that computes in more bits than the weights have."""
        return self.float32_graph is not None and self.precision != "fp32"


@dataclass(frozen=True)
class Latent(Record):
    """The latent space.

    A picture of height x width pixels is a sample of shape [channels, height / downscale, width / downscale];
    both must be multiples of `multiple` pixels.
    """

    channels: int
    downscale: int
    multiple: int

    def __post_init__(self) -> None:
        if min(self.channels, self.downscale, self.multiple) < 1 or self.multiple % self.downscale:
            raise ValueError(f"{self} is not a latent space: positive, and multiple divisible by downscale")


@dataclass(frozen=True)
class Defaults(Record):
    """What a request gets that does not say otherwise; sizes in pixels."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.num_inference_steps) < 1 or not math.isfinite(
            self.guidance_scale
        ):
            raise ValueError(f"{self} are not usable defaults: sizes and steps are at least 1")


@dataclass(frozen=True)
class TokenizerSpec(Record):
    """`file` is a tokenizer.json of the `tokenizers` library.

    A prompt becomes `length` ids: `bos` (None where the model has none), the text, `eos`, then as many `pad`
    as it takes.
    """

    file: str
    length: int
    bos: int | None
    eos: int
    pad: int

    @property
    def room(self) -> int:
        """How many tokens of text fit."""
        return self.length - (1 if self.bos is None else 2)


@dataclass(frozen=True)
class Preview(Record):
    """What latents look like, roughly: `colour = offset + sum over channels of latent * matrix[channel]`.

    `matrix` [C][3] and `offset` [3] give red, green and blue from 0 to 1, one pixel for each latent.
    """

    matrix: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = (*self.matrix, self.offset)
        if any(len(row) != 3 or not all(map(math.isfinite, row)) for row in rows):
            raise ValueError("matrix [C][3] and offset [3] are not a map to three colours")


@dataclass(frozen=True)
class FileEntry(Record):
    """Size in bytes and lower-case hexadecimal sha256 of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"size {self.size} and sha256 '{self.sha256}' do not describe a file")


@dataclass(frozen=True)
class Manifest(Record):
    """The whole contract between export, build and run.

    `components` of the family "stable-diffusion": text_encoder, denoiser, vae_decoder, vae_encoder, and in
    larger models text_encoder_2; "kandinsky-3" has the first four, "kandinsky-2.2" also prior, with
    prior/settings.json, image_encoder, likewise, if it was asked for, and hint_encoder if the denoiser takes
    hints. Where the denoiser's step can be cached, denoiser_deep takes a whole step and hands out the deep
    features of its UNet, and denoiser_shallow one with those of an earlier step. `precision` is the
    denoiser's; each component has its own. `tokenizers` belong to the text encoders, under the same names.
    `zero_negative`: no negative prompt means a condition of zeros, not that of an empty text. `scheduler` is
    diffusers' scheduler_config.json as it is. `history` is S, the number of earlier predictions that the
    denoiser takes. `preview` is None where the autoencoder's latents are not finite. `versions` says what
    made it. `files` lists every file but bundle.json, by its path with `/`; a `BundleWriter` fills it in.
    """

    schema: int
    name: str
    family: str
    precision: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, TokenizerSpec]
    zero_negative: bool
    scheduler: Mapping[str, Any]
    latent: Latent
    preview: Preview | None
    defaults: Defaults
    history: int
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({tokenizer.length for tokenizer in self.tokenizers.values()}) != 1:
            raise ValueError("there should be tokenizers, all of one length")
        if self.history < 0:
            raise ValueError(f"history is {self.history}: it cannot be negative")
        if self.preview is not None and len(self.preview.matrix) != self.latent.channels:
            raise ValueError(
                f"preview has {len(self.preview.matrix)} rows for {self.latent.channels} channels of latents"
            )
        for path in (*self.files, *self.required()):
            check_relative(path)

    @classmethod
    def from_json(cls, value: object, path: str = "") -> Self:
        """As `Record.from_json`; another schema is refused before its fields are looked at."""
        schema = value.get("schema") if isinstance(value, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise BundleError(f"written by a newer allaprima, schema {schema} > {SCHEMA}: upgrade allaprima")
        if type(schema) is int and schema < SCHEMA:
            raise BundleError(
                f"written by an older allaprima, schema {schema} < {SCHEMA}: export the checkpoint again"
            )
        return super().from_json(value, path)

    @property
    def length(self) -> int:
        """L, the number of tokens of one prompt."""
        return next(iter(self.tokenizers.values())).length

    def required(self) -> tuple[str, ...]:
        """The files that the manifest itself refers to: the graphs and the tokenizers."""
        components = self.components.values()
        graphs = [graph for each in components for graph in (each.graph, each.float32_graph) if graph]
        return (*graphs, *(tokenizer.file for tokenizer in self.tokenizers.values()))


def component_name(graph: PurePath) -> str:
    """What a component is called, by the path of its graph: where several are in a folder, after it too."""
    return graph.parent.name if graph.stem == "model" else f"{graph.parent.name}_{graph.stem}"


def check_relative(path: str) -> str:
    """`path`, if it names a place inside a bundle on every system; else ValueError.

    Only the spelling counts: a file may be a symbolic link, as caches of model hubs make them, because links
    are made by whoever owns the disk and paths by whoever wrote the manifest.
    """
    parts = path.split("/")
    if not path or "\\" in path or ":" in path or "\0" in path or {"", ".", ".."} & set(parts):
        raise ValueError(f"the path '{path}' leaves the bundle or is not a plain relative path")
    return str(PurePosixPath(path))
