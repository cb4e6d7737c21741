"""Train what a YAML file says. Any key can be overridden:

moka train quickstart/audio_visual_text training.max_steps=200 output.dir=runs/longer
moka train CONFIG.yaml --launcher zero2 --num-processes 4        # several GPUs; see docs/launching.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moka.config import SECTIONS, describe
from moka.distributed import is_main
from moka.errors import MokaError
from moka.training import load_config, run_training
from moka.training.arguments import divided
from moka.training.launch import alone_by_mistake
from moka.training.run_dir import CONNECTOR, RunFolder

from .launching import add_launching, launch_of_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", help="YAML file, or the name of a shipped one, such as quickstart/audio_visual_text"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.learning_rate=1e-4")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in output.dir")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny random parts of the same architecture, two steps a stage (20 at most where max_steps says more), in DIR-tiny",
    )
    parser.add_argument("--help-config", action="store_true", help="list all configuration keys and exit")
    add_launching(parser)


def with_tiny(arguments: argparse.Namespace) -> list[str]:
    """The overrides of a command line, and what its ``--tiny`` means."""
    return [*arguments.overrides, *(["model.tiny=true"] if arguments.tiny else [])]


def run(arguments: argparse.Namespace) -> None:
    if arguments.help_config:
        print(describe())
        return
    if arguments.config is None:
        raise MokaError("moka train: name a configuration file, such as configs/quickstart/audio_visual_text.yaml.")
    if "=" in arguments.config and not Path(arguments.config).exists():
        raise MokaError(
            f"moka train: {arguments.config!r} is not a configuration file; it comes first, before key=value."
        )
    config = load_config(arguments.config, with_tiny(arguments))
    if launch := launch_of_command(arguments, ["train"]):
        for lack in launch.lacks:
            if not arguments.dry_run:
                raise MokaError(lack)
            print(f"note: this machine could not run it: {lack}", file=sys.stderr)
        for stage in config.stages:
            divided(config.section(stage), launch.processes, SECTIONS[stage])
        if not arguments.dry_run:
            _check_folder(config.output.dir, arguments)
        print(launch)
        if not arguments.dry_run:
            launch.start()
        return
    if note := alone_by_mistake():
        print(note)
    folder = run_training(config, resume=arguments.resume, overwrite=arguments.overwrite)
    if is_main():
        after = f"moka eval {folder}" if 2 in config.stages else f"stages=[2] model.connectors=[{folder / CONNECTOR}]"
        print(f"done: {folder}  (next: {after})")
        if 2 in config.stages:
            print(ways_to_ask(folder))


def ways_to_ask(folder: Path) -> str:
    """Return the commands that ask and look into a finished run, a line each."""
    return (
        f'ask it:         moka generate {folder} "..."   (with --image, --audio or --video FILE)\n'
        f"open its page:  moka demo {folder}\n"
        f"diagnose it:    moka diagnose {folder}"
    )


def _check_folder(path: str, arguments: argparse.Namespace) -> None:
    """Return what every process would refuse in half a minute."""
    folder = RunFolder(path)
    try:
        folder.check(arguments.resume, arguments.overwrite)
    finally:
        folder.lock.release()
