"""From what was asked for to a plan and its contestants, with the reason for each that there is not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from allaprima.benchmarks.checkpoints import SHAPES
from allaprima.benchmarks.contestants import Contestant, Field, check_peer, find_peers
from allaprima.benchmarks.ours import ON_CPU, contestant, ways
from allaprima.benchmarks.plan import Plan, Settings, Work, grid
from allaprima.benchmarks.process import in_new_process, reason_of
from allaprima.benchmarks.quality import choose_reference
from allaprima.bundle import (
    BackendError,
    Bundle,
    RequestError,
    builtin_bundle,
    open_bundle,
    resolve,
)
from allaprima.cli.machine import read_machine

PROMPT = "a red circle above a blue square on a white background"
STEPS = (1, 4, 8, 20, 30, 50)


@dataclass(frozen=True)
class Asked:
    """The options of the command; None and () are its defaults, which depend on the bundle."""

    bundles: tuple[str, ...]
    steps: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    backends: tuple[str, ...] = ("auto",)
    precisions: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    checkpoint: Path | None = None
    fixed: bool = False
    prompt: str = PROMPT
    sampler: str | None = None
    guidance: float | None = None
    seed: int = 7
    threads: int | None = None
    rounds: int = 3
    repeats: int = 3


@dataclass(frozen=True)
class Lineup:
    """What is to be measured; `absent` has the reason by name.

    `reference` paints what pictures are compared with, where no contestant computes in fp32. `notes` say what
    seems wrong. `sdxl` says whether the model is Stable Diffusion XL.
    """

    name: str
    plan: Plan
    contestants: tuple[Contestant, ...]
    absent: dict[str, str]
    reference: Contestant | None = None
    notes: tuple[str, ...] = ()
    sdxl: bool = False


def line_up(asked: Asked, *, table: bool) -> Lineup:
    """Check what was asked for and find everybody; `table` says that all step counts are wanted by default.

    Raises BundleError, BackendError or RequestError.
    """
    for name in asked.peers:
        check_peer(name.partition(":")[0])
    first, *_ = bundles = [open_bundle(resolve(name)) for name in asked.bundles]
    plan = _plan(asked, first, table=table)
    for bundle in bundles:
        _check(bundle, plan.works, plan.settings)
    contestants, absent = _ours(asked, bundles)
    checkpoint = asked.checkpoint or _own_checkpoint(first)
    field = Field(asked.bundles[0], checkpoint, any(each.backend not in ON_CPU for each in contestants))
    for name in asked.peers:
        try:
            contestants += _in_precision(name, field)
        except Exception as error:  # a peer that cannot be made ready is a result, not the end
            absent[name] = reason_of(error)
    names = [each.name for each in contestants]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"{', '.join(double)}: two contestants of one name, leave one out")
    doubts = _doubts(first, checkpoint)
    reference = None if doubts else _reference(contestants, field)
    manifest = first.manifest
    sdxl = manifest.family == "stable-diffusion" and "text_encoder_2" in manifest.components
    return Lineup(manifest.name, plan, tuple(contestants), absent, reference, doubts, sdxl)


def _reference(contestants: Sequence[Contestant], field: Field) -> Contestant | None:
    """diffusers in fp32, if it is here and nobody else can be compared with."""
    from allaprima.benchmarks import peer_diffusers

    if choose_reference(contestants) is not None:
        return None
    with suppress(Exception):  # it is a help, and its lack is told where pictures are compared
        return peer_diffusers.reference(field)
    return None


def _doubts(bundle: Bundle, checkpoint: Path | None) -> tuple[str, ...]:
    """Why a checkpoint cannot be the one that the bundle was made of, by the sizes of its UNet."""
    path = (checkpoint or Path()) / "unet" / "config.json"
    if checkpoint is None or bundle.manifest.family != "stable-diffusion" or not path.is_file():
        return ()
    try:
        unet = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return (f"{path.relative_to(path.parents[2])} cannot be read: {error}",)
    if not isinstance(unet, dict):
        return (f"{path.relative_to(path.parents[2])} is no configuration of a UNet",)
    latents, texts = bundle.manifest.latent.channels, _text_width(bundle)
    found = []
    if latents not in (unet.get("in_channels", 4), unet.get("out_channels", 4)):  # inpainting reads more
        found.append(f"{unet.get('in_channels', 4)} channels of latents, the bundle {latents}")
    width = unet.get("cross_attention_dim", 1280)
    if texts is not None and isinstance(width, int) and width != texts:
        found.append(f"text embeddings of width {width}, the bundle of {texts}")
    begin = f"{checkpoint.name} is not the checkpoint of {bundle.manifest.name}: it has"
    end = "other libraries paint with another model, so give --checkpoint DIR of the bundle's"
    return tuple(f"{begin} {each}; {end}" for each in found)


def _text_width(bundle: Bundle) -> int | None:
    """Of all text encoders' states together, which the graph puts side by side."""
    specs = bundle.component("denoiser").inputs
    widths = [spec.shape[-1] for spec in specs if spec.name.startswith("encoder_hidden_states")]
    return sum(width for width in widths if isinstance(width, int)) or None


def _in_precision(name: str, field: Field) -> list[Contestant]:
    """The contestants of "NAME", or those of "NAME:PRECISION" alone."""
    peer, _, precision = name.partition(":")
    found = find_peers(peer, field)
    chosen = [each for each in found if precision in ("", each.precision)]
    if not chosen:
        here = ", ".join(dict.fromkeys(each.precision for each in found))
        raise BackendError(f"{peer} is not measured in {precision} here, but in {here}")
    return chosen


def _plan(asked: Asked, bundle: Bundle, *, table: bool) -> Plan:
    manifest = bundle.manifest
    defaults = manifest.defaults
    sampler = asked.sampler
    if sampler is None and manifest.family == "stable-diffusion":
        # One call of the model for each step, and known to every peer.
        sampler = "euler"
    guidance = defaults.guidance_scale if asked.guidance is None else asked.guidance
    threads = read_machine().cores if asked.threads is None else asked.threads
    steps = asked.steps or (STEPS if table else (defaults.num_inference_steps,))
    sizes = asked.sizes or ((defaults.width, defaults.height),)
    settings = Settings(asked.prompt, sampler, asked.seed, guidance, threads)
    return Plan(grid(steps, sizes, asked.batches), settings, asked.rounds, asked.repeats)


def _check(bundle: Bundle, works: Iterable[Work], settings: Settings) -> None:
    """Refuse what no contestant could paint, before anything is measured."""
    from allaprima.runtime.request import Request
    from allaprima.runtime.samplers import find

    if settings.sampler is not None:
        find(settings.sampler)
    for work in works:
        Request(
            settings.prompt,
            num_inference_steps=work.steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            seed=settings.seed,
            height=work.height,
            width=work.width,
            num_images=work.batch,
        ).check(bundle.manifest)


def _ours(asked: Asked, bundles: Sequence[Bundle]) -> tuple[list[Contestant], dict[str, str]]:
    contestants: list[Contestant] = []
    absent: dict[str, str] = {}
    for name, bundle in zip(asked.bundles, bundles, strict=True):
        label = bundle.folder.name if len(bundles) > 1 else ""
        for way in in_new_process(ways, name, asked.backends, asked.precisions):
            each = contestant(name, way, label)
            if way.refused:
                absent[each.name] = way.refused
                continue
            contestants.append(each)
            if asked.fixed and way.backend == "openvino":
                contestants.append(contestant(name, way, label, fixed=True))
    return contestants, absent


def _own_checkpoint(bundle: Bundle) -> Path | None:
    """The checkpoint of the built-in model, in a checkout."""
    if bundle.manifest.name == "shapes" and SHAPES.is_dir() and bundle.folder == builtin_bundle("shapes"):
        return SHAPES
    return None
