"""Compare adapter methods in one program: same data, same stage 1, same steps; a table of means and spreads.

  moka compare configs/quickstart/audio_visual_text.yaml --methods lora,uni_modal_lora,moka --seeds 3 --match-params
  moka compare --show runs/compare                         the table so far, and which runs are missing; trains nothing

Finished runs are kept and not repeated, so an interrupted comparison continues where it was.
"""

from __future__ import annotations

import argparse
import shlex

from moka.errors import MokaError
from moka.evaluation.compare import METHODS, compare
from moka.evaluation.comparison import LATEX, MARKDOWN, RESULT, comparison_table, read_comparison
from moka.training import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file, as for `moka train`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--methods", default="lora,uni_modal_lora,moka", help=f"comma-separated, of: {', '.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument(
        "--match-params", action="store_true", help="choose each method's rank to match MokA's trainable parameters"
    )
    parser.add_argument(
        "--format", choices=["table", "markdown", "latex"], default="table", help="how to print it (default table)"
    )
    parser.add_argument("--show", metavar="DIR", help="print the table of a comparison that is there, and stop")


def run(arguments: argparse.Namespace) -> None:
    if arguments.show is not None:
        if arguments.config is not None:
            raise MokaError(f"--show trains nothing: leave {arguments.config!r} out, or leave --show out.")
        _print(read_comparison(arguments.show), arguments.format)
        return
    if arguments.config is None:
        raise MokaError("give a configuration: moka compare CONFIG.yaml, or moka compare --show DIR.")
    config = load_config(arguments.config, arguments.overrides)
    methods = arguments.methods.split(",")
    result = compare(config, methods, arguments.seeds, match_params=arguments.match_params, command=_command(arguments))
    _print(result, arguments.format)
    if arguments.format == "table":
        print(f"written: {', '.join(f'{config.output.dir}/{name}' for name in (RESULT, MARKDOWN, LATEX))}")


def _command(arguments: argparse.Namespace) -> str:
    """The command line, with the defaults written out."""
    words = ["moka", "compare", arguments.config, "--methods", arguments.methods, "--seeds", str(arguments.seeds)]
    return shlex.join([*words, *(["--match-params"] if arguments.match_params else []), *arguments.overrides])


def _print(result: dict, format: str) -> None:
    table = comparison_table(result)
    if format != "table":
        print(table.text(format), end="")
        return
    table.show()
    if result.get("missing") and table.command:
        print(f"to continue: {table.command}")
