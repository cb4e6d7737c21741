"""The bars of the method, each bar measured by a command of this benchmark."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from .measure import Point, quartiles
from .report import spread

Points = list[Point]


@dataclass(frozen=True)
class Bar:
    """``measured`` gives one number a round, or a single one; ``above``: whether the limit is the smallest allowed."""

    what: str
    text: str
    command: str
    measured: Callable[[Points], list[float]]
    limit: float
    above: bool = False

    def met(self, points: Points) -> bool | None:
        """None: not measured."""
        if any(point.missing for point in points):
            return None
        value = median(self.measured(points))
        return value >= self.limit if self.above else value <= self.limit


def _time(variant: str, base: str) -> Callable[[Points], list[float]]:
    return lambda points: points[0].ratios(variant, base)


def _speed(variant: str, base: str) -> Callable[[Points], list[float]]:
    return lambda points: points[0].ratios(base, variant)


def _memory(points: Points) -> list[float]:
    return [points[0].beyond("moka") / points[0].beyond("lora")]


def _growth(points: Points) -> list[float]:
    """How much larger the adapter's share is at the last length than at the first, by round."""
    first, last = points[0].shares("moka"), points[-1].shares("moka")
    return [late - early for early, late in zip(first, last, strict=False)]


LAYER, STEP, PREFILL, DECODE = "layer", "step --checkpointing no", "prefill", "decode"
GROWTH = "growth --curves seq --shortest 512 --longest 4096 --variants moka --seconds 120"
LARGE = "ladder --sizes random:7b --variants lora moka --only-dtype bfloat16"
BARS = (
    Bar("one layer, forward + backward", "MokA <= 0.85 x LoRA", LAYER, _time("moka", "lora"), 0.85),
    Bar("full training step", "MokA <= 0.92 x LoRA", STEP, _time("moka", "lora"), 0.92),
    Bar("extra peak memory over bare, same step", "MokA <= 0.40 x LoRA", STEP, _memory, 0.40),
    Bar("plain reference / MokA, same step", ">= 1.3", STEP, _time("reference", "moka"), 1.3, above=True),
    Bar("decode tokens/s, merged", ">= 0.98 x bare", DECODE, _speed("moka merged", "bare"), 0.98, above=True),
    Bar("decode tokens/s, unmerged", ">= 1.0 x LoRA", DECODE, _speed("moka", "lora"), 1.0, above=True),
    Bar("prefill", "MokA <= 1.05 x LoRA", PREFILL, _time("moka", "lora"), 1.05),
    Bar("adapter's share of the step, 4096 - 512 tokens", "<= 0", GROWTH, _growth, 0.0),
    Bar("7B, bf16, checkpointing, 4 x 2048: step", "MokA <= 1.0 x LoRA", LARGE, _time("moka", "lora"), 1.0),
    Bar("7B, bf16, checkpointing, 4 x 2048: memory", "MokA <= 1.0 x LoRA", LARGE, _memory, 1.0),
)


def commands(arguments: Namespace) -> Iterator[str]:
    """The commands of all bars, each once, with the options that were given to all of them."""
    for command in dict.fromkeys(bar.command for bar in BARS):
        level = command.split()[0]
        words = [command, f"--seed {arguments.seed} --warm-up {arguments.warm_up}"]
        if level in ("step", "prefill", "decode"):
            words.append(f"--backbone {arguments.backbone}")
        if level == "growth":
            words.append(f"--backbone {arguments.growth_backbone}")
        for name in ("rounds", "seconds", "threads"):
            if getattr(arguments, name) is not None:
                words.append(f"--{name} {getattr(arguments, name):g}")
        yield " ".join(words)


def rows(found: dict[str, Points]) -> list[dict[str, Any]]:
    """One record a bar; ``found``: by the bar's command. ``noise``: of the bare backbone's second copy to the first."""
    records = []
    for bar in BARS:
        points = found[bar.command]
        record: dict[str, Any] = {"what": bar.what, "bar": bar.text, "command": bar.command}
        met = bar.met(points)
        if met is None:
            record |= {"measured": None, "noise": None, "met": None, "missing": points[0].missing}
        else:
            again = "bare again" in points[0].seconds
            noise = quartiles(points[0].ratios("bare again", "bare")) if again else None
            record |= {"measured": quartiles(bar.measured(points)), "noise": noise, "met": met}
        records.append(record)
    return records


HEADER = ["what", "bar", "measured", "bare again / bare", "met"]


def cells(record: dict[str, Any]) -> list[str]:
    """One row of the table."""
    if record["measured"] is None:
        return [record["what"], record["bar"], record["missing"], "", ""]
    noise = "" if record["noise"] is None else spread(record["noise"], ".3f")
    return [record["what"], record["bar"], spread(record["measured"], ".3f"), noise, "yes" if record["met"] else "NO"]
