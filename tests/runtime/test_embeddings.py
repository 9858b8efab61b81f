"""Texts that were encoded before: the encoder does not run again, and the picture is the same to the bit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allaprima.bundle import BackendError, Bundle, TensorSpec
from allaprima.runtime import Pipeline, Session, open_session
from allaprima.runtime.chunks import Chunk
from allaprima.runtime.embeddings import EmbeddingCache
from allaprima.runtime.memory import Tensor
from allaprima.runtime.session import Binding
from allaprima.runtime.sessions.fake import NumpySession
from allaprima.runtime.text_encoder import TextEncoder
from allaprima.runtime.tokenizer import Tokenizer

from .test_cuda import LazyGpu, open_pipeline

PROMPT = "a red circle"


def arrays(value: float, count: int = 4) -> dict[str, Any]:
    return {"states": np.full(count, value, np.float32)}


def test_what_was_put_is_kept_as_a_copy() -> None:
    cache = EmbeddingCache(100)
    given = arrays(1)
    cache.put(("a",), given)
    given["states"][:] = 2
    found = cache.get(("a",))
    assert found is not None
    assert np.array_equal(found["states"], [1, 1, 1, 1])
    assert cache.get(("b",)) is None
    cache.clear()
    assert cache.get(("a",)) is None


def test_the_least_recently_used_goes() -> None:
    cache = EmbeddingCache(3 * 16)
    for key in "abc":
        cache.put((key,), arrays(1))
    cache.get(("a",))
    cache.put(("d",), arrays(1))
    cache.put(("a",), arrays(2, 8))  # twice as large as before, so that it pushes out another
    assert [key for key in "abcd" if cache.get((key,)) is not None] == ["a", "d"]


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    cache = EmbeddingCache(16)
    cache.put(("a",), arrays(1))
    cache.put(("b",), arrays(1, 5))
    assert cache.get(("a",)) is not None
    assert cache.get(("b",)) is None
    none = EmbeddingCache(0)
    none.put(("a",), arrays(1))
    assert none.get(("a",)) is None


class Counted:
    """A session that counts its bindings and runs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.inputs, self.outputs = session.inputs, session.outputs
        self.precision, self.memory = session.precision, session.memory
        self.unload, self.close = session.unload, session.close
        self.binds = self.runs = 0

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        self.binds += 1
        binding, session = self.session.bind(tensors), self

        class Counting:
            def run(self) -> None:
                session.runs += 1
                binding.run()

        return Counting()


@pytest.fixture
def encoder(bundle: Bundle) -> Counted:
    component = bundle.component("text_encoder")
    return Counted(open_session(bundle.path(component.graph), component, "ort", threads=1))


@pytest.fixture
def pipeline(bundle: Bundle, encoder: Counted) -> Iterator[Pipeline]:
    sessions: dict[str, Session] = {"text_encoder": encoder}
    for role in ("denoiser", "vae_decoder"):
        component = bundle.component(role)
        sessions[role] = open_session(bundle.path(component.graph), component, "ort", threads=1)
    with Pipeline(bundle, sessions, backend="ort") as opened:
        yield opened


def paint(pipeline: Pipeline, prompt: str = PROMPT, **options: Any) -> bytes:
    """The latents, which show more than pixels."""
    latents = pipeline.generate(prompt, seed=1, output_type="latent", **options).latents
    assert latents is not None
    return latents.tobytes()


def test_a_prompt_is_encoded_once(pipeline: Pipeline, encoder: Counted) -> None:
    first = paint(pipeline)
    assert paint(pipeline) == first
    paint(pipeline, num_images=3)
    pipeline.unload()  # of weights and buffers
    assert paint(pipeline) == first
    assert (encoder.runs, encoder.binds) == (1, 1)


OTHERS: list[dict[str, Any]] = [
    {"prompt": "a red circl"},
    {"negative_prompt": "dull"},
    {"guidance_scale": 1.0},
    {"prompt": "a (red:1.5) circle", "prompt_weights": True},
    {"prompt": "a (red:0.3) circle", "prompt_weights": True},
    {"prompt": "x " * 90, "long_prompts": True},
    {"prompt": "y " * 90, "long_prompts": True},
]


def test_every_request_gets_its_own(pipeline: Pipeline, encoder: Counted, bundle: Bundle) -> None:
    """To the bit, whatever was encoded before it."""
    with Pipeline.open(bundle.folder, backend="ort", threads=1, embedding_cache=0) as plain:
        wanted = [paint(plain, **request) for request in OTHERS]
    assert len(set(wanted)) == len(OTHERS)
    assert [paint(pipeline, **request) for request in OTHERS] == wanted
    runs = encoder.runs
    assert [paint(pipeline, **request) for request in OTHERS] == wanted
    assert encoder.runs == runs


def test_layers_that_are_skipped_are_part_of_it(bundle: Bundle) -> None:
    width = 6
    inputs = TensorSpec("input_ids", "int64", ("B", 77)), TensorSpec("layer_weights", "float32", ("B", 3))
    outputs = (TensorSpec("last_hidden_state", "float32", ("B", 77, width)),)

    def encode(given: Mapping[str, Any]) -> dict[str, Any]:
        states = given["layer_weights"] @ np.array([1, 2, 3], np.float32)
        return {"last_hidden_state": np.broadcast_to(states[:, None, None], (len(states), 77, width))}

    session = Counted(NumpySession(inputs, outputs, encode))
    cache = EmbeddingCache(1 << 20)
    one, two = (TextEncoder(session, Tokenizer(bundle), cache) for _ in range(2))
    chunk = Chunk(np.arange(77))
    for skip in (0, 1, 0, 1):
        assert one.encode([chunk], [skip]).states.array[0, 0, 0] == 3 - skip
    assert session.runs == 2
    two.encode([chunk], [0])
    assert session.runs == 3  # another encoder's states are not its own


def test_bounded(bundle: Bundle, encoder: Counted) -> None:
    cache = EmbeddingCache(3 * 77 * 6 * 4)
    made = TextEncoder(encoder, Tokenizer(bundle), cache)
    chunks = [Chunk(np.full(77, value)) for value in range(4)]
    for chunk in chunks:
        made.encode([chunk], [0])
    made.encode([chunks[3]], [0])
    assert encoder.runs == 4
    made.encode([chunks[0]], [0])
    assert encoder.runs == 5


def test_not_loaded_for_a_known_prompt(bundle: Bundle) -> None:
    """Within a limit that has no room for it."""
    with Pipeline.open(bundle.folder, backend="ort", threads=1, memory_limit="30MB") as pipeline:
        first = pipeline.generate(PROMPT, seed=1)
        pipeline.unload()
        again = pipeline.generate(PROMPT, seed=1)
        assert first.memory is not None
        assert again.memory is not None
        assert first.memory.loaded == ("text_encoder", "denoiser", "vae_decoder")
        assert again.memory.loaded == ("denoiser", "vae_decoder")
        assert again.images[0].tobytes() == first.images[0].tobytes()


def test_not_a_size(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="embedding_cache is 'much': give bytes"):
        Pipeline.open(bundle.folder, backend="ort", threads=1, embedding_cache="much")


def test_on_a_device(bundle: Bundle, tmp_path: Path) -> None:
    """A new prompt waits for its states, a known one for nothing: what was kept is only handed over."""
    gpu = LazyGpu()
    request: dict[str, Any] = {"num_inference_steps": 5, "height": 64, "width": 32, "seed": 1}
    with open_pipeline(bundle, gpu, tmp_path, embedding_cache=1 << 20) as device:
        waits, pictures = [], []
        for prompt in (PROMPT, PROMPT, "another", PROMPT):
            gpu.waits = 0
            pictures.append(device.generate(prompt, **request).images[0].tobytes())
            waits.append(gpu.waits)
    assert waits == [3, 2, 3, 2]
    assert pictures[0] == pictures[1] == pictures[3] != pictures[2]
    with open_pipeline(bundle, LazyGpu(), tmp_path) as plain:
        assert plain.generate(PROMPT, **request).images[0].tobytes() == pictures[0]
