"""Export: from a checkpoint to a bundle, with every graph checked on the way."""

from __future__ import annotations

import gc
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from allaprima.bundle import SCHEMA, VERSION, Bundle, BundleWriter, Component, ExportError, Manifest, Preview
from allaprima.export import kandinsky, kandinsky3, parity
from allaprima.export.family import Family
from allaprima.export.graph import GraphPlan, write_graph
from allaprima.export.presets import Usage
from allaprima.export.preview import Floats, fit_preview
from allaprima.export.segments import Arrays, run_graph
from allaprima.export.single_file import SingleFile, unpack
from allaprima.export.source import Checkpoint, open_checkpoint
from allaprima.export.stable_diffusion import read_family
from allaprima.export.step import HISTORY
from allaprima.export.step_cache import check_cut
from allaprima.export.widening import write_widened

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Progress:
    """Where an export is: a stage in words, and how many of `total` are done before it."""

    stage: str
    done: int
    total: int


def export_checkpoint(
    source: str,
    target: Path,
    *,
    precision: str = "fp16",
    name: str | None = None,
    overwrite: bool = False,
    single: SingleFile | None = None,
    thresholding: bool = False,
    usage: Usage | None = None,
    prior: str | None = None,
    image_encoder: bool = False,
    text_encoder_weights: str | None = None,
    step_cache: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Export a checkpoint of Stable Diffusion 1.x, 2.x or XL, or of Kandinsky 2.2 or 3, to a bundle.

    Args:
        source: a diffusers folder, a hub id, or a single file in the original layout.
        target: the bundle's folder; it appears when everything in it is written and checked, or not at all.
        precision: of the weights and of the networks' arithmetic, "fp16", "fp32" or "bf16"; graph edges are
            float32.
        name: what the bundle calls itself; by default the target's folder name.
        overwrite: replace an existing bundle.
        single: what a single file does not say; None is the usual.
        thresholding: give the denoiser dynamic thresholding, for the scheduler option of that name, even if
            the checkpoint's own scheduler does not ask for it.
        usage: the defaults that pictures are painted with; None is the checkpoint's own.
        text_encoder_weights: "int8" quantizes those of the text encoders' matrix products; None does not.
        prior: of Kandinsky, the folder or hub id of the prior if `source` is the decoder alone.
        image_encoder: of Kandinsky, put the prior's image encoder into the bundle too, for requests that hand
            in pictures to be mixed or to begin the prior with.
        step_cache: put the graphs for requests with a `cache_interval` into the bundle too. 1 (or True)
            leaves one layer of the UNet to be computed at every step, higher numbers more: slower and closer.
        progress: called before each stage.

    Raises:
        ExportError: the checkpoint cannot be read or expressed, or a graph disagrees with torch.
        BundleError: the target exists or cannot be written.
    """
    if precision not in DTYPES:
        raise ExportError(f"unknown precision '{precision}': choose fp16, fp32 or bf16")
    if text_encoder_weights not in (None, "int8"):
        raise ExportError(
            f"unknown text_encoder_weights '{text_encoder_weights}': choose int8, or leave it out"
        )
    with (
        BundleWriter(target, overwrite=overwrite) as writer,
        opened(source, single or SingleFile(), writer.folder.parent) as checkpoint,
    ):
        read = _read(
            checkpoint,
            None if prior is None else open_checkpoint(prior),
            thresholding=thresholding,
            image_encoder=image_encoder,
        )
        family = (usage or Usage()).apply(read)
        if step_cache:
            check_cut(checkpoint.config("unet"), step_cache)
        family = replace(family, text_encoder_weights=text_encoder_weights, step_cache=int(step_cache))
        return _export(family, writer, name or Path(target).resolve().name, precision, progress)


def _read(
    checkpoint: Checkpoint, prior: Checkpoint | None, *, thresholding: bool, image_encoder: bool
) -> Family:
    """The checkpoint as what its pipeline says it is."""
    if kandinsky.knows(checkpoint.pipeline):
        return kandinsky.read_family(
            checkpoint, prior, thresholding=thresholding, image_encoder=image_encoder
        )
    for what, given in (("prior", prior is not None), ("image encoder", image_encoder)):
        if given:
            raise ExportError(
                f"the checkpoint is a {checkpoint.pipeline}, which takes no {what}: leave it out"
            )
    reads = kandinsky3.read_family if kandinsky3.knows(checkpoint.pipeline) else read_family
    return reads(checkpoint, thresholding=thresholding)


def _export(
    family: Family,
    writer: BundleWriter,
    name: str,
    precision: str,
    progress: Callable[[Progress], None] | None,
) -> Bundle:
    plans = family.plans(DTYPES[precision])
    stages = _Stages(progress, 3 * len(plans) + 1)
    family.write_files(writer.folder)
    components = {
        part: _export_component(make, part, precision, family, writer.folder, stages)
        for part, make in plans.items()
    }
    stages.enter("seal")
    preview = _fit_preview(writer.folder, components["vae_encoder"], family)
    return writer.commit(_manifest(family, name, precision, components, preview))


def _fit_preview(folder: Path, encoder: Component, family: Family) -> Preview | None:
    """The graph that was just written looks at drawn pictures; it takes no more than its check did."""

    def encode(images: Sequence[Floats]) -> list[NDArray[np.generic]]:
        batches: list[Arrays] = [{"image": image} for image in images]
        made = run_graph(folder / encoder.graph, batches, widen=encoder.precision == "bf16")
        return [next(iter(each.values())) for each in made]  # the mean, or the latents themselves

    return fit_preview(encode, family.latent)


@contextmanager
def opened(source: str, single: SingleFile, place: Path | None = None) -> Iterator[Checkpoint]:
    """The checkpoint at `source`; a single file is unpacked into a folder that goes when the context ends.

    That folder, as large as the file, is made in `place`; None is the system's folder for temporary files,
    which may lie in memory.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        yield open_checkpoint(source)
        return
    with tempfile.TemporaryDirectory(prefix=".allaprima-", suffix=".unpacked", dir=place) as folder:
        unpack(file, Path(folder), single)
        yield open_checkpoint(folder)


class _Stages:
    """Counts stages for the progress callback."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def enter(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(Progress(stage, self.done, self.total))
        self.done += 1


def _export_component(
    make: Callable[[], GraphPlan], part: str, precision: str, family: Family, folder: Path, stages: _Stages
) -> Component:
    stages.enter(f"{part}: load")
    precision = _NAMES[family.dtype(part, DTYPES[precision])]
    plan = make()
    stages.enter(f"{part}: trace")
    graph = f"{part}/model.onnx"
    if plan.shares:  # beside the weights, since a graph cannot refer to those of another folder
        graph = f"{plan.shares}/{part.removeprefix(plan.shares).lstrip('_')}.onnx"
    weights = family.weights(part)
    used = write_graph(plan, folder / graph, int8=weights == "int8")
    overflows = family.overflows(part)
    wide = _beside(graph)
    write_widened(folder / graph, folder / wide, folded=not (overflows and part in family.texts))
    gc.collect()
    stages.enter(f"{part}: check")
    trials = parity.reference(plan, _extents(family))
    errors = parity.check(part, folder / graph, precision, trials, weights)
    return Component(
        graph,
        precision,
        plan.inputs,
        plan.outputs,
        errors,
        overflows,
        weights,
        wide,
        weight_bytes=used if plan.shares else None,
    )


def _beside(graph: str) -> str:
    """Where the same graph in float32 is: float32.onnx for model.onnx, deep-float32.onnx for deep.onnx."""
    path = PurePosixPath(graph)
    return str(path.with_name("float32.onnx" if path.stem == "model" else f"{path.stem}-float32.onnx"))


def _extents(family: Family) -> list[Mapping[str, int]]:
    """Two shapes other than the traced one: without guidance and wide, with guidance, tall and long."""
    side = family.latent.multiple // family.latent.downscale
    return [
        {"B": 1, "G": 1, "H": 2 * side, "W": 3 * side, "L": family.length},
        {"B": 2, "G": 2, "H": 4 * side, "W": side, "L": 3 * family.length},
    ]


def _manifest(
    family: Family,
    name: str,
    precision: str,
    components: Mapping[str, Component],
    preview: Preview | None,
) -> Manifest:
    libraries = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
    return Manifest(
        schema=SCHEMA,
        name=name,
        family=family.name,
        precision=precision,
        components=components,
        tokenizers=family.tokenizers,
        zero_negative=family.zero_negative,
        scheduler=family.scheduler,
        latent=family.latent,
        preview=preview,
        defaults=family.defaults,
        history=HISTORY,
        versions={
            "allaprima": VERSION,
            **{library: importlib.metadata.version(library) for library in libraries},
        },
    )
