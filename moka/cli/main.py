"""``moka``: parse the command line, run a verb, and turn mistakes into one clear line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Sequence

import moka
from moka.errors import MokaError

from . import compare, evaluate, generate, train

VERBS = {"train": train, "generate": generate, "eval": evaluate, "compare": compare}


def parser() -> argparse.ArgumentParser:
    """The whole command line; each verb adds its own arguments."""
    top = argparse.ArgumentParser(prog="moka", description="Efficient fine-tuning of multimodal LLMs with MokA.")
    top.add_argument("--version", action="version", version=f"moka {moka.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for a mistake that the user can mend."""
    arguments = parser().parse_args(argv)
    # peft asks transformers 5.23 for an attribute by its old name; nobody at the command line can mend that.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        VERBS[arguments.verb].run(arguments)
    except MokaError as error:
        if arguments.debug:
            raise
        return _complain(str(error))
    except OSError as error:
        if arguments.debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        return _complain(
            f"{error.strerror}: {error.filename or 'while writing'}. Free space, or choose another folder."
        )
    except KeyboardInterrupt:
        print("moka: interrupted", file=sys.stderr)
        return 130
    return 0


def _complain(message: str) -> int:
    print(f"moka: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
