"""Measure which modality a model uses for its answers, and write a report that opens in any browser, without a network.

  moka diagnose runs/quickstart                                      on the run's test questions
  moka diagnose RUN --data mine.jsonl --ablate tokens,adapter        information use, and adapter use next to it
  moka diagnose HF_FOLDER --data mine.jsonl --noise visual           any multimodal LLM, with a MokA adapter, LoRA or none
  accelerate launch --num_processes 4 -m moka diagnose RUN           several processes share the samples

Writes into --output: report.html, report.json (all numbers), samples.jsonl (a line a sample) and plots/*.png. A run that was
interrupted resumes from samples.jsonl when it is started again; samples of another model or with other settings are moved aside.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import transformers

from moka.analysis.contribution import ABLATIONS, VALUES
from moka.diagnosis.diagnose import NOISE_LEVELS, diagnose
from moka.diagnosis.reading import open_model
from moka.diagnosis.summary import coalition_table, contribution_table, share_table
from moka.distributed import broadcast_from_main, connect, run_on_all, run_on_main
from moka.errors import MokaError
from moka.training import load_config
from moka.training.run_dir import CONFIG

from .launching import add_launching, launch_of_command

HTML, JSON, PLOTS = "report.html", "report.json", "plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    levels = ", ".join(f"{level:g}" for level in NOISE_LEVELS)
    parser.add_argument(
        "run", metavar="RUN | MODEL", help="run of `moka train`; folder or name of a multimodal LLM, or its adapter"
    )
    parser.add_argument("--data", metavar="SOURCE", help="JSONL file or embedded:TASK (default: data.test of the run)")
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="of the data (default test)")
    parser.add_argument("--size", type=int, help="number of samples, from the first (default: all)")
    parser.add_argument(
        "--ablate",
        action="append",
        metavar="NAME[,NAME]",
        help=f"how a modality is taken away: {', '.join(ABLATIONS)}; may be repeated (default tokens)",
    )
    parser.add_argument(
        "--value", default="log_likelihood", help=f"of a coalition: {', '.join(VALUES)} (default log_likelihood)"
    )
    parser.add_argument(
        "--noise",
        action="append",
        metavar="MODALITY[,...]",
        help=f"accuracy against noise of {levels} standard deviations on it; {len(NOISE_LEVELS)} more passes each",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: RUN/diagnosis)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of one pass (default 8)")
    parser.add_argument("--details", type=int, default=32, help="samples for attention and gradients (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--backbone", metavar="FOLDER", help="where the language model is, if not where it was trained")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_launching(parser)


def run(arguments: argparse.Namespace) -> None:
    source, media_root = arguments.data, None
    own = Path(arguments.run) / CONFIG
    if source is None and own.is_file():
        config = load_config(own)
        source, media_root = getattr(config.data, arguments.split), config.data.media_root
    if source is None:
        raise MokaError(f"--data: {arguments.run} names no data.{arguments.split}; give --data SOURCE.")
    ablate, noise = (
        [name for one in given or [] for name in one.split(",")] for given in (arguments.ablate, arguments.noise)
    )
    if launch := launch_of_command(arguments, ["diagnose"]):
        launch.start()
        return
    transformers.utils.logging.disable_progress_bar()
    device = connect()
    if arguments.device is None and device.type != "cpu":
        arguments.device = str(device)
    output = Path(arguments.output or Path(arguments.run if Path(arguments.run).is_dir() else ".") / "diagnosis")
    broadcast_from_main(lambda: _check_writable(output))
    model, processor = run_on_all(
        lambda: open_model(arguments.run, arguments.device, arguments.backbone), main_first=True
    )
    diagnosis = diagnose(
        model,
        source,
        value=arguments.value,
        ablate=ablate or "tokens",
        size=arguments.size,
        batch_size=arguments.batch_size,
        noise=noise,
        details=arguments.details,
        seed=arguments.seed,
        processor=processor,
        folder=output,
        split=arguments.split,
        media_root=media_root,
    )
    diagnosis.model = arguments.run
    run_on_main(lambda: _write(diagnosis, output))


def _check_writable(folder: Path) -> None:
    """Raise before any work is done for a report that could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MokaError(f"--output: {folder} cannot be written: {error.strerror}. Name another folder.") from error
    if not os.access(folder, os.W_OK) or (folder / HTML).is_dir():
        raise MokaError(f"--output: {folder / HTML} cannot be written. Name another folder.")


def _write(diagnosis: Any, output: Path) -> None:
    diagnosis.to_json(output / JSON)
    diagnosis.to_html(output / HTML)
    diagnosis.plot(output / PLOTS)
    for ablate in diagnosis.contributions:
        contribution_table(diagnosis, ablate).show()
        coalition_table(diagnosis, ablate).show()
    if (shares := share_table(diagnosis)) is not None:
        shares.show()
    for name, reason in diagnosis.left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"written: {output / HTML}, {JSON}, samples.jsonl, {PLOTS}/")
