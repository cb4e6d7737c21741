"""``moka``: parse the command line, run a command, and turn mistakes into one clear line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import moka
from moka.errors import EX_TEMPFAIL, Interrupted, MokaError

_SPACE, _PLACE = "Free space, or choose another folder.", "Choose another folder."
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP), _PLACE),
}
_PEER_LOSS = (
    "Another process has ended, or no longer answers; its own message says why. If it has none, the launcher's report has "
    "its exit code (-9: killed, often for lack of memory). `moka train ... --resume` resumes from the newest checkpoint, and "
    "`moka cache` from its last file."
)
_INTERRUPTED = 130
# Command -> its module in this package, and what it does. A module is imported when its command is chosen: `moka --help`
# does not wait for torch.
COMMANDS = {
    "recipes": ("recipes", "list the shipped configurations, copy one, write their JSON Schema"),
    "data": ("data", "check, show and convert data"),
    "cache": ("cache", "compute frozen encoders' features once"),
    "train": ("train", "train connectors (stage 1) and an adapter (stage 2)"),
    "generate": ("generate", "answer a question about pictures, sounds and videos"),
    "serve": ("serve", "serve models over HTTP, as OpenAI's chat completions"),
    "demo": ("demo", "open a page in the browser to ask a trained run"),
    "eval": ("evaluate", "measure a trained run on unseen questions"),
    "diagnose": ("diagnose", "measure which modality a model uses, and write a report"),
    "score": ("score", "score a file of predictions on a benchmark"),
    "compare": ("compare", "train and evaluate several methods over several seeds"),
    "convert": ("convert", "read or write the MokA authors' checkpoints"),
    "merge": ("merge", "merge the text path of a run into its backbone"),
    "push": ("push", "publish a run on the Hugging Face Hub"),
    "export": ("export", "write a run as a merged model, a plain transformers model or a plain LoRA"),
}
# Commands that may run as several processes.
_DISTRIBUTED = ("cache", "train", "eval", "diagnose")


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the arguments of the ``chosen`` command only."""
    top = argparse.ArgumentParser(prog="moka", description="Efficient fine-tuning of multimodal LLMs with MokA.")
    top.add_argument("--version", action="version", version=f"moka {moka.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help) in COMMANDS.items():
        module = _module(name) if name == chosen else None
        sub = commands.add_parser(
            name,
            help=help,
            description=None if module is None else module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if module is not None:
            module.add_arguments(sub)
    return top


def _module(command: str):
    return importlib.import_module(f"moka.cli.{COMMANDS[command][0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, or 2 for a mistake that the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(words), debug="--debug" in words)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the arguments of a command line; exit with 2 if it is wrong."""
    top = parser(next((word for word in words if word in COMMANDS), None))
    arguments, extra = top.parse_known_args(words)
    # argparse takes all positional arguments in one go; key=value may also follow an option.
    if extra and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in extra)):
        top.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        arguments.overrides += extra
    return arguments


def _run(words: list[str]) -> int | None:
    arguments = parse(words)
    # peft asks transformers 5.23 for an attribute by its old name; no one at the command line can change that.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if arguments.command not in _DISTRIBUTED and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise MokaError(f"moka {arguments.command} runs as one process; start it without a launcher.")
    return _module(arguments.command).run(arguments)


def guarded(action: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command's work; a mistake that the user can fix becomes one clear line and exit code 2."""
    success = False
    try:
        code = action()
        sys.stdout.flush()
        success = True
    except MokaError as error:
        if debug:
            raise
        return _complain(str(error))
    except BrokenPipeError:
        # The reader of our output has closed it (`| head`). What Python still has to write goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug or error.errno not in _REMEDIES:
            raise
        return _complain(f"{error.filename or 'writing'}: {error.strerror}. {_REMEDIES[error.errno]}")
    except RuntimeError as error:
        if debug or not _distributed().is_peer_loss(error):
            raise
        return _complain(_PEER_LOSS)
    except Interrupted as stop:
        success = stop.agreed
        if _distributed().should_print_errors() and _distributed().is_main():
            _close_progress_bars()
            _print_error(str(stop))
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        print("moka: interrupted", file=sys.stderr)
        return _INTERRUPTED
    finally:
        if "torch" in sys.modules:
            _distributed().disconnect(success)
    return code or 0


def _distributed():
    return importlib.import_module("moka.distributed")


def _close_progress_bars() -> None:
    """End the lines of interrupted progress bars."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _complain(message: str) -> int:
    if "torch" not in sys.modules or _distributed().should_print_errors():
        # A loader's worker sends its error as a traceback, whose last line is the message.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        _close_progress_bars()
        _print_error(f"error: {' '.join(message.split())}")
    return 2


def _print_error(line: str) -> None:
    print(f"moka: {line}", file=sys.stderr)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from moka.training.launch import tell_launcher

        tell_launcher(line)  # under the heading "moka FAILED"
