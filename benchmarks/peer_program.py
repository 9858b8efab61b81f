"""A small program that paints with a library which cannot be installed beside ours.

It runs in any interpreter that has the library, and imports nothing of ours:

    python peer_program.py KIND OPTIONS

Its first line says that it is ready. Each line of its input then asks for pictures, and each line of its
output answers: JSON, followed by as many bytes of pixels as its shape says. A mistake is answered with its
reason.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

Options = Mapping[str, Any]
Paint = Callable[[Options], Any]
"""From a request to uint8 pictures [batch, height, width, 3]."""


def open_optimum_onnx(options: Options) -> Paint:
    """optimum's pipeline on ONNX Runtime."""
    import onnxruntime
    import optimum.onnxruntime as optimum
    import torch

    torch.set_num_threads(1)
    session = onnxruntime.SessionOptions()
    session.add_session_config_entry("session.force_spinning_stop", "1")  # as in ours
    session.intra_op_num_threads = options["threads"]
    kind = getattr(optimum, "ORT" + _pipeline(options["folder"]))
    pipeline = kind.from_pretrained(options["folder"], session_options=session)
    return _paint_with_diffusers(pipeline, options)


def open_optimum_intel(options: Options) -> Paint:
    """optimum's pipeline on OpenVINO, compiled for the shape that a request fixes, if any."""
    import optimum.intel as intel
    import torch

    torch.set_num_threads(1)
    kind = getattr(intel, "OV" + _pipeline(options["folder"]))
    config = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[options["precision"]],
        "INFERENCE_NUM_THREADS": options["threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    shape: Any = ()
    paint: Paint | None = None

    def painted(request: Options) -> Any:
        nonlocal shape, paint
        if paint is None or request["fixed"] != shape:
            shape, paint = request["fixed"], None  # before another takes its place in memory
            pipeline = kind.from_pretrained(options["folder"], compile=False, ov_config=config)
            if shape is not None:
                batch, width, height = shape
                pipeline.reshape(1, height, width, num_images_per_prompt=batch)
            pipeline.compile()
            paint = _paint_with_diffusers(pipeline, options)
        return paint(request)

    return painted


def open_stable_diffusion_cpp(options: Options) -> Paint:
    """stable-diffusion.cpp, with the noise of torch and the sigmas that it is told."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=options["folder"],
        n_threads=options["threads"],
        wtype=options["precision"],
        rng_type="cpu",
        sampler_rng_type="cpu",
        prediction=options["prediction"],
        vae_decode_only=True,
        verbose=False,
    )

    def paint(request: Options) -> Any:
        images = []
        # One after the other: a batch is that inside too, but with another stream of noise.
        for index in range(request["batch"]):
            images += model.generate_image(
                prompt=request["prompt"],
                width=request["width"],
                height=request["height"],
                cfg_scale=options["guidance_scale"],
                sample_method=options["sampler"],
                sample_steps=request["steps"],
                sigmas=",".join(f"{sigma:.9g}" for sigma in request["sigmas"]) if request["sigmas"] else None,
                seed=request["seed"] + index,
            )
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    return paint


def _paint_with_diffusers(pipeline: Any, options: Options) -> Paint:
    import diffusers
    import torch

    pipeline.set_progress_bar_config(disable=True)
    if options["scheduler"] is not None:
        kind = getattr(diffusers, options["scheduler"])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options["overrides"])

    def paint(request: Options) -> Any:
        size = [request[side] // pipeline.vae_scale_factor for side in ("height", "width")]
        seeds = range(request["seed"], request["seed"] + request["batch"])
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        drawn = [torch.randn((1, options["channels"], *size), generator=each) for each in generators]
        return pipeline(
            request["prompt"],
            num_inference_steps=request["steps"],
            guidance_scale=options["guidance_scale"],
            height=request["height"],
            width=request["width"],
            num_images_per_prompt=request["batch"],
            latents=torch.cat(drawn),
            generator=generators,
            output_type="np",
        ).images

    def rounded(request: Options) -> Any:
        return np.round(np.asarray(paint(request)) * 255).astype(np.uint8)

    return rounded


def export_optimum_onnx(source: str, folder: str) -> None:
    """A checkpoint as optimum's ONNX folder, in fp32."""
    import optimum.onnxruntime as onnxruntime

    kind = getattr(onnxruntime, "ORT" + _pipeline(source))
    kind.from_pretrained(source, export=True).save_pretrained(folder)


def export_optimum_intel(source: str, folder: str) -> None:
    """A checkpoint as optimum's OpenVINO folder, weights in fp16."""
    import optimum.intel as intel

    kind = getattr(intel, "OV" + _pipeline(source))
    kind.from_pretrained(source, export=True, compile=False, load_in_8bit=False).save_pretrained(folder)


def _pipeline(folder: str) -> str:
    """The class that a folder's index names, without optimum's prefix."""
    with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
        return str(json.load(file)["_class_name"]).removeprefix("ORT").removeprefix("OV")


OPEN: dict[str, Callable[[Options], Paint]] = {
    "optimum-onnx": open_optimum_onnx,
    "optimum-intel": open_optimum_intel,
    "stable-diffusion-cpp": open_stable_diffusion_cpp,
}
EXPORT: dict[str, Callable[[str, str], None]] = {
    "optimum-onnx": export_optimum_onnx,
    "optimum-intel": export_optimum_intel,
}


@contextmanager
def _answers() -> Iterator[BinaryIO]:
    """The program's output for answers alone: what libraries print goes where errors go."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        yield answers


def _say(answers: BinaryIO, message: Options, pixels: bytes = b"") -> None:
    answers.write(json.dumps(message).encode() + b"\n" + pixels)
    answers.flush()


def _answer(paint: Paint, line: bytes) -> tuple[Options, bytes]:
    pictures = np.ascontiguousarray(paint(json.loads(line)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"shape": pictures.shape, "memory": memory}, pictures.tobytes()


def _requests() -> Iterator[bytes]:
    """The lines of the input as they come.

    When it ends nobody is there any more: then the process ends too, in the middle of a picture, since who
    asked for it was stopped.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # Unbuffered: an interpreter that ends cannot take a buffer from a thread that waits for more.
        with open(0, "rb", buffering=0, closefd=False) as given:
            for line in given:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return iter(lines.get, None)


def main() -> None:
    """Export and end, or paint until the input ends."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    requests = _requests()
    with _answers() as answers:
        try:
            if "export" in options:
                EXPORT[kind](options["export"], options["folder"])
                _say(answers, {"ready": True})
                return
            paint = OPEN[kind](options)
            _say(answers, {"ready": True})
            for line in requests:
                _say(answers, *_answer(paint, line))
        except Exception as error:  # whatever a library raises is the answer
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
