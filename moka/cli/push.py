"""Publish a trained run on the Hugging Face Hub: adapter, connectors, processor, configuration, model card with figures.

  moka push runs/quickstart me/digits --dry-run    show what would go, and the card
  moka push runs/quickstart me/digits --private

Afterwards moka.load("me/digits"), `moka generate me/digits ...` and `moka serve me/digits` take it by name. The token is that
of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse

from moka.hub import CARD, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of `moka train`, or an adapter folder")
    parser.add_argument("repo", metavar="USER/NAME", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is for you only")
    parser.add_argument("--dry-run", action="store_true", help="show the files and the card; send nothing")


def run(arguments: argparse.Namespace) -> None:
    upload = prepare(arguments.run, arguments.repo)
    for name, size in upload.sizes().items():
        print(f"{size:>12,}  {name}")
    for note in upload.notes:
        print(f"note: {note}")
    if arguments.dry_run:
        text = upload.files[CARD]
        print("\n" + (text.decode() if isinstance(text, bytes) else ""))
    else:
        print(f"done: {upload.send(arguments.private)}")
