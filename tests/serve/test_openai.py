"""OpenAI's Images API, spoken by its own client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from allaprima.bundle import BackendError
from allaprima.runtime import read_parameters
from allaprima.serve.errors import BusyError, DeadlineError

from .conftest import Running, until


@pytest.fixture
def ai(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


def opened(text: str | None) -> Image.Image:
    assert text is not None
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


GRAY = png(Image.new("RGB", (64, 96), "gray"))


def test_pictures(ai: openai.OpenAI, server: Running) -> None:
    answer = ai.images.generate(
        prompt="a red circle",
        n=2,
        size="64x32",
        extra_body={
            "negative_prompt": "blue",
            "num_inference_steps": 4,
            "guidance_scale": 3,
            "seed": 7,
            "sampler": "euler",
        },
    )
    assert answer.data is not None
    first, second = (opened(each.b64_json) for each in answer.data)
    assert first.format == "PNG"
    assert first.size == second.size == (64, 32)
    assert first.getpixel((0, 0)) == (7, 0, 99)
    assert [each.seed for each in answer.data] == [7, 8]  # type: ignore[attr-defined]
    assert (answer.size, answer.output_format, answer.background) == ("64x32", "png", "opaque")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    asked = server.studio.asked[-1].request
    assert (asked.prompt, asked.negative_prompt, asked.num_inference_steps) == ("a red circle", "blue", 4)
    assert (asked.guidance_scale, asked.sampler, asked.num_images) == (3, "euler", 2)


def test_what_is_left_out_is_the_bundles(ai: openai.OpenAI, server: Running) -> None:
    answer = ai.images.generate(
        prompt="x", size="auto", quality="high", style="vivid", user="somebody", moderation="low", n=None
    )
    assert answer.size == "128x128"
    asked = server.studio.asked[-1]
    assert (asked.model, asked.preview_every, asked.deadline) == (None, None, None)
    assert asked.request.num_inference_steps is None
    assert asked.owner is None


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_hold_the_parameters(ai: openai.OpenAI, kind: Any, tmp_path: Any) -> None:
    compression = None if kind == "png" else 40
    answer = ai.images.generate(prompt="Füße", output_format=kind, output_compression=compression)
    assert answer.data is not None
    assert opened(answer.data[0].b64_json).format == kind.upper()
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json or ""))
    assert read_parameters(path)["prompt"] == "Füße"


def test_by_url(ai: openai.OpenAI) -> None:
    answer = ai.images.generate(prompt="x", response_format="url", output_format="jpeg")
    assert answer.data is not None
    assert answer.data[0].b64_json is None
    url = answer.data[0].url
    assert url is not None
    found = httpx.get(url, trust_env=False)
    assert found.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(found.content)).size == (128, 128)
    assert httpx.get(f"{url}x", trust_env=False).status_code == 404


def test_stream(ai: openai.OpenAI, server: Running) -> None:
    server.studio.hold()
    stream = ai.images.generate(
        prompt="x", stream=True, partial_images=3, n=2, extra_body={"num_inference_steps": 8, "seed": 5}
    )
    server.studio.go()
    events: list[Any] = list(stream)
    parts = [each for each in events if each.type == "image_generation.partial_image"]
    ended = [each for each in events if each.type == "image_generation.completed"]
    assert len(parts) + len(ended) == len(events)
    assert sorted((each.image_index, each.partial_image_index) for each in parts) == [
        (image, part) for image in range(2) for part in range(3)
    ]
    assert {opened(each.b64_json).size for each in events} == {(128, 128)}
    assert {each.size for each in events} == {"128x128"}
    assert [(each.image_index, each.seed) for each in ended] == [(0, 5), (1, 6)]
    assert ended[0].usage.input_tokens_details.text_tokens == 0
    assert opened(ended[0].b64_json).getpixel((0, 0)) == (5, 0, 99)


def test_stream_without_partial_images(ai: openai.OpenAI, server: Running) -> None:
    events = list(ai.images.generate(prompt="x", stream=True))
    assert [each.type for each in events] == ["image_generation.completed"]
    assert server.studio.asked[-1].preview_every is None


@pytest.mark.parametrize(
    ("fields", "every"),
    [
        ({"num_inference_steps": 8}, 2),
        ({"num_inference_steps": 8, "sampler": "heun"}, 4),
        ({}, 5),
        ({"num_inference_steps": 1}, 1),
    ],
)
def test_partial_images_are_spread_over_the_run(
    ai: openai.OpenAI, server: Running, fields: dict[str, Any], every: int
) -> None:
    list(ai.images.generate(prompt="x", stream=True, partial_images=3, extra_body=fields))
    assert server.studio.asked[-1].preview_every == every


def test_a_stream_that_fails(ai: openai.OpenAI, server: Running) -> None:
    server.studio.fails = BackendError("/secret/path broke")
    with pytest.raises(openai.APIError, match="could not paint") as failed:
        list(ai.images.generate(prompt="x", stream=True))
    assert "secret" not in str(failed.value)


def test_edit(ai: openai.OpenAI, server: Running) -> None:
    answer = ai.images.edit(
        image=("../../etc/passwd", GRAY, "text/html"), prompt="x", extra_body={"strength": 0.5, "seed": 3}
    )
    assert answer.size == "64x96"
    asked = server.studio.asked[-1].request
    assert asked.image.size == (64, 96)
    assert asked.mask is None
    assert asked.strength == 0.5


def test_the_transparent_part_is_painted_over(ai: openai.OpenAI, server: Running) -> None:
    mask = Image.new("RGBA", (64, 96), (10, 20, 30, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 96))
    server.studio.hold()
    stream = ai.images.edit(
        image=[GRAY], mask=png(mask, "WEBP"), prompt="x", stream=True, partial_images=1, size="64x32"
    )
    server.studio.go()
    events = list(stream)
    assert [each.type for each in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert opened(events[1].b64_json).size == (64, 32)
    asked = server.studio.asked[-1].request
    assert asked.mask.getpixel((0, 50)) == 255
    assert asked.mask.getpixel((40, 50)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": png(Image.new("RGB", (64, 96)))}, "mask has no alpha channel"),
        ({"mask": png(Image.new("RGBA", (64, 64)))}, "hand in two of one size"),
        ({"image": [GRAY, GRAY]}, "there are 2 images"),
        ({"image": b"GIF89a"}, "no PNG, JPEG or WebP"),
        ({"image": GRAY[:60]}, "damaged PNG"),
        ({"image": png(Image.new("L", (2048, 1024)))}, "at most 1048576"),
        ({"size": "100x100"}, "the nearest valid sizes are 96 and 128"),
    ],
)
def test_edits_that_cannot_be(ai: openai.OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ai.images.edit(**{"image": GRAY, "prompt": "x"} | options)


def test_models(ai: openai.OpenAI) -> None:
    models = ai.models.list()
    assert [each.id for each in models] == ["shapes", "other"]
    found = ai.models.retrieve("other")
    assert (found.id, found.object, found.owned_by) == ("other", "model", "allaprima")
    with pytest.raises(openai.NotFoundError, match="choose from shapes, other"):
        ai.models.retrieve("a/b")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 0}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"num_inference_step": 4}, "num_inference_step", "unknown_parameter"),
        ({"size": "1"}, None, "invalid_request"),
        ({"size": "100x128"}, None, "invalid_request"),
        ({"output_compression": 50}, None, "invalid_request"),
        ({"sampler": "nothing"}, None, "invalid_request"),
        ({"strength": 0.5}, None, "invalid_request"),
        ({"n": 9}, None, "over_limit"),
        ({"num_inference_steps": 10**9}, None, "over_limit"),
        ({"size": "99968x99968"}, None, "invalid_request"),
        ({"prompt": "x" * 20000}, None, "over_limit"),
        ({"guidance_scale": 1e300}, None, "invalid_request"),
    ],
)
def test_deterministic_failures_are_the_clients(
    ai: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ai.images.generate(prompt="x", extra_body=fields)
    assert refused.value.param == param
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id


def test_unknown_model(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="choose from shapes, other") as refused:
        ai.images.generate(prompt="x", model="dall-e-3")
    assert refused.value.code == "model_not_found"


def test_a_full_queue(ai: openai.OpenAI, server: Running) -> None:
    server.studio.busy = BusyError("the queue is full: try later", 7)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            ai.images.generate(prompt="x", stream=stream)  # type: ignore[call-overload]
        assert refused.value.response.headers["retry-after"] == "7"


def test_what_breaks_inside_is_not_told(ai: openai.OpenAI, server: Running) -> None:
    for error in (BackendError("/home/somebody/model.onnx is broken"), RuntimeError("/etc/passwd")):
        server.studio.fails = error
        with pytest.raises(openai.InternalServerError) as failed:
            ai.images.generate(prompt="x")
        assert failed.value.status_code == 500
        assert "/" not in str(failed.value.body)


def test_too_late(ai: openai.OpenAI, server: Running) -> None:
    server.studio.fails = DeadlineError("the picture was not done in the time that was given")
    with pytest.raises(openai.InternalServerError) as failed:
        ai.images.generate(prompt="x", extra_body={"deadline": 1.5})
    assert failed.value.status_code == 504
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert server.studio.asked[-1].deadline == 1.5


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_painted_for_no_more(server: Running, stream: bool) -> None:
    server.studio.hold()
    body = {"prompt": "x", "stream": stream}
    with server.client() as client:
        with client.stream("POST", "/v1/images/generations", json=body) if stream else _begin(client, body):
            until(lambda: [job.status.state for job in server.studio.jobs()] == ["running"])
            job = server.studio.jobs()[0]
            assert not job.cancelled
        until(lambda: job.status.state == "cancelled")
        assert client.get("/api/jobs").json() == {"jobs": [], "queued": 0, "running": 0}


class _begin:  # noqa: N801
    """Sends a request on a connection of its own, and leaves without the answer."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        import socket

        data = json.dumps(body).encode()
        url = client.base_url
        self.socket = socket.create_connection((url.host, url.port or 80))
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        )
        self.socket.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def test_a_job_that_somebody_else_cancels(ai: openai.OpenAI, server: Running) -> None:
    import threading

    server.studio.hold()

    def cancel() -> None:
        until(lambda: server.studio.jobs())
        server.studio.jobs()[0].cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(openai.ConflictError, match="cancelled") as failed:
        ai.images.generate(prompt="x")
    thread.join()
    assert failed.value.response.headers["x-should-retry"] == "false"
