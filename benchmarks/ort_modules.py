"""ONNX graphs in the place of torch modules, so that a pipeline of diffusers runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


class Graph:
    """A session on the CPU or on the first GPU. `fixed` gives the shapes of inputs that never change."""

    def __init__(self, path: Path, threads: int, *, gpu: bool, fixed: Mapping[str, Shape]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # as in ours
        for name, size in _free_dimensions(path, fixed).items():
            options.add_free_dimension_override_by_name(name, size)
        providers: list[Any] = ["CPUExecutionProvider"]
        if gpu:
            onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "EXHAUSTIVE"}))
        self._session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
        if gpu and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeError("onnxruntime cannot load its CUDAExecutionProvider, and would run on the CPU")
        self._gpu = gpu
        self._types = {each.name: each.type for each in self._session.get_inputs()}

    @property
    def dtype(self) -> torch.dtype:
        """Of floating-point inputs."""
        return torch.float16 if "tensor(float16)" in self._types.values() else torch.float32

    def run(self, shape: Shape | None, **feeds: Tensor) -> list[Tensor]:
        """All outputs; on a GPU the only one, of a shape that must be known, stays on it."""
        feeds = {
            name: (value.to(self.dtype) if value.is_floating_point() else value).contiguous()
            for name, value in feeds.items()
        }
        if self._gpu and shape is not None:
            return [self._run_on_device(shape, feeds)]
        device = next(iter(feeds.values())).device
        arrays = {name: value.cpu().numpy() for name, value in feeds.items()}
        return [torch.from_numpy(made).to(device) for made in self._session.run(None, arrays)]

    def _run_on_device(self, shape: Shape, feeds: Mapping[str, Tensor]) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device="cuda")
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_input(name, "cuda", 0, _numpy_type(value), value.shape, value.data_ptr())
        output = self._session.get_outputs()[0].name
        binding.bind_output(output, "cuda", 0, _numpy_type(made), shape, made.data_ptr())
        torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        self._session.run_with_iobinding(binding)
        return made


def _free_dimensions(path: Path, fixed: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes of the graph's named dimensions."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    return {
        dimension.dim_param: fixed[value.name][axis]
        for value in inputs
        if value.name in fixed
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim)
        if dimension.dim_param
    }


def _numpy_type(tensor: Tensor) -> type[np.generic]:
    return np.dtype(str(tensor.dtype).removeprefix("torch.")).type


class Part(torch.nn.Module):
    """What a pipeline asks of any of its modules."""

    def __init__(self, graph: Graph, config: Any, device: torch.device) -> None:
        super().__init__()
        self.graph, self.config, self.device = graph, config, device

    @property
    def dtype(self) -> torch.dtype:
        """Of what it takes."""
        return self.graph.dtype


class States(tuple[Tensor, ...]):
    """What a text encoder gives, by place and by name."""

    @property
    def hidden_states(self) -> Sequence[Tensor]:
        """SDXL's graphs give two other tensors first."""
        return self[2:]


class TextPart(Part):
    """See plain_graphs.PlainTextEncoder."""

    dtype = torch.float32

    def forward(self, input_ids: Tensor, **_: Any) -> States:
        """All outputs."""
        return States(self.graph.run(None, input_ids=input_ids))


class UNetPart(Part):
    """See plain_graphs.PlainUNet."""

    def __init__(self, graph: Graph, config: Any, device: torch.device) -> None:
        super().__init__(graph, config, device)
        width = getattr(config, "projection_class_embeddings_input_dim", None)
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """One call."""
        states, added = encoder_hidden_states, dict(added_cond_kwargs or {})
        time = timestep.reshape(1).to(torch.int64)
        made = self.graph.run(
            tuple(sample.shape), sample=sample, timestep=time, encoder_hidden_states=states, **added
        )
        return (made[0].to(sample.dtype),)


class DecoderPart(Part):
    """See plain_graphs.PlainDecoder."""

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        """[B,C,H,W] to [B,3,height,width]."""
        scale = 2 ** (len(self.config.block_out_channels) - 1)
        batch, _channels, height, width = latents.shape
        return (self.graph.run((batch, 3, scale * height, scale * width), latent_sample=latents)[0],)


def assemble(
    checkpoint: Path,
    folder: Path,
    shape: tuple[int, int, int] | None,
    branches: int,
    threads: int,
    *,
    gpu: bool,
) -> Any:
    """diffusers' pipeline of a checkpoint around the graphs in `folder`.

    The UNet's and the decoder's are made for `shape`: batch, width and height, None for any; `branches` is 2
    with guidance.
    """
    import diffusers
    import transformers

    index = diffusers.DiffusionPipeline.load_config(checkpoint)
    unet, vae = (_empty(getattr(diffusers, index[part][1]), checkpoint / part) for part in ("unet", "vae"))
    fixed: dict[str, dict[str, Shape]] = {}
    if shape is not None:
        batch, width, height = shape
        scale = 2 ** (len(vae.block_out_channels) - 1)
        latent = (vae.latent_channels, height // scale, width // scale)
        fixed = {
            "unet": {"sample": (batch * branches, *latent)},
            "vae_decoder": {"latent_sample": (batch, *latent)},
        }
    device = torch.device("cuda" if gpu else "cpu")

    def part(kind: type[Part], name: str, config: Any) -> Part:
        path = folder / name / "model.onnx"
        return kind(Graph(path, threads, gpu=gpu, fixed=fixed.get(name, {})), config, device)

    components: dict[str, Any] = {
        "unet": part(UNetPart, "unet", unet),
        "vae": part(DecoderPart, "vae_decoder", vae),
        "scheduler": getattr(diffusers, index["scheduler"][1]).from_pretrained(checkpoint / "scheduler"),
    }
    for suffix in ("", "_2") if "text_encoder_2" in index else ("",):
        config = transformers.CLIPTextConfig.from_pretrained(checkpoint / f"text_encoder{suffix}")
        components[f"text_encoder{suffix}"] = part(TextPart, f"text_encoder{suffix}", config)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint / f"tokenizer{suffix}")
        components[f"tokenizer{suffix}"] = tokenizer
    if "text_encoder_2" in index:
        components["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    else:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, index["_class_name"])(**components)


def _empty(kind: Any, folder: Path) -> Any:
    """The configuration of a model with all defaults; no weights are loaded."""
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder)).config
