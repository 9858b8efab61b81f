"""A bundle that obeys the contract with graphs of a few nodes, so that a test can know every pixel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from allaprima.bundle import (
    SCHEMA,
    Bundle,
    BundleWriter,
    Component,
    Defaults,
    Latent,
    Manifest,
    TensorSpec,
    TokenizerSpec,
)

BOS, EOS, LENGTH, WIDTH, HISTORY = 512, 513, 77, 6, 4
HEADER = '<ir_version: 10, opset_import: ["" : 23]>'

# last_hidden_state = sin(ids * weights)
TEXT_ENCODER = """
text_encoder (int64[B, 77] input_ids) => (float[B, 77, 6] last_hidden_state)
<float[6] weights = {0.001, 0.002, 0.003, 0.004, 0.005, 0.006}> {
    ids = Cast <to = 1> (input_ids)
    axis = Constant <value_ints = [2]> ()
    column = Unsqueeze (ids, axis)
    phase = Mul (column, weights)
    last_hidden_state = Sin (phase)
}
"""

# The UNet is tanh(0.1 * scaled + encoder_hidden_states[:, 2, 4] + timestep / 1000): one number of a condition
# only, because the last bit of a sum over all of it would depend on the number of lanes.
DENOISER = """
denoiser (
    float[B, 4, H, W] sample, float[4, B, 4, H, W] history, float[B, 4, H, W] noise, float[B] timestep,
    float[B] input_scale, float[G, B] guidance, float[B, 2] to_prediction, float[B] bounds,
    float[B, 8] update, float[GB, L, D] encoder_hidden_states
) => (float[B, 4, H, W] next_sample, float[4, B, 4, H, W] next_history)
<float tenth = {0.1}, float thousand = {1000}> {
    per_lane = Constant <value_ints = [-1, 1, 1, 1]> ()
    scale = Reshape (input_scale, per_lane)
    scaled = Mul (sample, scale)
    small = Mul (scaled, tenth)
    time = Div (timestep, thousand)
    time_4d = Reshape (time, per_lane)
    timed = Add (small, time_4d)
    from = Constant <value_ints = [2, 4]> ()
    to = Constant <value_ints = [3, 5]> ()
    inner = Constant <value_ints = [1, 2]> ()
    one = Slice (encoder_hidden_states, from, to, inner)
    branches = Shape (guidance)
    ones = Constant <value_ints = [1, 1, 1]> ()
    per_branch = Concat <axis = 0> (branches, ones)
    condition = Reshape (one, per_branch)
    summed = Add (timed, condition)
    outputs = Tanh (summed)
    weights = Reshape (guidance, per_branch)
    weighted = Mul (outputs, weights)
    first = Constant <value_ints = [0]> ()
    output = ReduceSum <keepdims = 0> (weighted, first)

    columns = Constant <value_ints = [1]> ()
    p, q = Split <axis = 1, num_outputs = 2> (to_prediction)
    p_4d = Reshape (p, per_lane)
    q_4d = Reshape (q, per_lane)
    from_sample = Mul (p_4d, sample)
    from_output = Mul (q_4d, output)
    unbound = Add (from_sample, from_output)
    high = Reshape (bounds, per_lane)
    low = Neg (high)
    below = Min (unbound, high)
    prediction = Max (below, low)

    u0, u1, u2, u3, u7 = Split <axis = 1> (update, widths)
    u0_4d = Reshape (u0, per_lane)
    u1_4d = Reshape (u1, per_lane)
    u2_4d = Reshape (u2, per_lane)
    kept = Mul (u0_4d, sample)
    moved = Mul (u1_4d, prediction)
    noised = Mul (u2_4d, noise)
    turned = Transpose <perm = [1, 0]> (u3)
    last = Constant <value_ints = [2, 3, 4]> ()
    slots = Unsqueeze (turned, last)
    recalled = Mul (slots, history)
    memory = ReduceSum <keepdims = 0> (recalled, first)
    u7_4d = Reshape (u7, per_lane)
    rest = Mul (u7_4d, unbound)
    next_sample = Sum (kept, moved, noised, memory, rest)

    newest = Unsqueeze (prediction, first)
    three = Constant <value_ints = [3]> ()
    older = Slice (history, first, three, first)
    next_history = Concat <axis = 0> (newest, older)
}
""".replace("<float tenth", "<int64[5] widths = {1, 1, 1, 4, 1}, float tenth")

# Every pixel of a block of 8 x 8 is round(255 * (latent / 2 + 0.5)) of the first three channels.
VAE_DECODER = """
vae_decoder (float[B, 4, H, W] sample) => (uint8[B, height, width, 3] image)
<float[4] scales = {1, 1, 8, 8}, float half = {0.5}, float top = {255}, float zero = {0}> {
    start = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [3]> ()
    axis = Constant <value_ints = [1]> ()
    colours = Slice (sample, start, end, axis)
    large = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (colours, , scales)
    halved = Mul (large, half)
    shifted = Add (halved, half)
    bytes = Mul (shifted, top)
    rounded = Round (bytes)
    clipped = Clip (rounded, zero, top)
    turned = Transpose <perm = [0, 2, 3, 1]> (clipped)
    image = Cast <to = 2> (turned)
}
"""

SPECS: Mapping[str, tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    "text_encoder": (
        TEXT_ENCODER,
        (TensorSpec("input_ids", "int64", ("B", LENGTH)),),
        (TensorSpec("last_hidden_state", "float32", ("B", LENGTH, WIDTH)),),
    ),
    "denoiser": (
        DENOISER,
        (
            TensorSpec("sample", "float32", ("B", 4, "H", "W")),
            TensorSpec("history", "float32", (HISTORY, "B", 4, "H", "W")),
            TensorSpec("noise", "float32", ("B", 4, "H", "W")),
            TensorSpec("timestep", "float32", ("B",)),
            TensorSpec("input_scale", "float32", ("B",)),
            TensorSpec("guidance", "float32", ("G", "B")),
            TensorSpec("to_prediction", "float32", ("B", 2)),
            TensorSpec("bounds", "float32", ("B",)),
            TensorSpec("update", "float32", ("B", 4 + HISTORY)),
            TensorSpec("encoder_hidden_states", "float32", ("G*B", "L", WIDTH)),
        ),
        (
            TensorSpec("next_sample", "float32", ("B", 4, "H", "W")),
            TensorSpec("next_history", "float32", (HISTORY, "B", 4, "H", "W")),
        ),
    ),
    "vae_decoder": (
        VAE_DECODER,
        (TensorSpec("sample", "float32", ("B", 4, "H", "W")),),
        (TensorSpec("image", "uint8", ("B", "8*H", "8*W", 3)),),
    ),
}

SCHEDULER: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_tokenizer() -> tokenizers.Tokenizer:
    """CLIP's tokenizer with the 256 bytes, alone and at the end of a word, instead of a real vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [],
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


@pytest.fixture
def manifest() -> Manifest:
    """What a writer is given: no files yet."""
    components = {
        role: Component(f"{role}/model.onnx", "fp32", inputs, outputs, ())
        for role, (_, inputs, outputs) in SPECS.items()
    }
    return Manifest(
        schema=SCHEMA,
        name="tiny",
        family="stable-diffusion",
        precision="fp32",
        components=components,
        tokenizers={"text_encoder": TokenizerSpec("tokenizer/tokenizer.json", LENGTH, BOS, EOS, EOS)},
        zero_negative=False,
        scheduler=SCHEDULER,
        latent=Latent(channels=4, downscale=8, multiple=32),
        preview=None,
        defaults=Defaults(height=64, width=32, num_inference_steps=4, guidance_scale=3.0),
        history=HISTORY,
        versions={"test": "1"},
    )


@pytest.fixture
def bundle(manifest: Manifest, tmp_path: Path) -> Bundle:
    """The manifest's bundle on disk."""
    with BundleWriter(tmp_path / "tiny") as writer:
        for role, (text, _, _) in SPECS.items():
            model = onnx.parser.parse_model(HEADER + text)
            onnx.checker.check_model(model, full_check=True)
            (writer.folder / role).mkdir()
            onnx.save(model, writer.folder / role / "model.onnx")
        (writer.folder / "tokenizer").mkdir()
        make_tokenizer().save(str(writer.folder / manifest.tokenizers["text_encoder"].file))
        return writer.commit(manifest)


@pytest.fixture
def hidden_states() -> Any:
    """The text encoder as a function of the ids [77]: [77,6] in float64."""
    weights = np.arange(1, WIDTH + 1) / 1000
    return lambda ids: np.sin(ids[:, None] * weights)
