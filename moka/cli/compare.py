"""Compare adapter methods in one program: same data, same stage 1, same steps; a table of means and spreads.

  moka compare configs/quickstart/audio_visual_text.yaml --methods lora,multiple_lora,moka --seeds 3 --match-params

Finished runs are kept and not repeated, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse

from moka.evaluation.compare import METHODS, compare
from moka.training import load_config

HELP = "train and evaluate several methods over several seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, as for `moka train`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--methods", default="lora,multiple_lora,moka", help=f"comma-separated, of: {', '.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument(
        "--match-params", action="store_true", help="choose each method's rank to match MokA's trainable parameters"
    )


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    compare(config, arguments.methods.split(","), arguments.seeds, match_params=arguments.match_params)
