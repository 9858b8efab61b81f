"""A checkpoint as the folder that OpenVINO GenAI reads: graphs in OpenVINO's format, their weights in fp16.

It is what optimum-intel writes, which cannot be installed beside our version of transformers: the graphs come
from the same torch modules by the same converter, and have the same operators.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from allaprima.export.graph import GraphPlan

PACKAGES = ("openvino", "openvino-tokenizers", "diffusers", "transformers")
"""What the graphs depend on, beside the checkpoint."""


def write_openvino(checkpoint: Path, folder: Path) -> None:
    """Write text encoders, UNet, image decoder, tokenizers and configurations, one model in memory at a time.

    Needs torch, diffusers, transformers, openvino and openvino_tokenizers. Raises ExportError.
    """
    import torch

    from allaprima.benchmarks.peer_diffusers import silence
    from allaprima.benchmarks.plain_graphs import plain_plans
    from allaprima.export.source import open_checkpoint

    silence()
    opened = open_checkpoint(str(checkpoint))
    for name, plan in plain_plans(opened, torch.float32).items():
        _convert(plan(), folder / name)
        source = "vae" if name == "vae_decoder" else name
        shutil.copy(checkpoint / source / "config.json", folder / name)
    for part in ("tokenizer", "tokenizer_2"):
        if opened.has(part):
            _write_tokenizer(checkpoint / part, folder / part)
    shutil.copytree(checkpoint / "scheduler", folder / "scheduler")
    shutil.copy(checkpoint / "model_index.json", folder)


def _load_weights(module: torch.nn.Module) -> None:
    """Bring weights into memory: they are on disk until then, and the converter's tracer runs the module."""
    import torch

    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            loaded = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
            setattr(owner, name, torch.nn.Parameter(loaded, requires_grad=False))


def _convert(plan: GraphPlan, folder: Path) -> None:
    import openvino
    import torch

    shapes: list[Any] = []
    for name, example in plan.example.items():
        dynamic = plan.axes.get(name, {})
        sizes = [-1 if axis in dynamic else size for axis, size in enumerate(example.shape)]
        shapes.append((name, openvino.PartialShape(sizes)))
    with torch.no_grad(), _quiet():
        _load_weights(plan.module)
        model = openvino.convert_model(plan.module.eval(), example_input=plan.example, input=shapes)
    for name, port in zip(plan.example, model.inputs, strict=True):
        port.get_tensor().set_names({name})
    for spec, port in zip(plan.outputs, model.outputs, strict=True):
        port.get_tensor().set_names({spec.name})
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=True)


def _write_tokenizer(source: Path, folder: Path) -> None:
    import openvino
    import openvino_tokenizers
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(source)
    with _quiet():
        # Without truncation a long prompt would be written past the end of a tensor.
        model = openvino_tokenizers.convert_tokenizer(
            tokenizer, truncation=True, max_length=tokenizer.model_max_length
        )
    openvino.save_model(model, folder / "openvino_tokenizer.xml")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as sink:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
