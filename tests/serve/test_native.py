"""Jobs of our own API: handed in, watched, cancelled, fetched."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from allaprima.bundle import BackendError
from allaprima.runtime import read_parameters, samplers
from allaprima.serve.errors import BusyError

from .conftest import Running, Serve, until


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


GRAY = png(Image.new("RGB", (64, 96), "gray"))
MASK = png(Image.new("L", (64, 96), 255))


def submit(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/api/jobs", json={"prompt": "x", **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/jobs/{answer.json()['id']}"
    status: dict[str, Any] = answer.json()
    return status


def ended(client: httpx.Client, id: str) -> dict[str, Any]:
    until(lambda: client.get(f"/api/jobs/{id}").json()["ended"] is not None)
    status: dict[str, Any] = client.get(f"/api/jobs/{id}").json()
    return status


def read_events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    blocks = "".join(response.iter_text()).strip().split("\n\n")
    pairs = (block.split("\n") for block in blocks if not block.startswith(":"))
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_a_job_from_begin_to_end(client: httpx.Client, tmp_path: Any) -> None:
    status = submit(client, prompt="a red circle", num_images=2, num_inference_steps=4, seed=7, height=64)
    assert (status["model"], status["images"], status["prompt"]) == ("shapes", 2, "a red circle")
    done = ended(client, status["id"])
    assert (done["state"], done["progress"], done["step"], done["steps"]) == ("done", 1.0, 8, 8)
    assert [each["seed"] for each in done["parameters"]] == [7, 8]
    assert done["warnings"] == []
    for index in range(2):
        found = client.get(f"/api/jobs/{status['id']}/images/{index}")
        assert found.headers["content-type"] == "image/png"
        assert found.headers["content-disposition"] == f'inline; filename="allaprima-{7 + index}.png"'
        path = tmp_path / "picture.png"
        path.write_bytes(found.content)
        assert read_parameters(path) == done["parameters"][index]
        with Image.open(path) as image:
            assert image.size == (128, 64)
    webp = client.get(f"/api/jobs/{status['id']}/images/0?format=webp")
    assert Image.open(io.BytesIO(webp.content)).format == "WEBP"
    assert client.get(f"/api/jobs/{status['id']}/images/2").status_code == 404
    assert client.get(f"/api/jobs/{status['id']}/images/-1").status_code == 422
    assert client.get(f"/api/jobs/{status['id']}/images/0?format=gif").status_code == 422


def test_the_queue(client: httpx.Client, server: Running) -> None:
    server.studio.hold()
    first = submit(client)["id"]
    until(lambda: client.get(f"/api/jobs/{first}").json()["state"] == "running")
    second, third = (submit(client)["id"] for _ in range(2))
    listed = client.get("/api/jobs").json()
    assert (listed["queued"], listed["running"]) == (2, 1)
    assert [each["id"] for each in listed["jobs"]] == [first, second, third]
    assert client.get(f"/api/jobs/{third}").json()["position"] == 2
    assert client.get(f"/api/jobs/{second}/images/0").status_code == 409
    assert client.delete(f"/api/jobs/{first}").status_code == 200
    assert ended(client, first)["state"] == "cancelled"
    server.studio.go()
    assert ended(client, third)["state"] == "done"
    assert client.delete(f"/api/jobs/{third}").json()["state"] == "done"


def test_events(client: httpx.Client, server: Running) -> None:
    server.studio.hold()
    id = submit(client, num_images=2, num_inference_steps=6, preview_every=2)["id"]
    with client.stream("GET", f"/api/jobs/{id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        server.studio.go()
        events = read_events(response)
    names = [name for name, _ in events]
    assert names[0] == "status"
    assert names[-1] == "ended"
    previews = [data for name, data in events if name == "preview"]
    assert [each["index"] for each in previews] == [0, 1] * 3
    picture = base64.b64decode(previews[-1]["image"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(picture)).getpixel((0, 0)) == (6, 1, 0)
    shares = [data["progress"] for name, data in events if name == "status"]
    assert shares == sorted(shares)
    assert events[-1][1]["state"] == "done"
    assert len(events[-1][1]["parameters"]) == 2
    with client.stream("GET", f"/api/jobs/{id}/events") as response:
        assert [name for name, _ in read_events(response)] == ["ended"]


def test_who_stops_listening_stops_nothing(client: httpx.Client, server: Running) -> None:
    server.studio.hold()
    id = submit(client)["id"]
    with server.client() as other, other.stream("GET", f"/api/jobs/{id}/events") as response:
        next(response.iter_text())
    server.studio.go()
    assert ended(client, id)["state"] == "done"


def test_silence_is_filled(serve: Serve) -> None:
    server = serve(heartbeat_seconds=0.02)
    server.studio.hold()
    with server.client() as client:
        id = submit(client)["id"]
        with client.stream("GET", f"/api/jobs/{id}/events") as response:
            text = ""
            for part in response.iter_text():
                text += part
                if text.count(": keep-alive") == 3:
                    server.studio.go()
                    break
            assert ": keep-alive\n\n" in text


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_pictures_in_base64(client: httpx.Client, server: Running, prefix: str) -> None:
    fields = {name: prefix + base64.b64encode(data).decode() for name, data in PICTURES.items()}
    submit(client, **fields, strength=0.5)
    asked = server.studio.asked[-1].request
    assert asked.image.size == asked.mask.size == (64, 96)
    assert asked.strength == 0.5


PICTURES = {"image": GRAY, "mask": MASK}


def test_pictures_as_files(client: httpx.Client, server: Running) -> None:
    fields = {
        "prompt": "x",
        "num_inference_steps": "4",
        "long_prompts": "true",
        "sampling": '{"s_noise": 1.0}',
        "preview_every": "2",
        "sampler": "euler",
    }
    answer = client.post("/api/jobs", data=fields, files={**PICTURES})
    assert answer.status_code == 202, answer.text
    order = server.studio.asked[-1]
    assert order.preview_every == 2
    assert order.request.num_inference_steps == 4
    assert order.request.long_prompts is True
    assert order.request.sampling == {"s_noise": 1.0}
    assert order.request.image.size == (64, 96)


def test_every_field_arrives(client: httpx.Client, server: Running) -> None:
    fields: dict[str, Any] = {
        "negative_prompt": "y",
        "guidance_scale": 3,
        "sampler": "euler",
        "eta": 0.5,
        "prompt_weights": True,
        "clip_skip": 1,
        "guidance_rescale": 0.5,
        "variation_seed": 5,
        "variation_strength": 0.25,
        "sampling": {"timesteps": [999, 500, 1]},
        "width": 64,
    }
    submit(client, **fields, deadline=30, model="other")
    order = server.studio.asked[-1]
    assert {name: getattr(order.request, name) for name in fields} == fields
    assert (order.model, order.deadline) == ("other", 30)


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"steps": 4}, 422, "Extra inputs"),
        ({"num_images": "2"}, 422, "valid integer"),
        ({"guidance_scale": None, "eta": 2}, 422, "less than or equal to 1"),
        ({"sampling": {"scheduler": {"num_train_timesteps": 10**9}}}, 422, "Extra inputs"),
        ({"image": "https://example.com/a.png"}, 400, "pictures are not fetched"),
        ({"image": "/etc/passwd"}, 400, "not base64|no PNG"),
        ({"image": "AAAA"}, 400, "no PNG, JPEG or WebP"),
        ({"image": "data:image/png,x"}, 400, "without base64"),
        ({"mask": base64.b64encode(MASK).decode()}, 400, "no image to paint over"),
        ({"height": 100}, 400, "the nearest valid sizes are 96 and 128"),
        ({"model": "gone"}, 404, "choose from shapes, other"),
        ({"num_images": 9}, 400, "more than this server allows"),
        ({"denoising_end": 0.5}, 422, "Extra inputs"),
        ({"output_type": "latent"}, 422, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(
    client: httpx.Client, fields: dict[str, Any], status: int, told: str
) -> None:
    import re

    answer = client.post("/api/jobs", json={"prompt": "x", **fields})
    assert answer.status_code == status
    assert set(answer.json()) == {"detail"}
    assert re.search(told, answer.text)


@pytest.mark.parametrize(
    ("data", "files", "status"),
    [
        ({"prompt": "x", "image": "AAAA"}, {"mask": MASK}, 400),
        ({"prompt": "x"}, {"picture": GRAY}, 400),
        ({"prompt": "x"}, [("image", GRAY), ("image", GRAY)], 400),
        ({"prompt": ["x", "y"]}, {"image": GRAY}, 422),
        ({"prompt": "x", "sampling": "{"}, {"image": GRAY}, 422),
        ({"prompt": "x", "num_images": "many"}, {"image": GRAY}, 422),
        ({}, {"image": GRAY}, 422),
        ({"prompt": "x"}, [(f"f{number}", b"x") for number in range(20)], 400),
    ],
)
def test_forms_that_cannot_be(client: httpx.Client, data: Any, files: Any, status: int) -> None:
    assert client.post("/api/jobs", data=data, files=files).status_code == status


def test_a_job_that_fails_does_not_tell_why(client: httpx.Client, server: Running) -> None:
    server.studio.fails = BackendError("/home/somebody/model.onnx is broken")
    id = submit(client)["id"]
    status = ended(client, id)
    assert status["state"] == "failed"
    assert status["error"] == "the server could not paint this: its log says why"
    with client.stream("GET", f"/api/jobs/{id}/events") as response:
        assert read_events(response)[0][1]["error"] == status["error"]
    assert client.get(f"/api/jobs/{id}/images/0").status_code == 409


def test_a_full_queue(client: httpx.Client, server: Running) -> None:
    server.studio.busy = BusyError("the queue is full: try later", 3)
    answer = client.post("/api/jobs", json={"prompt": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json() == {"detail": "the queue is full: try later"}


def test_unknown_jobs(client: httpx.Client) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/images/0"), ("GET", "/events")):
        assert client.request(method, f"/api/jobs/nothing{path}").status_code == 404


def test_models(client: httpx.Client) -> None:
    first, second = client.get("/api/models").json()
    assert first == {
        "name": "shapes",
        "family": "stable-diffusion",
        "precision": first["precision"],
        "default": True,
        "loaded": True,
        "multiple": 32,
        "previews": True,
        "takes": ["image", "mask"],
        "height": 128,
        "width": 128,
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "most": {
            "num_images": 8,
            "num_inference_steps": 150,
            "pixels": 2048 * 2048,
            "work": 8 * 50 * 1024 * 1024,
        },
    }
    assert (second["name"], second["default"]) == ("other", False)


def test_samplers(client: httpx.Client) -> None:
    listed = client.get("/api/samplers").json()
    assert [each["name"] for each in listed] == [info.name for info in samplers.names()]


def test_jobs_belong_to_a_key(serve: Serve) -> None:
    server = serve(api_keys=("first", "second"))
    server.studio.hold()
    with (
        server.client(headers={"x-api-key": "first"}) as mine,
        server.client(headers={"authorization": "Bearer second"}) as other,
    ):
        id = submit(mine, prompt="a secret")["id"]
        assert [each["id"] for each in mine.get("/api/jobs").json()["jobs"]] == [id]
        listed = other.get("/api/jobs")
        assert listed.json()["jobs"] == []
        assert sum(listed.json()[name] for name in ("queued", "running")) == 1
        assert "secret" not in listed.text
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/images/0"), ("GET", "/events")):
            assert other.request(method, f"/api/jobs/{id}{path}").status_code == 404
        server.studio.go()
        assert ended(mine, id)["state"] == "done"
        assert other.get(f"/api/jobs/{id}/images/0").status_code == 404
        assert mine.get(f"/api/jobs/{id}/images/0").status_code == 200
