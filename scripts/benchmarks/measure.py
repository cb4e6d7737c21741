"""Interleaved timing, peak memory, counted FLOPs.

A round runs every variant once, in an order drawn again; a ratio is that of two runs of one round, so that what else the
machine does falls on all equally. What is reported is the median over the rounds, with the quartiles.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm

FEWEST = 3  # rounds, however long one takes
Quartiles = tuple[float, float, float]


def _attention(query, key, value, *rest, **named) -> int:
    return sdpa_flop(query, *(_as_many_heads(shape, query) for shape in (key, value)))


def _attention_backward(gradient, query, key, value, *rest, **named) -> int:
    return sdpa_backward_flop(gradient, query, *(_as_many_heads(shape, query) for shape in (key, value)))


def _as_many_heads(shape, query):
    """Return the shape of keys or values that several heads share, as PyTorch's formulas want it: a copy for each head."""
    return (shape[0], query[1], *shape[2:])


def _addmm(self, a, b, *rest, **named) -> int:
    return addmm_flop(self, a, b)


def _baddbmm(self, a, b, *rest, **named) -> int:
    return baddbmm_flop(self, a, b)


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
# What PyTorch's own table leaves out: products added in place, attention on a CPU, heads that share keys and values.
MORE_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: _addmm,
    torch.ops.aten.baddbmm_: _baddbmm,
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention for name in KERNELS},
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward for name in KERNELS},
}


@dataclass
class Case:
    """One variant to be measured.

    ``run`` is what is timed, or returns the seconds of the part of it that counts; ``tokens`` go through it.
    """

    run: Callable[[], float | None]
    tokens: int


@dataclass
class Point:
    """The measurements of several variants in the same rounds."""

    settings: dict[str, Any]  # what says this point from the others of its level
    tokens: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # variant -> by round
    peak: dict[str, int] = field(default_factory=dict)  # bytes beyond those that lived before the run
    flops: dict[str, int] = field(default_factory=dict)
    missing: str | None = None  # why nothing was measured

    def ratios(self, variant: str, base: str) -> list[float]:
        """Time of ``variant`` by that of ``base``, by round."""
        return [own / other for own, other in zip(self.seconds[variant], self.seconds[base], strict=True)]

    def shares(self, variant: str, base: str = "bare") -> list[float]:
        """The share of the variant's time that ``base`` does without, by round."""
        return [1 - 1 / ratio for ratio in self.ratios(variant, base)]

    def beyond(self, variant: str, base: str = "bare") -> int:
        """Bytes of peak memory more than ``base`` takes."""
        return self.peak[variant] - self.peak[base]


def quartiles(values: Sequence[float]) -> Quartiles:
    """Lower quartile, median, upper quartile; of a single value three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], float | None], device: torch.device) -> float:
    """Seconds of one run, all its kernels done; on a GPU between two events of its stream."""
    if device.type == "cuda":
        synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        own = run()
        end.record()
        synchronize(device)
        return own if own is not None else start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    own = run()
    return own if own is not None else time.perf_counter() - start_time


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes that lived at once during the run, beyond those that lived before.

    On a CPU every allocation and release of PyTorch's allocator is counted (not what oneDNN or MKL take for themselves);
    on a GPU ``max_memory_allocated`` says.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # stable: as recorded where the clock stood still
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def counted_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions of a run."""
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        run()
    return counter.get_total_flops()


def measure(cases: dict[str, Case], arguments: Namespace, settings: dict[str, Any]) -> Point:
    """Warm up, count memory and FLOPs, then time the cases in interleaved rounds.

    Args:
        cases: variant -> what to run.
        arguments: ``device``, ``rounds``, ``warm_up``, ``seconds`` (for all rounds together, or None), ``seed``.
        settings: of the point.
    """
    device = torch.device(arguments.device)
    point = Point(settings, next(iter(cases.values())).tokens)
    label = ", ".join(f"{key} {value}" for key, value in settings.items()) or "rounds"
    begin = time.perf_counter()
    with tqdm(total=len(cases) * (arguments.warm_up + 2), desc=f"{label}: memory, FLOPs", disable=None) as bar:
        for name, case in cases.items():
            for _ in range(arguments.warm_up):
                case.run()
                bar.update()
            point.peak[name] = peak_bytes(case.run, device)
            bar.update()
            point.flops[name] = counted_flops(case.run)
            bar.update()
    point.seconds = interleaved(cases, arguments, label)
    if not sys.stderr.isatty():  # where no bars are drawn
        rounds = min(map(len, point.seconds.values()))
        print(f"{label}: {rounds} rounds, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return point


def interleaved(cases: dict[str, Case], arguments: Namespace, label: str) -> dict[str, list[float]]:
    """Seconds of each case by round; one round before them is not kept."""
    device, draw = torch.device(arguments.device), random.Random(arguments.seed)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    begin, collects = time.perf_counter(), gc.isenabled()
    with tqdm(total=(1 + arguments.rounds) * len(cases), desc=label, disable=None) as bar:
        for number in range(1 + arguments.rounds):
            late = arguments.seconds is not None and time.perf_counter() - begin > arguments.seconds
            if late and number > FEWEST:
                break
            gc.collect()
            gc.disable()
            try:
                for name in draw.sample(list(cases), len(cases)):
                    taken = seconds_of(cases[name].run, device)
                    if number:
                        seconds[name].append(taken)
                    bar.update()
            finally:
                if collects:
                    gc.enable()
    return seconds
