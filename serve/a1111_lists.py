"""What clients of AUTOMATIC1111's web UI ask before they paint: what there is, and all that there is not."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from allaprima.runtime.samplers import names
from allaprima.runtime.samplers.catalog import RULES
from allaprima.serve.a1111_fields import USUAL_RULES
from allaprima.serve.context import Here
from allaprima.serve.failures import Detail, documented

EMPTY = (
    "latent-upscale-modes",
    "sd-vae",
    "sd-modules",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "loras",
    "script-info",
    "extensions",
)
"""What that web UI has and this server has not, each a list."""
PREFIX, TAG = "/sdapi/v1", "AUTOMATIC1111"
LISTING = documented(401, 403, 500, model=Detail)

router = APIRouter(prefix=PREFIX, tags=[TAG])
Listed = list[dict[str, Any]]


@router.get("/sd-models", responses=LISTING)
async def models(here: Here) -> Listed:
    """The models that are served."""
    nothing = {"hash": None, "sha256": None, "config": None}
    listed = [model.name for model in here.studio.models()]
    return [{"title": name, "model_name": name, "filename": name, **nothing} for name in listed]


@router.get("/samplers", responses=LISTING)
async def samplers() -> Listed:
    """The samplers, those with a rule for sigmas in their names too."""
    return [
        {
            "name": info.title,
            "aliases": [info.name, *info.aliases],
            "options": {"scheduler": USUAL_RULES[info.name]} if info.name in USUAL_RULES else {},
        }
        for info in names()
    ]


@router.get("/schedulers", responses=LISTING)
async def schedulers() -> Listed:
    """The ways to space sigmas."""
    rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    return [{"name": name, "label": name.title(), **rest} for name in ("automatic", "uniform", *RULES)]


@router.get("/cmd-flags", responses=LISTING)
async def flags() -> dict[str, Any]:
    """The flags of that web UI's command line that make sense here."""
    return {"api": True, "nowebui": True}


@router.get("/upscalers", responses=LISTING)
async def upscalers() -> Listed:
    """That of no name, which clients expect."""
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}]


@router.get("/embeddings", responses=LISTING)
async def embeddings() -> dict[str, Any]:
    """None."""
    return {"loaded": {}, "skipped": {}}


@router.get("/scripts", responses=LISTING)
async def scripts() -> dict[str, list[str]]:
    """None."""
    return {"txt2img": [], "img2img": []}


@router.post("/refresh-checkpoints", responses=LISTING)
async def refresh() -> None:
    """Nothing: the models are those that the server was started with."""


async def nothing() -> Listed:
    """None."""
    return []


for _name in EMPTY:
    router.add_api_route(f"/{_name}", nothing, methods=["GET"], responses=LISTING, name=_name)
