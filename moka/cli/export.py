"""Write a trained run in a format that others can use, and verify what was written.

moka export runs/mine --format text-merged --output merged    nothing is lost; for moka (the same as `moka merge`)
moka export runs/mine --format hf-backbone --output bare      a plain transformers model, for text
moka export runs/mine --format lora --output lora             a plain peft LoRA of one modality's path
"""

from __future__ import annotations

import argparse

import transformers

from moka.export import ExportReport, export
from moka.export.formats import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--modality", metavar="NAME", help="for lora: whose path to export (default text)")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `moka merge` too."""
    parser.add_argument("run", help="run folder of `moka train`, or an adapter folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must not hold anything")
    parser.add_argument("--samples", metavar="FILE", help="JSONL file of chats to compare on, besides random inputs")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help="of the weights (default float32)"
    )


def run(arguments: argparse.Namespace) -> None:
    write(arguments, arguments.format, arguments.modality)


def write(arguments: argparse.Namespace, format: str, modality: str | None = None) -> None:
    """Export and print the report."""
    transformers.utils.logging.disable_progress_bar()
    report = export(
        arguments.run,
        arguments.output,
        format,
        modality=modality,
        samples=arguments.samples,
        overwrite=arguments.overwrite,
        backbone=arguments.backbone,
        dtype=arguments.dtype,
    )
    print(_table(report))


_BACKBONE = "its own weights, not the {} ones of training, which a merge would round again"


def _table(report: ExportReport) -> str:
    rows = [
        ("format", report.format),
        ("written", str(report.output)),
        *([("backbone", _BACKBONE.format(report.trained_on))] if report.trained_on else []),
        ("modules changed / expected", f"{report.changed} / {report.expected}"),
        ("largest logit difference", f"{report.largest_difference:.2g} of the largest logit"),
        *(("lost", item) for item in report.lost),
        *((f"difference, {name}", f"{value:.2g} (lost)") for name, value in report.losses.items()),
        ("size on disk", _size(report.bytes)),
        ("next", report.next_command),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
