"""The whole of it, on the trained model: what comes over HTTP is what a pipeline paints."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageChops

from allaprima.runtime import Pipeline
from allaprima.serve.app import create_app
from allaprima.serve.limits import Limits
from allaprima.serve.metrics import Metrics
from allaprima.serve.settings import ServerSettings
from allaprima.serve.studio import Studio

from .conftest import Running, running, until

KEY = "a-key-of-the-tests"
PROMPT = "a red circle above a blue square on a white background"
FAST: dict[str, Any] = {"num_inference_steps": 4, "seed": 7}


def opens(folder: Path, limit: int | None) -> Pipeline:
    return Pipeline.open(folder, backend="ort", threads=1, memory_limit=limit)


@pytest.fixture(scope="module")
def whole() -> Iterator[Running]:
    metrics, limits = Metrics(), Limits(queue=4, kept=4)
    studio = Studio(["shapes"], opens, limits=limits, lanes=3, warm=[(128, 128)], watch=metrics)
    settings = ServerSettings(api_keys=(KEY,), limits=limits)
    with running(studio, settings, app=create_app(studio, settings, metrics)) as server:
        with server.client() as client:
            until(lambda: client.get("/health/ready").status_code == 200, 60)
        yield server


@pytest.fixture
def ai(whole: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{whole.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> Iterator[Pipeline]:
    with Pipeline.open("shapes", backend="ort", threads=1) as pipeline:
        yield pipeline


def opened(text: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


def test_the_picture_is_that_of_a_pipeline(ai: openai.OpenAI, alone: Pipeline) -> None:
    answer = ai.images.generate(prompt=PROMPT, n=2, extra_body={**FAST, "sampler": "euler"})
    made = alone.generate(PROMPT, num_images=2, sampler="euler", **FAST)
    assert answer.data is not None
    for given, wanted in zip(answer.data, made.images, strict=True):
        assert opened(given.b64_json).tobytes() == wanted.tobytes()


def test_a_stream(ai: openai.OpenAI, alone: Pipeline) -> None:
    events: list[Any] = list(
        ai.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={**FAST})
    )
    assert [each.type.partition(".")[2] for each in events] == ["partial_image"] * 2 + ["completed"]
    pictures = [opened(each.b64_json) for each in events]
    assert {each.size for each in pictures} == {(128, 128)}
    assert pictures[-1].tobytes() == alone.generate(PROMPT, **FAST).images[0].tobytes()
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_part_is_painted_over(ai: openai.OpenAI) -> None:
    before = ai.images.generate(prompt=PROMPT, extra_body=FAST)
    assert before.data is not None
    picture = base64.b64decode(before.data[0].b64_json or "")
    mask, buffer = Image.new("RGBA", (128, 128), "black"), io.BytesIO()
    mask.paste((0, 0, 0, 0), (0, 64, 128, 128))
    mask.save(buffer, "PNG")
    after = ai.images.edit(
        image=picture,
        mask=buffer.getvalue(),
        prompt="a green triangle",
        extra_body={"num_inference_steps": 8, "seed": 3},
    )
    assert after.data is not None
    changed = ImageChops.difference(Image.open(io.BytesIO(picture)), opened(after.data[0].b64_json))
    top, bottom = changed.crop((0, 0, 128, 48)), changed.crop((0, 64, 128, 128))
    assert sum(bottom.convert("L").tobytes()) > 4 * sum(top.convert("L").tobytes())


def test_many_at_once(whole: Running, alone: Pipeline) -> None:
    wanted = {
        (seed, steps): alone.generate(PROMPT, seed=seed, num_inference_steps=steps).images[0].tobytes()
        for seed, steps in ((1, 3), (2, 6), (3, 4))
    }
    found: dict[tuple[int, int], bytes] = {}

    def ask(seed: int, steps: int) -> None:
        with openai.OpenAI(base_url=f"{whole.url}/v1", api_key=KEY, max_retries=0) as client:
            extra = {"seed": seed, "num_inference_steps": steps}
            answer = client.images.generate(prompt=PROMPT, extra_body=extra)
            found[seed, steps] = opened((answer.data or [])[0].b64_json).tobytes()

    threads = [threading.Thread(target=ask, args=each) for each in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == wanted


def test_a_full_queue_and_leaving(whole: Running, ai: openai.OpenAI) -> None:
    """Whoever leaves frees the lanes and the queue."""
    headers = {"x-api-key": KEY}
    slow = {"prompt": PROMPT, "num_inference_steps": 150, "num_images": 3}
    with whole.client(headers=headers) as client:
        first = client.post("/api/jobs", json=slow).json()["id"]
        until(lambda: client.get(f"/api/jobs/{first}").json()["step"] > 0, 30)
        second = client.post("/api/jobs", json=slow | {"num_images": 4}).json()["id"]
        with pytest.raises(openai.RateLimitError) as busy:
            ai.images.generate(prompt=PROMPT)
        assert int(busy.value.response.headers["retry-after"]) >= 1
        assert client.get(f"/api/jobs/{second}").json()["position"] == 1
        for id in (first, second):
            client.delete(f"/api/jobs/{id}")
        until(lambda: client.get("/api/jobs").json() == {"jobs": [], "queued": 0, "running": 0})
        with ai.images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 150}):
            until(lambda: client.get("/api/jobs").json()["running"] == 1, 30)
        until(lambda: client.get("/api/jobs").json()["running"] == 0)
        assert not any(whole.studio.load().lanes.values())


def test_a_deadline(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        ai.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 150, "deadline": 0.05})
    assert late.value.status_code == 504


@pytest.mark.parametrize(
    "fields",
    [
        {"num_images": 9},
        {"num_inference_steps": 151},
        {"width": 4096, "height": 2048},
        {"prompt": "x" * 20000},
        {"num_images": 8, "num_inference_steps": 150, "width": 2048, "height": 1024},
        {"deadline": 1e9},
        {"sampler": "euler", "sampling": {"timesteps": [float(999 - each) for each in range(900)]}},
        {"preview_every": 0, "model": "other"},
        {"hint": "AAAA"},
        {"aesthetic_score": 6},
        {"cache_interval": 2},
    ],
)
def test_what_is_too_much_or_means_nothing(whole: Running, fields: dict[str, Any]) -> None:
    with whole.client(headers={"x-api-key": KEY}) as client:
        answer = client.post("/api/jobs", json={"prompt": "x"} | fields)
        assert answer.status_code in (400, 404), answer.text
        assert client.get("/api/jobs").json() == {"jobs": [], "queued": 0, "running": 0}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sampler": "nothing"}, "nothing"),
        ({"sampler": "euler", "eta": 0.5}, "eta"),
        ({"sampling": {"order": 2}}, "order"),
    ],
)
def test_what_the_sampler_refuses(whole: Running, fields: dict[str, Any], told: str) -> None:
    """Told at once, or when its turn comes."""
    with whole.client(headers={"x-api-key": KEY}) as client:
        answer = client.post("/api/jobs", json={"prompt": "x"} | fields)
        if answer.status_code == 202:
            path = f"/api/jobs/{answer.json()['id']}"
            until(lambda: client.get(path).json()["ended"] is not None)
            assert client.get(path).json()["state"] == "failed"
            assert told in client.get(path).json()["error"]
        else:
            assert answer.status_code == 400
            assert told in answer.json()["detail"]


def test_events_of_a_job(whole: Running) -> None:
    with whole.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        id = client.post("/api/jobs", json={"prompt": PROMPT, "preview_every": 2} | FAST).json()["id"]
        with client.stream("GET", f"/api/jobs/{id}/events") as response:
            blocks = "".join(response.iter_text()).strip().split("\n\n")
        assert blocks[-1].startswith("event: ended\n")
        ended = json.loads(blocks[-1].partition("data: ")[2])
        assert ended["state"] == "done"
        assert ended["parameters"][0]["seed"] == 7
        assert client.get(f"/api/jobs/{id}/images/0").status_code == 200


def test_metrics(whole: Running, ai: openai.OpenAI) -> None:
    ai.images.generate(prompt=PROMPT, extra_body=FAST)
    with whole.client(headers={"x-api-key": KEY}) as client:
        text = client.get("/metrics").text
    assert 'allaprima_step_seconds_count{lanes="1",model="shapes",size="128x128"}' in text
    assert 'allaprima_stage_seconds_count{model="shapes",stage="encode"}' in text
    assert 'allaprima_stage_seconds_count{model="shapes",stage="decode"}' in text
    assert 'allaprima_jobs_total{model="shapes",state="done"}' in text
    assert 'allaprima_images_total{model="shapes"}' in text
