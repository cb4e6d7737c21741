"""The command line: one subcommand a level."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from .growth import CURVES, LADDER
from .sizes import DTYPES, EMBEDDED, PREFIX, SHAPES
from .variants import ALL, OBSERVED

# level -> its help, and what differs from the defaults below
LEVELS: dict[str, tuple[str, dict]] = {
    "layer": ("one linear map, forward + backward, gradient of the input too", {"rounds": 30}),
    "block": ("one decoder block of the backbone's shape, forward + backward", {"rounds": 20}),
    "step": ("a full training step, without gradient checkpointing and with it", {"batch": 16, "seq": 64}),
    "prefill": ("a prompt of media and text", {"batch": 1, "rounds": 20}),
    "decode": ("tokens/s after a prompt, merged and live", {"batch": 1, "seq": 64, "rounds": 20}),
    "growth": (
        "training steps of growing size: what the adapter's share of the step does",
        {"rounds": 7, "seconds": 60},
    ),
    "ladder": ("training steps of tiny to 7B backbones (1B and 7B where there is a GPU)", {"rounds": 5}),
    "profile": ("where the time of a training step goes", {"batch": 16, "seq": 64, "rounds": 3, "checkpointing": "no"}),
    "bars": ("what the method is kept to, one line a bar: measured, met or not", {}),
    "all": ("every level, in about --minutes", {}),
}
DEFAULTS = {
    "batch": 4,
    "seq": 512,
    "rounds": 10,
    "warm_up": 2,
    "seconds": None,
    "checkpointing": "both",
    "backbone": EMBEDDED,
}
# Of levels without the option.
UNSAID = {"device": "cpu", "dtype": "float32", "compile": False, "checkpointing": "no", "variants": None}
SMALL = "random:4m"  # so that a growth curve takes minutes
# Levels that take the options of a batch, and of a backbone.
WITH_BATCH = ("layer", "block", "step", "prefill", "decode", "growth", "ladder", "profile")
WITH_BACKBONE = ("block", "step", "prefill", "decode", "growth", "profile", "bars", "all")


def build(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of all levels; every level has its own ``--help``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmark.py", description=description, formatter_class=raw)
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")
    for name, (text, own) in LEVELS.items():
        level = levels.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        defaults = {**DEFAULTS, **own}
        if name == "growth":
            defaults["backbone"] = SMALL
        _measuring(level, defaults, name)
        if name in WITH_BATCH:
            _batch(level, defaults, name)
        if name in WITH_BACKBONE:
            text = f"{EMBEDDED}, a folder, a hub name, or {PREFIX}{{{','.join(SHAPES)}}}"
            level.add_argument("--backbone", default=defaults["backbone"], help=text)
        if name in ("step", "profile"):
            modes = ("no", "yes", "both")[: 2 if name == "profile" else 3]
            level.add_argument(
                "--checkpointing", choices=modes, default=defaults["checkpointing"], help="of gradients, non-reentrant"
            )
        _particular(level, name)
    return parser


def _measuring(level: argparse.ArgumentParser, defaults: dict, name: str) -> None:
    add = level.add_argument_group("measuring").add_argument
    several = name in ("bars", "all")
    rounds = None if several else defaults["rounds"]
    text = "interleaved runs of all variants" + ("; None: each level's own" if several else "")
    add("--rounds", type=int, default=rounds, help=text)
    add("--warm-up", type=int, default=defaults["warm_up"], help="runs of each variant before the first round")
    text = "begin no new round of a point after this long (3 rounds at least)"
    if name not in ("profile", "all"):
        add("--seconds", type=float, default=defaults["seconds"], help=text)
    add("--seed", type=int, default=0, help="of tokens, random weights, and the order within a round")
    if name != "bars":
        add("--device", default="cpu", help="cpu or cuda; in ladder and all, of sizes that a CPU can run")
    if name not in ("bars", "ladder"):
        text = "of the backbone; bfloat16 and nf4 train under autocast"
        add("--dtype", choices=list(DTYPES), default="float32", help=text)
    add("--threads", type=int, help="of PyTorch; None: as many as it takes itself")
    if name in ("layer", "block", "step"):
        add("--compile", action="store_true", help="run under torch.compile (slow to start)")
    if not several:
        add(
            "--variants",
            nargs="+",
            choices=[*ALL, "moka merged", OBSERVED],
            help="next to the two bare backbones; None: all",
        )
    add("--json", type=Path, help="where to write; None: runs/benchmarks/LEVEL.json, with a plot next to it")
    add("--format", choices=("text", "markdown"), default="text", help="of the table")


def _batch(level: argparse.ArgumentParser, defaults: dict, name: str) -> None:
    add = level.add_argument_group("batch and adapter").add_argument
    add("--batch", type=int, default=defaults["batch"], help="rows")
    names = ("--prompt", "--seq") if name == "decode" else ("--seq",)
    add(*names, dest="seq", type=int, default=defaults["seq"], help="tokens of a row")
    add("--media", type=float, default=0.6, help="share of the tokens that are media")
    add("--modalities", type=int, default=3, help="text and this many less one others, 1 to 6")
    text = "the question's share of the text (the answer is the rest), or from 1 on its number of tokens"
    add("--question", type=float, default=0.5, help=text)
    add("--padding", type=float, default=0.0, help="share of every second row that is padding, on the left")
    add("--rank", type=int, default=4, help="of the adapters; alpha is 4 times that")
    add("--dropout", type=float, default=0.05, help="of the adapters")


def _particular(level: argparse.ArgumentParser, name: str) -> None:
    add = level.add_argument
    if name == "layer":
        add("--inputs", type=int, default=1024, help="width of the layer's input")
        add("--outputs", type=int, default=1024, help="width of the layer's output")
    if name == "decode":
        add("--tokens", type=int, default=32, help="tokens decoded in each measurement")
    if name in ("growth", "all"):
        add("--curves", nargs="+", choices=list(CURVES), default=list(CURVES), help="what grows")
    if name in ("growth", "all"):
        add("--shortest", type=int, default=128, help="of the curve over tokens of a row")
        add("--longest", type=int, default=8192, help="of the curve over tokens of a row")
    if name in ("ladder", "all"):
        sizes = list(dict.fromkeys(row[0] for row in LADDER))
        add("--sizes", nargs="+", choices=sizes, help="None: all that the machine can run")
        add("--only-dtype", choices=list(DTYPES), help="of the sizes that are measured in several")
    if name in ("bars", "all"):
        add("--growth-backbone", default=SMALL, help="of the curve over tokens of a row")
    if name == "all":
        add(
            "--minutes",
            type=float,
            default=60,
            help="a hint: timing stops about then; counting and warm-up come on top",
        )


def parse(words: Sequence[str], description: str | None = None) -> Namespace:
    """The options of one level, with those it has no use for at their defaults."""
    arguments = build(description).parse_args(list(words))
    for name, value in {**DEFAULTS, **UNSAID}.items():
        if not hasattr(arguments, name):
            setattr(arguments, name, value)
    arguments.command = " ".join(["python scripts/benchmark.py", *words])
    return arguments


def commands_of_all(arguments: Namespace, points: int) -> Iterator[list[str]]:
    """The command of every level, with the options of ``all``; the minutes are shared out evenly over the points."""
    seconds = f"{60 * arguments.minutes / points:.0f}"
    for level in (name for name in LEVELS if name not in ("bars", "all")):
        command = [level, "--seed", str(arguments.seed), "--format", arguments.format]
        if level != "profile":
            command += ["--seconds", seconds]
        if level in WITH_BACKBONE:
            command += ["--backbone", arguments.growth_backbone if level == "growth" else arguments.backbone]
        for name in ("rounds", "threads", "warm_up", "device", "dtype"):
            if getattr(arguments, name) is not None and (level, name) != ("ladder", "dtype"):
                command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        if level == "growth":
            lengths = ["--shortest", str(arguments.shortest), "--longest", str(arguments.longest)]
            command += ["--curves", *arguments.curves, *lengths]
        if level == "ladder" and arguments.sizes:
            command += ["--sizes", *arguments.sizes]
        if level == "ladder" and arguments.only_dtype:
            command += ["--only-dtype", arguments.only_dtype]
        if arguments.json:
            command += ["--json", str(arguments.json.with_name(f"{arguments.json.stem}-{level}.json"))]
        yield command
