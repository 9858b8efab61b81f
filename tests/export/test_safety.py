"""The safety checker: prepared, exported and decided as the reference does it."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from allaprima.bundle import ExportError
from allaprima.export import safety
from allaprima.export.graph import write_graph
from allaprima.export.source import Checkpoint
from allaprima.runtime.safety import SafetySettings, is_flagged
from allaprima.runtime.vision import prepare

SIZE = 32


@pytest.fixture(scope="module")
def model() -> StableDiffusionSafetyChecker:
    """A small one with thresholds that random pictures pass or fail."""
    torch.manual_seed(5)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": SIZE,
        "hidden_act": "quick_gelu",
    }
    made = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        for name in ("special_care_embeds", "concept_embeds"):
            getattr(made, name).copy_(torch.randn_like(getattr(made, name)))
        made.special_care_embeds_weights.copy_(0.2 * torch.randn(3))
        made.concept_embeds_weights.copy_(0.25 + 0.15 * torch.rand(17))
    return made


@pytest.fixture(scope="module")
def checkpoint(model: StableDiffusionSafetyChecker, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checked")
    model.save_pretrained(folder / "safety_checker")
    return Checkpoint(folder, {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]})


@pytest.fixture(scope="module")
def settings(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> SafetySettings:
    path = tmp_path_factory.mktemp("bundle") / "safety_checker" / "settings.json"
    safety.write_settings(checkpoint, path)
    return SafetySettings.from_json(json.loads(path.read_text()))


def pictures(count: int) -> list[Image.Image]:
    """Of many sizes, smooth and coloured, so that their encodings differ."""
    random = np.random.default_rng(2)
    sizes = random.integers(20, 90, (count, 2))
    rough = [random.integers(0, 256, (4, 5, 3), np.uint8) for _ in range(count)]
    return [
        Image.fromarray(each).resize((int(width), int(height)))
        for each, (width, height) in zip(rough, sizes, strict=True)
    ]


def test_prepared_as_clip_does(settings: SafetySettings) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    for picture in pictures(20):
        wanted = processor(picture, return_tensors="np").pixel_values[0]
        assert np.abs(prepare(picture, settings) - wanted).max() < 1e-5


def test_same_decisions(
    model: StableDiffusionSafetyChecker, settings: SafetySettings, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plan = safety.plan(checkpoint, torch.float32)
    path = tmp_path / "safety_checker" / "model.onnx"
    write_graph(plan, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    clip_input = np.stack([prepare(picture, settings) for picture in pictures(200)])
    special, concepts = session.run(["special", "concepts"], {"clip_input": clip_input})
    with torch.no_grad():
        images = np.zeros((200, 2, 2, 3), np.float32)
        _, wanted = model(torch.from_numpy(clip_input), images)
    got = [is_flagged(one, two, settings) for one, two in zip(special, concepts, strict=True)]
    assert 20 < sum(wanted) < 180  # or the comparison would tell nothing
    assert got == wanted


def test_rounding_and_special_care() -> None:
    settings = SafetySettings(SIZE, (0.0,) * 3, (1.0,) * 3, special=(0.5, 0.5), concepts=(0.3,))
    for special, concept, flagged in [
        ((0.0, 0.0), 0.3004, False),  # rounds to nothing
        ((0.0, 0.0), 0.3006, True),
        ((0.9, 0.0), 0.295, True),  # a special concept lowers the threshold by 0.01
        ((0.0, 0.0), 0.295, False),
        ((0.9, 0.9), 0.285, False),  # but once only
    ]:
        arrays = np.array(special, np.float32), np.array([concept], np.float32)
        assert is_flagged(*arrays, settings) == flagged


def test_checkpoints_without_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert safety.has_safety_checker(checkpoint)
    assert not safety.has_safety_checker(Checkpoint(checkpoint.folder, {"safety_checker": [None, None]}))
    assert not safety.has_safety_checker(Checkpoint(checkpoint.folder, {}))
    assert not safety.has_safety_checker(Checkpoint(tmp_path, checkpoint.index))
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"the safety checker in .* is not usable"):
        safety.write_settings(Checkpoint(tmp_path, checkpoint.index), tmp_path / "settings.json")
