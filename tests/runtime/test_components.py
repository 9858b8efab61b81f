"""Components within a limit: who is loaded when, who makes room, and pictures that do not mind."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allaprima.bundle import BackendError, Bundle, RequestError, TensorSpec
from allaprima.runtime import Pipeline, Progress, Session, open_session
from allaprima.runtime.components import Components, HeldSession
from allaprima.runtime.footprint import Footprint
from allaprima.runtime.memory import HostMemory, Tensor, on_host
from allaprima.runtime.session import Binding
from allaprima.runtime.sessions.fake import NumpySession

PROMPT = "a red circle"
MB = 10**6
WEIGHTS = {"text_encoder": 600 * MB, "denoiser": 800 * MB, "vae_decoder": 500 * MB, "vae_encoder": 700 * MB}
LIMIT = 1500 * MB
"""Room for the text encoder and the denoiser, or for the denoiser and the decoder, not for all three."""


class Counted:
    """A session that notes in a log when its weights come and go."""

    def __init__(self, role: str, session: Session, log: list[str]) -> None:
        self.role, self.session, self.log = role, session, log
        self.inputs, self.outputs = session.inputs, session.outputs
        self.precision, self.memory = session.precision, session.memory
        self.loaded = False

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        if not self.loaded:
            self.log.append(f"+{self.role}")
        self.loaded = True
        return self.session.bind(tensors)

    def unload(self) -> None:
        if self.loaded:
            self.log.append(f"-{self.role}")
        self.loaded = False
        self.session.unload()

    def close(self) -> None:
        self.unload()
        self.session.close()


Opens = Callable[..., Pipeline]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def opens(bundle: Bundle, log: list[str]) -> Iterator[Opens]:
    """Opens the tiny bundle with sessions that keep a log."""
    pipelines = []

    def make(limit: int | None = None, **options: Any) -> Pipeline:
        sessions = {
            role: Counted(role, open_session(bundle.path(each.graph), each, "ort", threads=1), log)
            for role, each in bundle.manifest.components.items()
        }
        options = {"memory_limit": limit, "weigh": weigh, "embedding_cache": 0, **options}
        pipelines.append(Pipeline(bundle, sessions, backend="ort", **options))
        return pipelines[-1]

    yield make
    for pipeline in pipelines:
        pipeline.close()


def weigh(role: str) -> Footprint:
    return Footprint(WEIGHTS[role], WEIGHTS[role])


def paint(pipeline: Pipeline, prompt: str = PROMPT, **options: Any) -> list[bytes]:
    result = pipeline.generate(prompt, seed=1, **options)
    return [image.tobytes() for image in result.images]


REQUESTS: list[dict[str, Any]] = [
    {},
    {"num_images": 2, "sampler": "euler_a"},
    {"height": 32, "width": 64, "guidance_scale": 1.0},
    {"long_prompts": True, "prompt": "x " * 90},
    {},
]


@pytest.mark.parametrize("limit", [2000 * MB, LIMIT, 900 * MB])
def test_pictures_are_the_same(opens: Opens, limit: int) -> None:
    free, limited = opens(), opens(limit)
    for request in REQUESTS:
        assert paint(limited, **request) == paint(free, **request)


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_real_model_one_component_at_a_time(backend: str) -> None:
    request: dict[str, Any] = {"num_inference_steps": 3, "seed": 4, "num_images": 2}
    with Pipeline.open("shapes", backend=backend, threads=1, memory_limit="1TB") as pipeline:
        roomy = pipeline.generate(PROMPT, **request)
    assert roomy.memory is not None
    limit = max(roomy.memory.components.values())
    with Pipeline.open(
        "shapes", backend=backend, threads=1, memory_limit=limit, embedding_cache=0
    ) as pipeline:
        results = [pipeline.generate(PROMPT, **request) for _ in range(2)]
    for result in results:
        assert result.memory is not None
        assert result.memory.peak <= limit
        assert result.memory.unloaded
        assert [image.tobytes() for image in result.images] == [image.tobytes() for image in roomy.images]


def test_with_room_for_all_nothing_goes(opens: Opens, log: list[str]) -> None:
    pipeline = opens(5000 * MB)
    assert log == []  # lazily
    memory = pipeline.generate(PROMPT).memory
    assert memory is not None
    assert memory.loaded == ("text_encoder", "denoiser", "vae_decoder")
    assert memory.unloaded == ()
    assert 1900 * MB < memory.peak <= memory.limit == 5000 * MB
    again = pipeline.generate("another").memory
    assert again is not None
    assert (again.loaded, again.unloaded) == ((), ())
    assert again.peak >= memory.peak
    assert log == ["+text_encoder", "+denoiser", "+vae_decoder"]


def test_the_least_recently_used_makes_room(opens: Opens, log: list[str]) -> None:
    pipeline = opens(LIMIT)
    memory = pipeline.generate(PROMPT).memory
    assert log == ["+text_encoder", "+denoiser", "-text_encoder", "+vae_decoder"]
    assert memory is not None
    assert memory.loaded == ("text_encoder", "denoiser", "vae_decoder")
    assert memory.unloaded == ("text_encoder",)
    assert sorted(memory.components) == ["denoiser", "text_encoder", "vae_decoder"]
    assert all(size >= WEIGHTS[role] for role, size in memory.components.items())
    assert memory.peak <= LIMIT
    assert memory.seconds > 0
    log.clear()
    pipeline.generate(PROMPT)  # the denoiser was used before the decoder, so it goes first
    assert log == ["-denoiser", "+text_encoder", "-vae_decoder", "+denoiser", "-text_encoder", "+vae_decoder"]


def test_one_at_a_time(opens: Opens, log: list[str]) -> None:
    pipeline = opens(900 * MB)
    pipeline.generate(PROMPT, num_inference_steps=5, num_images=2)
    assert log == ["+text_encoder", "-text_encoder", "+denoiser", "-denoiser", "+vae_decoder"]


def test_what_is_let_go_of_is_gone(opens: Opens, bundle: Bundle) -> None:
    """No buffer or binding keeps a graph that was unloaded."""
    with Pipeline.open(bundle.folder, backend="ort", threads=1, memory_limit="2GB") as pipeline:
        sessions = vars(pipeline)["_components"].sessions
        readers = {role: vars(vars(each)["_session"])["_opened"] for role, each in sessions.items()}
        assert all(vars(each)["_session"] is None for each in readers.values())
        pipeline.generate(PROMPT)
        graphs = {role: weakref.ref(each.get()) for role, each in readers.items()}
        sessions["text_encoder"].unload()
        assert graphs["text_encoder"]() is None
        assert graphs["denoiser"]() is not None
        pipeline.unload()
        gc.collect()
        assert not any(graph() for graph in graphs.values())
        pipeline.generate(PROMPT)


def test_the_picture_encoder_too(opens: Opens, bundle: Bundle, log: list[str]) -> None:
    shape = ("B", 4, "H", "W")
    specs = (
        (TensorSpec("image", "float32", ("B", 3, "height", "width")),),
        (TensorSpec("mean", "float32", shape), TensorSpec("deviation", "float32", shape)),
    )

    def encode(_: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(("mean", "deviation"), np.full((1, 4, 8, 4), 0.5, np.float32))

    def make(role: str) -> Session:
        assert role == "vae_encoder"
        return Counted(role, NumpySession(*specs, encode), log)

    image = Image.new("RGB", (32, 64))
    wanted = paint(opens(opens=make), image=image)
    log.clear()
    assert paint(opens(900 * MB, opens=make), image=image) == wanted
    assert log[:3] == ["+vae_encoder", "-vae_encoder", "+text_encoder"]


def test_a_limit_below_the_largest(opens: Opens, bundle: Bundle) -> None:
    with pytest.raises(
        BackendError,
        match=r"the denoiser needs about 800\.0 MB, more than the memory limit of 700\.0 MB: raise it, take",
    ):
        opens(700 * MB)
    with pytest.raises(BackendError, match=r"the \w+ needs about .* limit of 1\.0 kB"):
        Pipeline.open(bundle.folder, backend="ort", threads=1, memory_limit="1kB")


def test_a_picture_too_large_for_the_limit(opens: Opens, log: list[str]) -> None:
    """Told before anything is painted, though the decoder comes last."""
    pipeline = opens(900 * MB)
    with pytest.raises(
        BackendError, match=r"of it for pictures of this size, .* raise it, ask for fewer or smaller pictures"
    ):
        pipeline.generate(PROMPT, height=512, width=512)
    assert log == []
    pipeline.generate(PROMPT)


@pytest.mark.parametrize("value", ["", "8 XB", "GB", "-1", -1, 1.5, "1e9", True])
def test_not_a_limit(bundle: Bundle, value: Any) -> None:
    with pytest.raises(BackendError, match=r"memory_limit is .*: give bytes, or a text such as '8GB'"):
        Pipeline.open(bundle.folder, backend="ort", threads=1, memory_limit=value)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_stopped_anywhere(opens: Opens, stage: str) -> None:
    pipeline = opens(900 * MB)
    wanted = paint(pipeline)

    def stop(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate("another", callback=stop)
    assert paint(pipeline) == wanted


def test_stopping_before_the_next_is_loaded(opens: Opens, log: list[str]) -> None:
    pipeline = opens(900 * MB)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPT, callback=stop)
    assert log == ["+text_encoder"]


def test_a_load_that_fails(opens: Opens, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = opens(LIMIT)
    wanted = paint(opens())
    log.clear()

    def refuse(*_: object) -> None:
        raise BackendError("the disk is gone")

    with monkeypatch.context() as patch:
        session = vars(vars(pipeline)["_components"].sessions["denoiser"])["_session"]
        patch.setattr(session, "session", type("Broken", (), {"bind": refuse, "unload": lambda self: None})())
        with pytest.raises(BackendError, match="the disk is gone"):
            pipeline.generate(PROMPT)
    assert log == ["+text_encoder", "+denoiser", "-denoiser"]
    assert paint(pipeline) == wanted


def test_closed(opens: Opens, log: list[str]) -> None:
    pipeline = opens(LIMIT)
    pipeline.generate(PROMPT)
    pipeline.close()
    assert sorted(log) == sorted(
        ["+text_encoder", "+denoiser", "+vae_decoder", "-text_encoder", "-denoiser", "-vae_decoder"]
    )
    with pytest.raises(BackendError, match="closed"):
        pipeline.generate(PROMPT)


SPECS = (TensorSpec("x", "float32", ("B",)),), (TensorSpec("y", "float32", ("B",)),)


def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": 2 * inputs["x"]}


def bound(session: Session, count: int = 3) -> tuple[Binding, Any]:
    arrays = {"x": np.arange(count, dtype=np.float32), "y": np.zeros(count, np.float32)}
    return session.bind(on_host(arrays)), arrays["y"]


def make_components(log: list[str], limit: int | None, weights: Mapping[str, int]) -> Components:
    sessions = {role: Counted(role, NumpySession(*SPECS, double), log) for role in weights}
    return Components(sessions, limit=limit, weigh=lambda role: Footprint(weights[role], weights[role]))


def test_order_is_that_of_use(log: list[str]) -> None:
    """Not that of loading, nor of binding."""
    components = make_components(log, 380, dict.fromkeys("abcd", 100))
    bindings = {role: bound(components.sessions[role]) for role in "dcba"}
    for role in "abc":
        bindings[role][0].run()
    bindings["a"][0].run()
    bindings["d"][0].run()
    bindings["b"][0].run()
    assert log == ["+a", "+b", "+c", "-b", "+d", "-c", "+b"]
    assert all(np.array_equal(y, [0, 2, 4]) for role, (_, y) in bindings.items() if role != "c")
    report = components.report()
    assert report is not None
    assert report.unloaded == ("b", "c")


def test_what_is_bound_counts(log: list[str]) -> None:
    """While it is bound, and no longer."""
    components = make_components(log, 300, dict.fromkeys("ab", 100))
    (a, _), (b, _) = (bound(components.sessions[role]) for role in "ab")
    a.run()
    b.run()
    held = components.sessions["a"]
    assert isinstance(held, HeldSession)
    assert held.held == 100 + 2 * 3 * 4
    large, _ = bound(held, 9)
    large.run()
    assert (held.held, log) == (100 + 2 * 12 * 4, ["+a", "+b", "-b"])
    del large
    assert held.held == 100 + 2 * 3 * 4


def test_a_device_finishes_before_weights_go(log: list[str]) -> None:
    class Device(HostMemory):
        def synchronize(self) -> None:
            log.append("waited")

    components = make_components(log, 150, dict.fromkeys("ab", 100))
    for held in components.sessions.values():
        assert isinstance(held, HeldSession)
        held.memory = Device()
    bound(components.sessions["a"])[0].run()
    bound(components.sessions["b"])[0].run()
    assert log == ["+a", "waited", "-a", "+b"]


def test_streamed_weights_need_not_fit(log: list[str]) -> None:
    sessions = {role: Counted(role, NumpySession(*SPECS, double), log) for role in "ab"}
    sizes = {"a": Footprint(10_000, 0), "b": Footprint(100, 100)}
    components = Components(sessions, limit=300, weigh=sizes.__getitem__)
    for role in "bab":
        bound(components.sessions[role])[0].run()
    assert log == ["+b", "-b", "+a", "-a", "+b"]


def test_without_a_limit_sessions_are_the_backends_own(log: list[str]) -> None:
    components = make_components(log, None, {"a": 100})
    assert isinstance(components.sessions["a"], Counted)
    assert components.report() is None
    with pytest.raises(RequestError, match="this pipeline was made without a b, which the request needs"):
        components.open("b")


def test_wrong_tensors_are_refused_at_once(log: list[str]) -> None:
    held = make_components(log, 300, {"a": 100}).sessions["a"]
    with pytest.raises(BackendError, match="missing: y"):
        held.bind(on_host({"x": np.zeros(3, np.float32)}))
    held.close()
    with pytest.raises(BackendError, match="closed"):
        bound(held)
    assert log == []
