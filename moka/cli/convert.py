"""Read the MokA authors' checkpoint folder into a moka adapter folder, or write one back in their layout.

moka convert checkpoints/avt --output adapter --backbone meta-llama/Llama-2-7b-chat-hf
moka convert adapter --output back --to official-avt
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of the authors' checkpoint; with --to, a moka adapter folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--to", metavar="LAYOUT", help="write the authors' layout: official-avt or official-vt")
    parser.add_argument("--backbone", metavar="NAME", help="the language model, to be recorded in the configuration")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter folder at --output")


def run(arguments: argparse.Namespace) -> None:
    from moka.export.official import convert

    summary = convert(
        arguments.source,
        arguments.output,
        to=arguments.to,
        backbone=arguments.backbone,
        overwrite=arguments.overwrite,
    )
    print("\n".join(summary.lines()))
