"""The networks are small enough, and the tokenizer reads everything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from allaprima.models.shapes import networks
from allaprima.models.shapes.captions import caption
from allaprima.models.shapes.scenes import draw_scene


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    random = np.random.default_rng(0)
    texts = [caption(draw_scene(random), random) for _ in range(1500)]
    return networks.train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"))


def test_words_of_the_captions_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("A red circle above a blue square") == [
        "a</w>",
        "red</w>",
        "circle</w>",
        "above</w>",
        "a</w>",
        "blue</w>",
        "square</w>",
    ]


@pytest.mark.parametrize("text", ["zebra xylophone", "naïve café", "猫の絵", "🎨!?", "a\tb\nc"])
def test_no_text_is_unknown(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert "".join(tokenizer.decode(ids[1:-1]).split()) == "".join(text.split())


def test_a_saved_tokenizer_is_the_same(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a small disc on the left side of the star, gray backdrop"
    options = {"padding": "max_length", "truncation": True}
    assert again(text, **options).input_ids == tokenizer(text, **options).input_ids
    assert len(again(text * 20, **options).input_ids) == networks.TEXT_LENGTH


def test_sizes(tokenizer: CLIPTokenizer) -> None:
    """At most 16 MB in half precision, and shapes that belong together."""
    text, vae, unet = networks.text_encoder(tokenizer), networks.autoencoder(), networks.unet()
    count = sum(weight.numel() for model in (text, vae, unet) for weight in model.parameters())
    assert 2 * count < 16e6
    with torch.no_grad():
        ids = torch.tensor(tokenizer(["a red star"], padding="max_length").input_ids)
        states = text(ids).last_hidden_state
        latents = vae.encode(torch.zeros(1, 3, 64, 96)).latent_dist.mean
        assert latents.shape == (1, 4, 8, 12)
        assert unet(latents, 999, states).sample.shape == latents.shape
        assert vae.decode(latents).sample.shape == (1, 3, 64, 96)
