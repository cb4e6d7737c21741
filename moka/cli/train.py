"""Train what a YAML file says. Any key can be overridden:

moka train configs/quickstart/audio_visual_text.yaml training.max_steps=200 output.dir=runs/longer
accelerate launch -m moka train CONFIG.yaml key=value ...
"""

from __future__ import annotations

import argparse

from moka.errors import MokaError
from moka.training import load_config, run_training
from moka.training.arguments import describe
from moka.training.folder import CONNECTOR
from moka.training.processes import is_main

HELP = "train connectors (stage 1) and an adapter (stage 2)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.learning_rate=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in output.dir")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny random parts of the same architecture, two steps a stage, in DIR-tiny"
    )
    parser.add_argument("--help-config", action="store_true", help="list all configuration keys and exit")


def with_tiny(arguments: argparse.Namespace) -> list[str]:
    """The overrides of a command line, and what its ``--tiny`` stands for."""
    return [*arguments.overrides, *(["model.tiny=true"] if arguments.tiny else [])]


def run(arguments: argparse.Namespace) -> None:
    if arguments.help_config:
        print(describe())
        return
    if arguments.config is None:
        raise MokaError("moka train: name a configuration file, such as configs/quickstart/audio_visual_text.yaml.")
    config = load_config(arguments.config, with_tiny(arguments))
    folder = run_training(config, resume=arguments.resume, overwrite=arguments.overwrite)
    if is_main():
        after = f"moka eval {folder}" if 2 in config.stages else f"stages=[2] model.connectors=[{folder / CONNECTOR}]"
        print(f"done: {folder}  (next: {after})")
