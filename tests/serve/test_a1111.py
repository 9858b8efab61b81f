"""What clients of AUTOMATIC1111's web UI send and get."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from allaprima.bundle import RequestError
from allaprima.runtime import Request
from allaprima.serve.a1111_fields import model_of, sampler_of
from allaprima.serve.a1111_lists import EMPTY

from .conftest import LIMITS, Running, Serve, until
from .fakes import FakeStudio

SMALL = {"prompt": "a red circle", "steps": 3, "seed": 7}


class Session:
    """A client of the API, and the studio behind the server that it speaks to."""

    def __init__(self, server: Running, **options: Any) -> None:
        self.studio = server.studio
        self.http = server.client(**options)

    @property
    def request(self) -> Request:
        """The only one that got to the studio."""
        [order] = self.studio.asked
        return order.request

    def post(self, path: str, fields: Any) -> httpx.Response:
        return self.http.post(f"/sdapi/v1/{path}", json=fields)

    def get(self, path: str) -> Any:
        answer = self.http.get(f"/sdapi/v1/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def session(server: Running) -> Iterator[Session]:
    session = Session(server)
    with session.http:
        yield session


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def packed(image: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


PICTURE = packed(Image.new("RGB", (128, 128), "orange"))


def test_a_picture_and_how_it_was_made(session: Session) -> None:
    fields = SMALL | {"negative_prompt": "blue", "cfg_scale": 4.5, "sampler_name": "Euler a", "width": 96}
    answer = session.post("txt2img", fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    [image] = [opened(each) for each in body["images"]]
    assert image.format == "PNG"
    assert image.size == (96, 128)
    info = json.loads(body["info"])
    assert info["infotexts"] == [image.info["parameters"]]
    assert image.info["parameters"].startswith(
        "a red circle\nNegative prompt: blue\n"
        "Steps: 3, Sampler: Euler a, CFG scale: 4.5, Seed: 7, Size: 96x128"
    )
    assert (info["seed"], info["all_seeds"], info["steps"], info["cfg_scale"]) == (7, [7], 3, 4.5)
    assert (info["sampler_name"], info["sd_model_name"]) == ("Euler a", "shapes")
    assert body["parameters"]["prompt"] == "a red circle"
    assert body["parameters"]["sampler_name"] == "Euler a"


def test_what_is_left_out_is_the_models_own(session: Session) -> None:
    body = session.post("txt2img", {"prompt": "a circle"}).json()
    info = json.loads(body["info"])
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (128, 128, 20, 2.0)
    assert info["sampler_name"] == "DDIM"


def test_batches_and_iterations_are_pictures_with_the_next_seeds(session: Session) -> None:
    body = session.post("txt2img", SMALL | {"batch_size": 2, "n_iter": 2}).json()
    info = json.loads(body["info"])
    assert len(body["images"]) == 4
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert len(set(body["images"])) == 4
    for seed, text in zip(info["all_seeds"], info["infotexts"], strict=True):
        assert f"Seed: {seed}," in text


@pytest.mark.parametrize("seed", [-1, None])
def test_a_random_seed_is_told(session: Session, seed: int | None) -> None:
    seeds = {json.loads(session.post("txt2img", SMALL | {"seed": seed}).json()["info"])["seed"] for _ in "ab"}
    assert len(seeds) == 2
    assert min(seeds) >= 0


def test_images_are_sent_unless_they_are_not_wanted(session: Session) -> None:
    body = session.post("txt2img", SMALL | {"send_images": False}).json()
    assert body["images"] == []
    assert json.loads(body["info"])["seed"] == 7


def test_unknown_fields_and_what_is_switched_off_are_ignored(session: Session) -> None:
    others = {
        "s_noise": 1,
        "do_not_save_grid": True,
        "enable_hr": False,
        "styles": [],
        "alwayson_scripts": {},
    }
    assert (
        session.post("txt2img", SMALL | others | {"override_settings": {"eta_noise": 3}}).status_code == 200
    )


def test_prompts_are_read_as_that_web_ui_reads_them(session: Session) -> None:
    session.post("txt2img", SMALL | {"override_settings": {"CLIP_stop_at_last_layers": 2}})
    assert session.request.prompt_weights
    assert session.request.long_prompts
    assert session.request.clip_skip == 1


@pytest.mark.parametrize(
    ("name", "scheduler", "ours"),
    [
        ("Euler a", None, "euler_a"),
        ("Euler", "Automatic", "euler"),
        ("Euler", "Karras", "euler_karras"),
        ("DPM++ 2M", None, "dpmpp_2m_karras"),
        ("DPM++ 2M", "automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("DPM++ 2M", "Exponential", "dpmpp_2m_exponential"),
        ("DPM++ 2M Karras", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", "Uniform", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE", "", "dpmpp_2m_sde_exponential"),
        ("DPM++ 3M SDE", None, "dpmpp_3m_sde_exponential"),
        ("DPM2 a", "", "dpm2_a_karras"),
        ("LMS Karras", None, "lms_karras"),
        ("PLMS", None, "pndm"),
        ("k_dpmpp_2m", "Uniform", "dpmpp_2m"),
        ("DDIM", None, "ddim"),
    ],
)
def test_samplers_by_their_names_there(name: str, scheduler: str | None, ours: str) -> None:
    info = sampler_of(name, scheduler)
    assert info is not None
    assert info.name == ours


@pytest.mark.parametrize(
    ("name", "scheduler", "told"),
    [
        ("DPM fast", None, "there is no sampler 'DPM fast'"),
        ("Euler", "Align Your Steps", "there is no scheduler 'Align Your Steps'"),
        ("DDIM", "Karras", "there is no sampler"),
    ],
)
def test_samplers_that_there_are_not(name: str, scheduler: str | None, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        sampler_of(name, scheduler)


def test_every_sampler_that_is_listed_can_be_asked_for(session: Session) -> None:
    listed = session.get("samplers")
    assert {"Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DDIM"} <= {each["name"] for each in listed}
    for each in listed:
        assert set(each) == {"name", "aliases", "options"}
        assert all(sampler_of(name, None) for name in (each["name"], *each["aliases"]))
    for each in session.get("schedulers"):
        assert sampler_of("DPM++ 2M", each["name"])
        assert sampler_of("DPM++ 2M", each["label"])


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_a_picture_is_painted_over(session: Session, head: str) -> None:
    body = session.post(
        "img2img", SMALL | {"init_images": [head + PICTURE], "denoising_strength": 0.6}
    ).json()
    assert session.request.strength == 0.6
    assert np.asarray(session.request.image)[0, 0].tolist() == [255, 165, 0]
    assert session.request.mask is None
    assert json.loads(body["info"])["denoising_strength"] == 0.6
    assert "Denoising strength: 0.6" in json.loads(body["info"])["infotexts"][0]
    assert "init_images" not in body["parameters"]


def test_pictures_are_told_back_if_they_are_asked_for(session: Session) -> None:
    fields = SMALL | {"init_images": [PICTURE], "include_init_images": True}
    assert session.post("img2img", fields).json()["parameters"]["init_images"] == [PICTURE]


def half(mode: str, left: Any, right: Any, size: tuple[int, int] = (128, 128)) -> str:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return packed(image)


@pytest.mark.parametrize(
    ("mask", "more"),
    [
        (half("L", 0, 255), {}),
        (half("RGB", "black", "white"), {}),
        (half("L", 0, 255, (64, 64)), {}),
        (half("L", 255, 0), {"inpainting_mask_invert": 1}),
        (half("RGBA", (0, 0, 0, 0), (9, 9, 9, 255)), {}),
        (half("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)), {}),
    ],
    ids=["gray", "colours", "smaller", "inverted", "drawn on a layer", "opaque"],
)
def test_white_is_painted_over(session: Session, mask: str, more: dict[str, int]) -> None:
    answer = session.post("img2img", SMALL | {"init_images": [PICTURE], "mask": mask} | more)
    assert answer.status_code == 200, answer.text
    painted = np.asarray(session.request.mask) > 127
    assert painted.shape == (128, 128)
    assert painted[:, 72:].all()
    assert not painted[:, :56].any()


def test_the_edge_of_a_mask_is_blurred(session: Session) -> None:
    fields = {"init_images": [PICTURE], "mask": half("L", 0, 255), "mask_blur": 8}
    assert session.post("img2img", SMALL | fields).status_code == 200
    mask = np.asarray(session.request.mask)
    assert 0 < mask[64, 60] < mask[64, 68] < 255


def test_a_picture_is_cropped_to_the_shape(session: Session) -> None:
    wide = half("RGB", "red", "blue", (256, 128))
    fields = {"init_images": [wide], "width": 128, "height": 128}
    assert session.post("img2img", SMALL | fields | {"resize_mode": 1}).status_code == 200
    assert session.request.image.size == (128, 128)
    answer = session.post("img2img", SMALL | fields | {"resize_mode": 2})
    assert answer.status_code == 400
    assert "resize_mode is 2" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"steps": 0}, 400, "num_inference_steps is 0"),
        ({"steps": 10**6}, 400, ""),
        ({"steps": "many"}, 422, "steps"),
        ({"width": 100}, 400, "the nearest valid sizes are 96 and 128"),
        ({"batch_size": 0}, 400, "batch_size is 0"),
        ({"batch_size": 1000, "n_iter": 1000}, 400, ""),
        ({"sampler_name": "DPM adaptive"}, 400, "there is no sampler"),
        ({"enable_hr": True}, 400, "enable_hr is true"),
        ({"script_name": "x/y/z plot"}, 400, "there is no script"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 400, "there is no script 'ControlNet'"),
        ({"override_settings": {"sd_model_checkpoint": "dream"}}, 404, "there is no model 'dream'"),
        ({"override_settings": {"sd_model_checkpoint": 5}}, 400, "sd_model_checkpoint is 5"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, 400, "CLIP_stop_at_last_layers is 0"),
        ({"seed": 2**70}, 400, "too large"),
    ],
)
def test_what_cannot_be_is_refused(session: Session, fields: dict[str, Any], status: int, told: str) -> None:
    answer = session.post("txt2img", SMALL | fields)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert told in body["errors"]
    assert body["detail"]
    assert body["error"]
    assert session.studio.asked == []


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({}, 422, "init_images"),
        ({"init_images": []}, 422, "init_images"),
        ({"init_images": [PICTURE, PICTURE]}, 422, "init_images"),
        ({"init_images": ["no picture!"]}, 400, "init_images is not base64"),
        ({"init_images": [base64.b64encode(b"GIF89a").decode()]}, 400, "no PNG, JPEG or WebP"),
        ({"init_images": ["http://127.0.0.1/a.png"]}, 400, "pictures are not fetched"),
        ({"init_images": [PICTURE], "mask": "%"}, 400, "mask is not base64"),
        ({"init_images": [PICTURE], "denoising_strength": 1.5}, 400, "strength is 1.5"),
        ({"init_images": [PICTURE], "denoising_strength": 0}, 400, "no step at all"),
    ],
)
def test_pictures_that_are_none(session: Session, fields: dict[str, Any], status: int, told: str) -> None:
    answer = session.post("img2img", SMALL | fields)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["errors"]
    assert session.studio.asked == []


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"cfg_scale": NaN}', b'{"cfg_scale": Infinity}', b"\xff"])
def test_bodies_that_are_no_request(session: Session, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    answer = session.http.post("/sdapi/v1/txt2img", content=body, headers=kind)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]


def test_progress_is_told_and_a_preview_shown(session: Session, pool: ThreadPoolExecutor) -> None:
    idle = session.get("progress")
    assert (idle["progress"], idle["current_image"], idle["state"]["job_count"]) == (0, None, 0)
    session.studio.hold()
    asked = pool.submit(session.post, "txt2img", SMALL | {"steps": 100})
    until(lambda: session.get("progress")["state"]["job_count"])
    session.studio.hold(after=30)
    until(lambda: session.get("progress")["progress"] == 0.3)
    until(lambda: session.get("progress")["current_image"])
    told = session.get("progress")
    assert told["eta_relative"] > 0
    assert told["state"]["sampling_steps"] == 100
    assert opened(told["current_image"]).size == (16, 16)
    assert session.get("progress?skip_current_image=true")["current_image"] is None
    session.studio.go()
    assert asked.result().status_code == 200
    assert session.get("progress")["state"]["job_count"] == 0


@pytest.mark.parametrize("path", ["interrupt", "skip"])
def test_a_painting_is_interrupted(session: Session, pool: ThreadPoolExecutor, path: str) -> None:
    session.studio.hold()
    asked = pool.submit(session.post, "txt2img", SMALL)
    until(lambda: session.get("progress")["state"]["job_count"])
    assert session.post(path, {}).json() == {}
    answer = asked.result()
    assert answer.status_code == 409
    assert "cancelled" in answer.json()["detail"]
    session.studio.go()
    assert session.post("txt2img", SMALL).status_code == 200


def test_an_interruption_of_nothing_is_none(session: Session) -> None:
    assert session.post("interrupt", {}).status_code == 200


@pytest.mark.parametrize("name", EMPTY)
def test_what_there_is_not_is_an_empty_list(session: Session, name: str) -> None:
    assert session.get(name) == []


def test_what_clients_ask_first(session: Session) -> None:
    model, other = session.get("sd-models")
    assert other["title"] == "other"
    assert (model["title"], model["model_name"], model["filename"]) == ("shapes", "shapes", "shapes")
    assert session.get("options")["sd_model_checkpoint"] == "shapes"
    assert session.get("cmd-flags")["api"] is True
    assert session.get("embeddings") == {"loaded": {}, "skipped": {}}
    assert session.get("scripts") == {"txt2img": [], "img2img": []}
    assert [each["name"] for each in session.get("upscalers")] == ["None"]
    assert session.post("refresh-checkpoints", {}).status_code == 200


@pytest.mark.parametrize("name", ["shapes", "shapes.safetensors", "shapes [9aba26abdf]", "shapes.ckpt [1a]"])
def test_models_by_what_clients_make_of_their_names(session: Session, name: str) -> None:
    assert model_of(name) == "shapes"
    fields = SMALL | {"override_settings": {"sd_model_checkpoint": name}}
    assert session.post("txt2img", fields).status_code == 200
    assert session.post("options", {"sd_model_checkpoint": name, "sd_vae": "x"}).status_code == 200


def test_a_model_that_there_is_not_cannot_be_chosen(session: Session) -> None:
    answer = session.post("options", {"sd_model_checkpoint": "dream"})
    assert answer.status_code == 404
    assert "there is no model 'dream'" in answer.json()["detail"]
    assert session.get("options")["sd_model_checkpoint"] == "shapes"


def test_keys_have_models_and_paintings_of_their_own(serve: Serve, pool: ThreadPoolExecutor) -> None:
    server = serve(FakeStudio(("shapes", "other"), LIMITS), api_keys=("anna", "bert"))
    anna = Session(server, headers={"x-api-key": "anna"})
    bert = Session(server, headers={"authorization": "Bearer bert"})
    with anna.http, bert.http:
        assert anna.post("options", {"sd_model_checkpoint": "other"}).status_code == 200
        assert anna.get("options")["sd_model_checkpoint"] == "other"
        assert bert.get("options")["sd_model_checkpoint"] == "shapes"
        assert json.loads(anna.post("txt2img", SMALL).json()["info"])["sd_model_name"] == "other"

        server.studio.hold()
        asked = pool.submit(anna.post, "txt2img", SMALL)
        until(lambda: anna.get("progress")["state"]["job_count"])
        assert bert.get("progress")["state"]["job_count"] == 0
        assert bert.post("interrupt", {}).status_code == 200
        server.studio.go()
        assert asked.result().status_code == 200


def as_password(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        (as_password(b"user:anna"), 200),
        (as_password(b"anna:wrong"), 401),
        (as_password(b"anna"), 401),
        (as_password(b"\xff:\xff"), 401),
        ("Basic %%%", 401),
    ],
)
def test_a_key_may_come_as_a_password(serve: Serve, authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    with Session(serve(api_keys=("anna",)), headers=headers).http as http:
        answer = http.get("/sdapi/v1/options")
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"] == "invalid_api_key"


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    server.studio.hold()
    with server.client() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/sdapi/v1/txt2img", json=SMALL, timeout=0.3)
    until(lambda: not server.studio.jobs())
