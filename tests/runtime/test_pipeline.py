"""The pipeline against a plain loop, on a bundle whose graphs are a few known nodes."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allaprima.bundle import VERSION, BackendError, Bundle, BundleError, RequestError
from allaprima.runtime import Parameters, Pipeline, Progress, Result, open_session
from allaprima.runtime.memory import HostMemory
from allaprima.runtime.noise import Noise
from allaprima.runtime.samplers import idle_row, make_table
from allaprima.runtime.stages import Denoiser
from allaprima.runtime.tokenizer import Tokenizer

PROMPT = "a red circle"


@pytest.fixture(params=["ort", "openvino"])
def pipeline(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.folder, backend=request.param, precision="fp32", threads=1) as opened:
        yield opened


@pytest.fixture
def ort(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as opened:
        yield opened


def pixels(result: Result) -> list[NDArray[np.uint8]]:
    return [np.asarray(image) for image in result.images]


def paint_plainly(
    bundle: Bundle, hidden_states: Callable[[Any], Any], prompts: list[str], seed: int, **options: Any
) -> NDArray[np.float64]:
    """The final latents [4,8,4] of one image, as a sampler's equations say, in float64."""
    tokenizer = Tokenizer(bundle)
    conditions = [hidden_states(tokenizer.encode(prompt).ids)[2, 4] for prompt in prompts]
    scale = options.pop("scale")
    weights = [1 - scale, scale] if len(prompts) == 2 else [1.0]
    table = make_table(bundle.manifest.scheduler, **options, history=4)
    noise = Noise(seed)
    sample = noise.normal((4, 8, 4)) * table.init_noise_sigma
    history, last = [np.zeros_like(sample)] * 4, 0.0
    for row in range(len(table.timesteps)):
        base = 0.1 * sample * table.input_scale[row] + table.timesteps[row] / 1000
        output = sum(weight * np.tanh(base + each) for weight, each in zip(weights, conditions, strict=True))
        p, q = table.to_prediction[row]
        raw = p * sample + q * output
        prediction = np.clip(raw, -table.bounds[row], table.bounds[row])
        fresh = noise.normal((4, 8, 4)) if table.draws[row] else np.zeros_like(sample)
        last, fresh = fresh, fresh + table.echoes[row] * last
        terms = [sample, prediction, fresh, *history, raw]
        sample = sum(u * term for u, term in zip(table.update[row], terms, strict=True))
        history = [prediction, *history[:3]]
    return np.asarray(sample, np.float64)


def decode_plainly(sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels [64,32,3] before rounding."""
    image = np.clip(255 * (sample[:3] / 2 + 0.5), 0, 255).transpose(1, 2, 0)
    return image.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ddim", 4, 0.0), ("ddim", 3, 0.7), ("ddpm", 5, 0.0), ("euler_a", 4, 0.0), ("dpmpp_2m", 5, 0.0)],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_a_plain_loop(
    pipeline: Pipeline,
    bundle: Bundle,
    hidden_states: Callable[[Any], Any],
    sampler: str,
    steps: int,
    eta: float,
    scale: float,
) -> None:
    seen: list[Progress] = []
    result = pipeline.generate(
        PROMPT,
        negative_prompt="dull",
        num_inference_steps=steps,
        guidance_scale=scale,
        sampler=sampler,
        seed=7,
        num_images=2,
        eta=eta,
        callback=seen.append,
    )
    final = seen[-1].sample
    prompts = [PROMPT] if scale == 1 else ["dull", PROMPT]
    for index, image in enumerate(pixels(result)):
        wanted = paint_plainly(
            bundle,
            hidden_states,
            prompts,
            7 + index,
            scale=scale,
            sampler=sampler,
            num_inference_steps=steps,
            eta=eta,
        )
        np.testing.assert_allclose(final[index], wanted, atol=2e-5)
        assert np.abs(image - decode_plainly(wanted)).max() < 0.51


def test_result(ort: Pipeline) -> None:
    result = ort.generate(PROMPT, seed=5, num_images=2, height=32, width=96)
    assert [image.size for image in result.images] == [(96, 32)] * 2
    assert [image.mode for image in result.images] == ["RGB"] * 2
    assert result.parameters[1] == Parameters(
        prompt=PROMPT,
        negative_prompt=None,
        num_inference_steps=4,
        guidance_scale=3.0,
        sampler="ddim",
        seed=6,
        height=32,
        width=96,
        eta=0.0,
        bundle="tiny",
        backend="ort",
        precision="fp32",
        version=VERSION,
    )
    assert result.parameters[0] == replace(result.parameters[1], seed=5)
    assert list(result.timings) == ["encode", "denoise", "decode", "total"]
    assert result.timings["total"] >= sum(list(result.timings.values())[:3]) - 1e-9
    assert result.warnings == ()


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "euler_a"}, {"sampler": "dpmpp_2m"}, {"guidance_scale": 1}]
)
def test_an_image_of_a_batch_is_the_image_alone(ort: Pipeline, options: Mapping[str, Any]) -> None:
    batch = pixels(ort.generate(PROMPT, seed=40, num_images=3, **options))
    for index, image in enumerate(batch):
        (alone,) = pixels(ort.generate(PROMPT, seed=40 + index, **options))
        assert np.array_equal(alone, image)
    assert not np.array_equal(batch[0], batch[1])


def test_nothing_is_left_of_the_request_before(ort: Pipeline) -> None:
    fresh = pixels(ort.generate(PROMPT, seed=1, sampler="dpmpp_2m"))
    ort.generate("a blue square", negative_prompt="x", seed=2, sampler="ddpm", guidance_scale=9)
    again = pixels(ort.generate(PROMPT, seed=1, sampler="dpmpp_2m"))
    assert np.array_equal(fresh, again)


def test_prompts_and_seeds_matter(ort: Pipeline) -> None:
    (image,) = pixels(ort.generate(PROMPT, seed=1))
    for other in (
        ort.generate("a blue square", seed=1),
        ort.generate(PROMPT, negative_prompt="dull", seed=1),
        ort.generate(PROMPT, seed=2),
        ort.generate(PROMPT, seed=1, guidance_scale=2),
    ):
        assert not np.array_equal(pixels(other)[0], image)


def test_random_seed_is_reported(ort: Pipeline) -> None:
    result = ort.generate(PROMPT)
    (again,) = pixels(ort.generate(PROMPT, seed=result.parameters[0].seed))
    assert np.array_equal(again, pixels(result)[0])


def test_progress(ort: Pipeline) -> None:
    seen: list[Progress] = []
    ort.generate(PROMPT, seed=3, num_inference_steps=3, num_images=2, callback=seen.append)
    assert [(progress.stage, progress.step, progress.total) for progress in seen] == [
        ("encode", 1, 1),
        ("denoise", 1, 3),
        ("denoise", 2, 3),
        ("denoise", 3, 3),
        ("decode", 1, 2),
        ("decode", 2, 2),
    ]
    assert all(progress.sample.shape == (2, 4, 8, 4) for progress in seen)
    with pytest.raises(ValueError, match="read-only"):
        seen[0].sample[:] = 0


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_cancelling(ort: Pipeline, stage: str) -> None:
    wanted = pixels(ort.generate(PROMPT, seed=1, num_images=2))

    def stop(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ort.generate("another", seed=9, num_images=2, callback=stop)
    assert np.array_equal(pixels(ort.generate(PROMPT, seed=1, num_images=2)), wanted)


def test_one_request_at_a_time(ort: Pipeline) -> None:
    errors = []

    def intrude(progress: Progress) -> None:
        def attempt() -> None:
            for action in (lambda: ort.generate("x"), ort.close):
                with pytest.raises(RequestError, match="is painting") as caught:
                    action()
                errors.append(caught.value)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    ort.generate(PROMPT, num_inference_steps=1, callback=intrude)
    assert len(errors) == 6
    ort.generate(PROMPT)


def test_long_prompt(ort: Pipeline) -> None:
    long = "x" * 75 + " and  More"
    assert ort.generate(long, seed=1).warnings == ('the prompt is too long, this was left out: "and  More"',)
    result = ort.generate(PROMPT, negative_prompt=long, seed=1)
    assert result.warnings == ('the negative prompt is too long, this was left out: "and  More"',)


def test_negative_prompt_without_guidance(ort: Pipeline) -> None:
    result = ort.generate(PROMPT, negative_prompt="dull", guidance_scale=1, seed=1)
    assert len(result.warnings) == 1
    assert "the negative prompt has no effect with guidance_scale 1" in result.warnings[0]
    assert np.array_equal(pixels(result)[0], pixels(ort.generate(PROMPT, guidance_scale=0, seed=1))[0])


def test_empty_prompt(ort: Pipeline) -> None:
    assert ort.generate("", seed=1).warnings == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height 100 is not a multiple of 32"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"sampler": "dimm"}, "dimm.*ddim"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"num_images": 10**9}, "num_images 1000000000 of 32 x 64 pixels is too much at once"),
        ({"sampler": "flow_euler"}, "'flow_euler' cannot honour the configuration of a DDIM"),
    ],
)
def test_refused(ort: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ort.generate(**{"prompt": "", "callback": lambda progress: pytest.fail("painted"), **options})
    ort.generate("", seed=1)


def test_picture_that_is_not_finite(ort: Pipeline) -> None:
    def spoil(progress: Progress) -> None:
        assert progress.sample.base is not None
        progress.sample.base[:] = np.nan

    with pytest.raises(BackendError, match="denoiser made values that are infinite or not-a-number, in fp32"):
        ort.generate(PROMPT, callback=spoil)
    wanted = pixels(ort.generate(PROMPT, seed=1, guidance_scale=3))
    with pytest.raises(BackendError, match="not-a-number"):
        ort.generate(PROMPT, seed=1, callback=spoil)
    assert np.array_equal(pixels(ort.generate(PROMPT, seed=1)), wanted)  # the history is clean again


def test_not_enough_memory(ort: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours, and the pipeline goes on."""
    wanted = pixels(ort.generate(PROMPT, seed=1))

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "allocate", refuse)
        with pytest.raises(
            BackendError, match="not enough memory for this request: ask for fewer or smaller"
        ):
            ort.generate(PROMPT, num_images=2)
    assert np.array_equal(pixels(ort.generate(PROMPT, seed=1)), wanted)


def test_automatic_backend(bundle: Bundle) -> None:
    with Pipeline.open(bundle.folder, threads=1) as pipeline:
        parameters = pipeline.generate(PROMPT).parameters[0]
        assert (parameters.backend, parameters.precision) == (pipeline.backend, pipeline.precision)
        assert parameters.precision in ("bf16", "fp32")


def test_closed(bundle: Bundle) -> None:
    pipeline = Pipeline.open(bundle.folder, backend="ort", threads=1)
    pipeline.generate(PROMPT)
    opened = [vars(session)["_opened"] for session in vars(pipeline)["_components"].sessions.values()]
    graphs = [weakref.ref(each.get()) for each in opened]
    assert all(graph() for graph in graphs)
    pipeline.close()
    assert not any(graph() for graph in graphs)  # no buffer or binding keeps them
    pipeline.close()
    with pytest.raises(BackendError, match="closed"):
        pipeline.generate(PROMPT)


def test_opening(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        Pipeline.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="empty"):
        Pipeline.open("")
    with pytest.raises(BackendError, match="unknown backend"):
        Pipeline.open(bundle.folder, backend="abacus")
    (bundle.folder / "denoiser" / "model.onnx").open("r+b").write(b"\0\0\0")
    with pytest.raises(BundleError, match="corrupt"):
        Pipeline.open(bundle.folder, verify=True)
    with pytest.raises(BackendError, match="cannot load"):
        Pipeline.open(bundle.folder, backend="ort")


def test_family(bundle: Bundle) -> None:
    strange = Bundle(bundle.folder, replace(bundle.manifest, family="fresco"))
    with Pipeline.open(bundle.folder, backend="ort", threads=1) as good:
        sessions = {
            "denoiser": open_session(bundle.path("denoiser/model.onnx"), bundle.component("denoiser"))
        }
        with pytest.raises(BundleError, match="of the family 'fresco'"):
            Pipeline(strange, sessions, backend=good.backend)


def test_lanes_at_their_own_rows(bundle: Bundle) -> None:
    """Lanes with other samplers and progress, some idle, give what each gives alone, to the bit."""
    component = bundle.component("denoiser")
    session = open_session(bundle.path(component.graph), component, "ort", threads=1)
    scheduler = bundle.manifest.scheduler
    tables = [make_table(scheduler, name, 4, history=4) for name in ("ddim", "dpmpp_2m", "euler")]

    def make(lanes: int) -> Denoiser:
        denoiser = Denoiser(session, (lanes, 4, 8, 8), branches=2, history=4, length=77)
        denoiser.guidance[...] = [[-1.0], [2.0]]
        return denoiser

    def start(denoiser: Denoiser, lane: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        denoiser.sample[lane] = generator.normal(size=(4, 8, 8))
        denoiser.history[:, lane] = 0
        denoiser.conditions["encoder_hidden_states"].array[:, lane] = generator.normal(size=(2, 77, 6))

    alone = []
    for seed, table in enumerate(tables):
        single = make(1)
        start(single, 0, seed)
        for row in range(4):
            single.write(table, row)
            single.step()
        alone.append(single.sample[0].copy())

    together = make(4)
    together.sample[3] = 0.5
    together.history[:, 3] = 9
    for tick in range(6):  # lane i starts at tick i, lane 3 is idle
        for lane, table in enumerate(tables):
            if tick == lane:
                start(together, lane, lane)
            if lane <= tick < lane + 4:
                together.write(table, tick - lane, lane)
            else:
                together.write(idle_row(4), 0, lane)
        together.step()
    for lane, wanted in enumerate(alone):
        assert np.array_equal(together.sample[lane], wanted)
    assert np.all(together.sample[3] == 0.5)


def test_variations(ort: Pipeline) -> None:
    """From the picture of one seed to that of the other, and each can be painted again alone."""

    def paint(**options: Any) -> NDArray[np.float64]:
        return np.asarray(ort.generate(PROMPT, **options).images[0]).astype(np.float64)

    start, end = paint(seed=3), paint(seed=8)
    away = [
        np.abs(paint(seed=3, variation_seed=8, variation_strength=share) - start).mean()
        for share in (0.01, 0.1, 0.5, 1.0)
    ]
    assert 0 < away[0] < away[1] < away[2] < away[3]
    whole = paint(seed=3, variation_seed=8, variation_strength=1.0)
    assert np.abs(whole - end).max() <= 1
    several = ort.generate(PROMPT, seed=3, variation_seed=8, variation_strength=0.3, num_images=3)
    third = several.parameters[2]
    assert (third.seed, third.variation_seed, third.variation_strength) == (3, 10, 0.3)
    again = paint(seed=3, variation_seed=10, variation_strength=0.3)
    assert np.array_equal(again, np.asarray(several.images[2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variation_seed": 5}, "variation_seed is 5, but variation_strength is 0"),
        ({"variation_strength": 1.5}, "variation_strength is 1.5"),
        ({"variation_strength": 0.5, "variation_seed": -1}, "variation_seed is -1"),
    ],
)
def test_wrong_variations(ort: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ort.generate(PROMPT, **options)
