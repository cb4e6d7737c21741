"""``moka``: parse the command line, run a verb, and turn mistakes into one clear line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from tqdm import tqdm

import moka
from moka.distributed import disconnect, is_main, is_peer_loss, should_print_errors
from moka.errors import MokaError
from moka.training.launch import tell_launcher
from moka.training.preemption import EX_TEMPFAIL, Interrupted

from . import cache, compare, convert, data, evaluate, export, generate, merge, score, train

_SPACE, _PLACE = "Free space, or choose another folder.", "Choose another folder."
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP), _PLACE),
}
_LOST = (
    "Another process has ended, or no longer answers; its own message says why. Where it has none, the launcher's report "
    "tells its exit code (-9: killed, often for want of memory). `moka train ... --resume` goes on from the newest "
    "checkpoint, and `moka cache` where it was."
)
VERBS = {
    **{"data": data, "cache": cache, "train": train, "generate": generate, "eval": evaluate, "score": score},
    **{"compare": compare, "convert": convert, "merge": merge, "export": export},
}


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
    """Run one verb; returns the exit code: the verb's own, or 2 for a mistake that the user can mend."""
    top = parser()
    arguments, extra = top.parse_known_args(argv)
    # argparse takes all positional arguments in one go; key=value may also follow an option.
    if extra and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in extra)):
        top.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        arguments.overrides += extra
    # peft asks transformers 5.23 for an attribute by its old name; nobody at the command line can mend that.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if arguments.verb not in ("cache", "train") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _complain(f"moka {arguments.verb} runs as one process; start it without a launcher.")
    return guarded(lambda: VERBS[arguments.verb].run(arguments), arguments.debug)


def guarded(action: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command's work; a mistake that the user can mend becomes one clear line and exit code 2."""
    well = False
    try:
        code = action()
        well = True
    except MokaError as error:
        if debug:
            raise
        return _complain(str(error))
    except OSError as error:
        if debug or error.errno not in _REMEDIES:
            raise
        return _complain(f"{error.filename or 'writing'}: {error.strerror}. {_REMEDIES[error.errno]}")
    except RuntimeError as error:
        if debug or not is_peer_loss(error):
            raise
        return _complain(_LOST)
    except Interrupted as stop:
        well = stop.agreed
        if should_print_errors() and is_main():
            _end_bars()
            _tell(str(stop))
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        print("moka: interrupted", file=sys.stderr)
        return 130
    finally:
        disconnect(well)
    return code or 0


def _end_bars() -> None:
    """A progress bar that was broken off has not ended its line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _complain(message: str) -> int:
    if should_print_errors():
        # A loader's worker sends its error as a traceback, whose last line is the message.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        _end_bars()
        _tell(f"error: {' '.join(message.split())}")
    return 2


def _tell(line: str) -> None:
    print(f"moka: {line}", file=sys.stderr)
    tell_launcher(line)  # under the heading "moka FAILED"
