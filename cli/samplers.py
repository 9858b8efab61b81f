"""`allaprima samplers`: the samplers there are."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from allaprima.cli.output import add_json, print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """List them."""
    from allaprima.runtime import samplers

    infos = samplers.names()
    if options.json:
        print_json([asdict(info) for info in infos])
        return
    print_table(
        ("name", "also known as", "calls", "noise", "history", "arguments", "description"),
        [
            (
                info.name,
                ", ".join((info.title, *info.aliases)),
                str(info.calls),
                info.noise,
                str(info.history),
                ", ".join(info.arguments),
                info.description,
            )
            for info in infos
        ],
    )
