"""Merge the text path of a trained run into its backbone: the same answers, and no adapter work for text.

  moka merge runs/mine --output merged
  moka generate merged "Your question?"

Short for `moka export --format text-merged`.
"""

from __future__ import annotations

import argparse

from moka.export.formats import TEXT_MERGED

from .export import add_common_arguments, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    write(arguments, TEXT_MERGED)
