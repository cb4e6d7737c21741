"""The options of commands that can run as several processes: `moka train` and `moka eval`."""

from __future__ import annotations

import argparse
import shlex

from moka.errors import MokaError
from moka.training.launch import Launch, launch_of, launcher_names

_OPTIONS = ("launcher", "num_processes", "launcher_args", "dry_run")


def add_launching(parser: argparse.ArgumentParser) -> None:
    """Add --launcher and what belongs to it."""
    launching = parser.add_argument_group(
        "several processes", "builds `accelerate launch ...`, prints it and becomes it"
    )
    launching.add_argument(
        "--launcher", metavar="NAME", help=f"{', '.join(launcher_names())}, or a configuration file of accelerate"
    )
    launching.add_argument("--num-processes", type=int, metavar="N", help="on all machines; default: what NAME says")
    launching.add_argument(
        "--launcher-args",
        metavar="'--OPTION ...'",
        help="options of `accelerate launch`: --launcher-args='--gpu_ids 0,1'",
    )
    launching.add_argument(
        "--dry-run", action="store_true", help="print the command, also one for another machine, and do not run it"
    )


def launch_of_command(arguments: argparse.Namespace, words: list[str]) -> Launch | None:
    """Return the launch that a command line asks for, None if it has no --launcher.

    Args:
        words: the command; its own arguments follow as they were given.
    Raises:
        MokaError: options of a launcher without one; quotes that do not match.
    """
    if arguments.launcher is None:
        for option in _OPTIONS[1:]:
            if getattr(arguments, option):
                raise MokaError(
                    f"--{option.replace('_', '-')} belongs to --launcher; give one: {', '.join(launcher_names())}."
                )
        return None
    words = [*words]
    for name, value in vars(arguments).items():
        if name in ("command", *_OPTIONS) or value in (None, False, []):
            continue
        if name in ("config", "run"):
            words.append(value)
        elif name == "overrides":
            words += value
        else:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    try:
        extra = shlex.split(arguments.launcher_args or "")
    except ValueError as error:
        raise MokaError(
            f"--launcher-args: {arguments.launcher_args!r} cannot be split into options: {error}."
        ) from error
    return launch_of(arguments.launcher, words, arguments.num_processes, extra)
