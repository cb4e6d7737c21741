"""Time, memory and FLOPs of MokA, peft's LoRA, the bare backbone and a plain reference: one process, interleaved.

    python scripts/benchmark.py bars                        # what the method is kept to, one line a bar
    python scripts/benchmark.py step                        # a training step of the embedded 135M backbone
    python scripts/benchmark.py decode --backbone FOLDER --rounds 20 --json decode.json
    python scripts/benchmark.py LEVEL --help

Each round runs every variant once, in an order drawn again; ratios are taken within a round, so that what else the
machine does falls on all of them equally. Printed: median [lower quartile, upper quartile] over the rounds. "bare again"
is a second copy of the bare backbone: what its ratio is off 1 is the measurement's own error. Before anything is
measured, MokA and the plain reference must give the same numbers. docs/speed.md says more.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory says of each start

import torch
import transformers
from benchmarks import bars, growth, levels, machine, options, plots, profiling, report

from moka import MokaError

RUN = {**levels.RUN, "growth": growth.growth, "ladder": growth.ladder}
FOLDER = Path("runs/benchmarks")


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one level; returns the record that was written as JSON."""
    arguments = options.parse(sys.argv[1:] if words is None else words, __doc__)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    before = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        print(machine.in_words() + f"; {torch.get_num_threads()} threads", flush=True)
        return {"bars": run_bars, "all": run_all, "profile": run_profile}.get(arguments.level, run_level)(arguments)
    except MokaError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        torch.set_num_threads(before[0])
        transformers.utils.logging.set_verbosity(before[1])


def run_level(arguments: Namespace) -> dict[str, Any]:
    points = RUN[arguments.level](arguments)
    print(report.table(points, arguments.level, arguments.format))
    path = _path(arguments)
    plots.plot(points, arguments.level, path.with_suffix(".png"))
    return _written(report.as_record(arguments, points), path)


def run_profile(arguments: Namespace) -> dict[str, Any]:
    found = profiling.profiles(arguments)
    print(report.profile_tables(found, arguments.format))
    path = _path(arguments)
    plots.plot_profile(found, path.with_suffix(".png"))
    return _written(report.profile_record(arguments, found), path)


def run_bars(arguments: Namespace) -> dict[str, Any]:
    found, records = {}, {}
    for own, command in zip(dict.fromkeys(bar.command for bar in bars.BARS), bars.commands(arguments), strict=True):
        inner = options.parse(command.split())
        print(f"\n$ {inner.command}", flush=True)
        found[own] = RUN[inner.level](inner)
        print(report.table(found[own], inner.level, arguments.format), flush=True)
        records[own] = report.as_record(inner, found[own])
    rows = bars.rows(found)
    print("\n" + report.lay_out(bars.HEADER, [bars.cells(row) for row in rows], arguments.format))
    return _written(report.as_record(arguments, bars=rows, levels=list(records.values())), _path(arguments))


def run_all(arguments: Namespace) -> dict[str, Any]:
    """Every level with its own defaults."""
    points = 7 + sum(len(growth.CURVES[curve]) for curve in arguments.curves) + len(growth.LADDER)
    written = []
    for command in options.commands_of_all(arguments, points):
        print(f"\n$ python scripts/benchmark.py {' '.join(command)}", flush=True)
        written.append(main(command))
    return {"level": "all", "levels": written}


def _path(arguments: Namespace) -> Path:
    return arguments.json or FOLDER / f"{arguments.level}.json"


def _written(record: dict[str, Any], path: Path) -> dict[str, Any]:
    report.write(record, path)
    print(f"\n{path}" + (f", {path.with_suffix('.png')}" if path.with_suffix(".png").exists() else ""), file=sys.stderr)
    return record


if __name__ == "__main__":
    main()
