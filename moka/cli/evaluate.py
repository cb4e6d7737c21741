"""Evaluate a trained run on its test questions, and again with each modality blanked; or on a published benchmark.

  moka eval runs/quickstart
  moka eval RUN --benchmark pope --root data/pope
  moka eval runs/visual --ensemble runs/audio             # UME: runs of one modality each answer together
  moka eval RUN --launcher ddp --num-processes 4          # several GPUs share the questions

The first prints a table and writes RUN/evaluation.json, RUN/predictions.jsonl and the model card; the second writes raw
answers, RUN/benchmarks/NAME/predictions.jsonl, and scores them as `moka score` does.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import transformers

import moka
from moka.data.sources import describe_source, is_embedded
from moka.distributed import connect, is_main, run_on_all, run_on_main
from moka.errors import MokaError
from moka.evaluation import BENCHMARKS, evaluate, evaluate_benchmark, show, write
from moka.evaluation.benchmarks.table import score_table
from moka.evaluation.evaluate import benchmark_source, open_benchmark, open_questions
from moka.inference import DECODINGS, LoadedModel, export_kind, find_adapter, load_ensemble
from moka.io import read_json
from moka.training import RunConfig, load_config
from moka.training.model_card import write_card
from moka.training.run_dir import CONFIG, SUMMARY, RunFolder

from .generate import add_quantization, quantization
from .launching import add_launching, launch_of_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of `moka train`")
    parser.add_argument("--split", help="test (default) or validation; of a benchmark: a split of its format")
    parser.add_argument("--data", metavar="FILE", help="another JSONL file of questions with answers")
    parser.add_argument("--benchmark", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}; all: those of the run")
    parser.add_argument("--root", metavar="FOLDER", help="the benchmark's data, if not where the run says")
    parser.add_argument("--format", metavar="NAME", help="their format, where it is not the benchmark's own")
    parser.add_argument("--size", type=int, help="number of questions (default: evaluation.size, or all)")
    parser.add_argument("--blank-size", type=int, help="questions repeated with a modality blanked")
    parser.add_argument("--no-blank", action="store_true", help="leave the blanked repetitions out")
    parser.add_argument("--batch-size", type=int, help="questions generated at once")
    parser.add_argument(
        "--decoding",
        choices=[name for name in DECODINGS if name != "fork-merge"],
        default=DECODINGS[0],
        help="entropy-fusion: of forwards with one modality each (MLA, arXiv 2311.10707)",
    )
    parser.add_argument(
        "--ensemble",
        nargs="+",
        metavar="RUN",
        help="runs of other modalities, each trained with single_modality, that answer with this one; to RUN/ensemble",
    )
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_quantization(parser)
    add_launching(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.run)
    if not (folder / CONFIG).is_file():
        raise MokaError(f"{folder} is no run folder (no {CONFIG}); give one that `moka train` made.")
    config = load_config(folder / CONFIG)
    settings = config.evaluation
    for name in ("size", "blank_size", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MokaError(f"--{name.replace('_', '-')}: {value} is too small; give at least 1.")
    if not arguments.benchmark:
        for name in ("root", "format"):
            if getattr(arguments, name) is not None:
                raise MokaError(f"--{name} belongs to --benchmark NAME; give that too, or --data FILE instead.")
    if arguments.ensemble and (arguments.benchmark or arguments.decoding != DECODINGS[0]):
        other = "--benchmark" if arguments.benchmark else "--decoding"
        raise MokaError(f"--ensemble: {other} is for one run; leave one of them out.")
    if launch := launch_of_command(arguments, ["eval"]):
        launch.start()
        return
    transformers.utils.logging.disable_progress_bar()
    device = connect()
    if arguments.device is None and device.type != "cpu":
        arguments.device = str(device)
    if arguments.benchmark:
        _benchmarks(arguments, config)
        return
    split: Any = arguments.split or "test"
    if split not in ("test", "validation"):
        raise MokaError(f"--split: {split!r} is not one of test, validation.")
    source = arguments.data or getattr(config.data, split)
    if source is None:
        raise MokaError(f"data.{split} is not set in {folder / CONFIG}; give --data FILE.")
    find_adapter(folder)
    output = folder / "ensemble" if arguments.ensemble else folder
    # The media of another file are next to it, not where those of the run are.
    media_root = None if arguments.data else config.data.media_root
    samples = run_on_all(lambda: open_questions(source, split, media_root), main_first=True)
    result = evaluate(
        run_on_all(lambda: _load(arguments), main_first=True),
        samples,
        output,
        source=source,
        size=arguments.size or settings.size,
        blank=settings.blank and not arguments.no_blank,
        blank_size=arguments.blank_size or settings.blank_size,
        batch_size=arguments.batch_size or settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )
    # A file or a format names its split by itself, whatever was asked for.
    result["protocol"]["data"] = describe_source(source)
    if is_embedded(source):
        result["protocol"]["data"] += f", {split}"
    run_on_main(lambda: _report(output, config, result))


def _report(folder: Path, config: RunConfig, result: dict[str, Any]) -> None:
    """Write the result, then print it: nothing is lost if the output is closed."""
    path = write(result, folder)
    summary = folder / SUMMARY
    if (folder / CONFIG).is_file() and export_kind(
        folder
    ) is None:  # an export's card says what it keeps and loses; the numbers are in its folder
        write_card(RunFolder(folder), config, read_json(summary) if summary.exists() else {})
    show(result, f"{folder}: {result['protocol']['data']}")
    print(f"written: {path}")


def _load(arguments: argparse.Namespace) -> LoadedModel:
    settings = {"device": arguments.device, "backbone": arguments.backbone, "quantization": quantization(arguments)}
    if arguments.ensemble:
        return load_ensemble([arguments.run, *arguments.ensemble], **settings)
    loaded = moka.load(arguments.run, **settings)
    if arguments.decoding != DECODINGS[0]:
        loaded.settings = {"decoding": arguments.decoding}
    return loaded


def _benchmarks(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Ask and score one benchmark, or all that the run's configuration names."""
    folder = Path(arguments.run)
    find_adapter(folder)
    names = list(config.evaluation.benchmarks) if arguments.benchmark == "all" else [arguments.benchmark]
    if not names:
        raise MokaError(f"--benchmark all: {folder / CONFIG} names none under evaluation.benchmarks.")
    chosen = {"root": arguments.root, "split": arguments.split, "format": arguments.format}
    for name in names:  # all are tried before hours go by on the first
        run_on_all(partial(_try_benchmark, config, name, chosen))
    loaded = run_on_all(lambda: _load(arguments), main_first=True)
    for name in names:
        results = evaluate_benchmark(
            folder, name, **chosen, size=arguments.size, batch_size=arguments.batch_size, loaded=loaded
        )
        if is_main():
            for result in results.values():
                score_table(result).show()
            print(f"written: {folder / 'benchmarks' / name}")


def _try_benchmark(config: RunConfig, name: str, chosen: dict[str, Any]) -> None:
    """Open a benchmark's data, so that what is missing is an error before anything is asked."""
    open_benchmark(config, name, benchmark_source(config, name, **chosen))
