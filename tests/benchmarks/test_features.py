"""Features by small models of the formats that a user may give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from allaprima.benchmarks.features import BATCH, clip_embeddings, inception_features
from allaprima.benchmarks.fidelity import clip_score
from allaprima.benchmarks.quality import read_picture
from allaprima.bundle import RequestError

TOKENIZER = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint" / "tokenizer"
TEXTS = ["a red circle on a white background", "a blue square"] * 10


def draw(count: int, height: int, width: int) -> list[np.ndarray]:
    """Pictures of noise."""
    return list(np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8))


class Mean(torch.nn.Module):
    """The mean of each channel, [B,3,1,1]."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean((2, 3), keepdim=True)


@pytest.fixture(params=["mean.onnx", "mean.pt"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of features in one of the formats."""
    path: Path = tmp_path / request.param
    if path.suffix == ".pt":
        torch.jit.script(Mean()).save(path)
        return path
    sizes = ["B", 3, "H", "W"], ["B", 3, 1, 1]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip("xy", sizes, strict=True)
    ]
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    graph = helper.make_graph([node], "mean", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_features_of_pictures_of_several_sizes(model: Path) -> None:
    pictures = [*draw(BATCH + 3, 8, 12), *draw(2, 16, 4)]
    found = inception_features(model, pictures)
    assert found.shape == (len(pictures), 3)
    assert np.allclose(found, [each.mean((0, 1)) / 255 for each in pictures], atol=1e-6)


def test_no_pictures(model: Path) -> None:
    with pytest.raises(RequestError, match="no picture"):
        inception_features(model, [])


@pytest.mark.parametrize("name", ["broken.onnx", "broken.pt", "missing.onnx", "model.h5"])
def test_files_that_are_no_model(tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_text("no")
    with pytest.raises(RequestError, match=name):
        inception_features(tmp_path / name, draw(1, 8, 8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**layers, **ids, "vocab_size": len(tokenizer)},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_of_the_model(clip: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{index:02}.png" for index in range(len(TEXTS))]
    for file, pixels in zip(files, draw(len(files), 40, 48), strict=True):
        Image.fromarray(pixels).save(file)
    pictures, texts = clip_embeddings(clip, files, TEXTS, read_picture)
    assert pictures.shape == texts.shape == (len(TEXTS), 8)

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for file, text in zip(files, TEXTS, strict=True):
        inputs = processor(text=[text], images=[Image.open(file)], return_tensors="pt")
        with torch.no_grad():
            made = model(**inputs)
        cosines.append(float(made.logits_per_image / model.logit_scale.detach().exp()))
    assert clip_score(pictures, texts) == pytest.approx(100 * np.mean(cosines), abs=1e-3)


def test_clip_needs_pairs_and_a_model(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="1 pictures and 20 captions"):
        clip_embeddings(clip, [tmp_path / "a.png"], TEXTS, read_picture)
    with pytest.raises(RequestError, match="holds no CLIP"):
        clip_embeddings(tmp_path, [tmp_path / "a.png"], ["a"], read_picture)
