"""`allaprima inspect`: what is in a bundle or a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from allaprima.bundle import Bundle, Component, Manifest, TensorSpec, open_bundle, resolve
from allaprima.cli.output import add_json, print_json, print_table, show_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("path", metavar="PATH", help="a bundle's folder, a built-in name, or a picture")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file of a bundle")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Show it."""
    path = Path(options.path)
    if path.is_file():
        _show_picture(path, as_json=options.json)
    else:
        _show_bundle(open_bundle(resolve(options.path), verify=options.verify), options)


def _show_picture(path: Path, *, as_json: bool) -> None:
    from allaprima.runtime import read_parameters

    parameters: Mapping[str, object] = read_parameters(path)
    if as_json:
        print_json({"kind": "picture", "path": str(path), "parameters": dict(parameters)})
    else:
        print_table(("", ""), parameters.items(), title=str(path))


def _show_bundle(bundle: Bundle, options: argparse.Namespace) -> None:
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    if options.json:
        summary = {"kind": "bundle", "folder": str(bundle.folder), "bytes": size, "verified": options.verify}
        print_json({**summary, "manifest": manifest.to_json()})
        return
    defaults, latent = manifest.defaults, manifest.latent
    checked = "sizes and sha256 are right" if options.verify else "sizes are right (--verify checks sha256)"
    facts = {
        "name": manifest.name,
        "family": manifest.family,
        "precision": _precision(manifest),
        "size": f"{show_bytes(size)} in {len(manifest.files)} files; {checked}",
        "pictures": f"{defaults.width}x{defaults.height}; both sides multiples of {latent.multiple}",
        "scheduler": manifest.scheduler.get("_class_name", "unknown"),
        "sampling": f"{defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}",
        "prompt": f"up to {next(iter(manifest.tokenizers.values())).room} tokens",
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    print_table(("", ""), facts.items(), title=str(bundle.folder))
    print_table(
        ("component", "weights", "inputs", "outputs", "error against torch"),
        [_row(name, component) for name, component in manifest.components.items()],
    )


def _precision(manifest: Manifest) -> str:
    made = manifest.components["denoiser"].quantization if "denoiser" in manifest.components else None
    return (
        manifest.precision
        if made is None
        else f"{manifest.precision}, large layers of the denoiser in {made.dtype}"
    )


def _row(name: str, component: Component) -> tuple[str, ...]:
    worst = max((parity.relative for parity in component.parity), default=None)
    error = "not measured" if worst is None else f"{worst:.1e} of the deviation"
    weights = ", ".join(filter(None, (component.precision, component.weights)))
    if (made := component.quantization) is not None:
        weights += f"\n{made.layers} of {made.total} layers compute in {made.dtype}"
        error = f"{made.error:.1e} of the deviation, against the graph in {component.precision}"
    return name, weights, _list(component.inputs), _list(component.outputs), error


def _list(specs: tuple[TensorSpec, ...]) -> str:
    return "\n".join(f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)
