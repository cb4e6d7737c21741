"""``moka train --launcher NAME``: one command for `accelerate launch`, checked before processes are started."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import parse_flag_from_env

from moka.errors import MokaError, nearest
from moka.yaml_files import configs_folder

_DEEPSPEED = "pip install 'moka-peft[deepspeed]'"


@dataclass
class Launch:
    """A command, what its environment must have, how many processes will train, and what this machine lacks for it."""

    command: list[str]
    environment: dict[str, str]
    processes: int
    lacks: list[str]

    def __str__(self) -> str:
        """Return the command as it can be pasted into a shell."""
        settings = (f"{key}={shlex.quote(value)}" for key, value in self.environment.items())
        return " ".join([*settings, shlex.join(self.command)])

    def start(self) -> None:
        """Become the launcher; returns only by an exception."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.command[0], self.command, {**os.environ, **self.environment})


def launcher_names() -> list[str]:
    """Return what ``--launcher`` takes besides paths."""
    return sorted(path.stem for path in (configs_folder() / "accelerate").glob("*.yaml"))


def launch_of(launcher: str, words: Sequence[str], processes: int | None = None, extra: Sequence[str] = ()) -> Launch:
    """`accelerate launch` of ``moka`` with ``words``.

    Args:
        launcher: a name of ``launcher_names()``, or the path of a configuration of accelerate.
        words: what follows ``moka``: "train", the configuration, overrides, options.
        processes: all of them, over all machines; default: what the file says.
        extra: further options of `accelerate launch`.
    Raises:
        MokaError: inside a launcher, no such file, or what no machine could start as meant.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise MokaError(
            "--launcher: this process was itself started by a launcher (RANK or WORLD_SIZE is set), and each would "
            "launch all of them again. Take --launcher out, or start moka without a launcher."
        )
    file = _find(launcher)
    options = ["--config_file", _short(file)]
    if processes is not None:
        options += ["--num_processes", str(processes)]
    options += extra
    parsed = _parsed([*options, "-m", "moka", *words])
    config = _read(launcher, file)
    processes, machines = _checked_processes(launcher, config, parsed)
    lacks = [] if config.use_cpu else _lacking_gpus(launcher, processes, machines)
    if uses_deepspeed := config.distributed_type == "DEEPSPEED" or parsed.use_deepspeed:
        lacks += _lacking_deepspeed(f"--launcher {launcher}")
    settings = config.deepspeed_config.get("deepspeed_config_file") if uses_deepspeed else None
    if settings and parsed.deepspeed_config_file is None and not Path(settings).exists():
        # It names a file from the folder above configs/ on; a named launcher works from anywhere.
        options += ["--deepspeed_config_file", _short(file.parent.parent / "deepspeed" / Path(settings).name)]
    program = Path(sys.executable).with_name("accelerate")
    start = [str(program)] if program.exists() else [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    # A recipe that may take a GPU takes one where it sees one.
    environment = {"CUDA_VISIBLE_DEVICES": ""} if config.use_cpu and torch.cuda.is_available() else {}
    return Launch([*start, "launch", *options, "-m", "moka", *words], environment, processes, lacks)


def check_deepspeed(section: Mapping[str, Any], name: str) -> None:
    """Check that DeepSpeed can be used, if a section of the configuration or the launcher asks for it.

    Raises:
        MokaError: it is not installed, cannot be imported, or no launcher has reported this process its rank.
    """
    if not section.get("deepspeed") and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return
    asked = f"{name}.deepspeed" if section.get("deepspeed") else "The launcher's configuration"
    problem = "".join(_lacking_deepspeed(asked))
    try:
        if not problem:
            importlib.import_module("deepspeed")
    except Exception as error:  # built for another torch or CUDA, it raises whatever its compiled parts do
        problem = f"{asked}: DeepSpeed is installed and cannot be imported ({error!r}). Install it again: {_DEEPSPEED}."
    if not problem and section.get("deepspeed") and "RANK" not in os.environ:
        problem = (
            f"{asked} needs a launcher, for one process too: torchrun --nproc_per_node 1 -m moka train ..., or take it out "
            "and give --launcher zero2."
        )
    if problem:
        raise MokaError(problem)


def _lacking_deepspeed(asked: str) -> list[str]:
    """Look for it without importing it: that takes seconds, and prints."""
    found = importlib.util.find_spec("deepspeed") is not None
    return [] if found else [f"{asked} needs DeepSpeed, which is not installed: {_DEEPSPEED}."]


def alone_by_mistake() -> str | None:
    """A note where accelerate was asked for several processes and, saying nothing, started this one."""
    # Its launcher of one process sets an address for the others only where several were asked for.
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    return (
        "note: accelerate was asked for several processes and started one, as it does on the CPU for --cpu and MULTI_CPU. "
        "`moka train --launcher cpu` starts two."
    )


def tell_launcher(message: str) -> None:
    """Leave the reason of this process's end where torchrun and accelerate look: theirs is then the last thing they print."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason}), "utf-8")


def _find(launcher: str) -> Path:
    known = launcher_names()
    if launcher in known:
        return (configs_folder() / "accelerate" / f"{launcher}.yaml").resolve()
    if Path(launcher).is_file():
        return Path(launcher)
    raise MokaError(
        f"--launcher {launcher!r} is not one of {', '.join(known)}, nor a file with a configuration of accelerate."
        f"{nearest(launcher, known)}"
    )


def _parsed(options: list[str]) -> argparse.Namespace:
    """The options of `accelerate launch` as it reads them."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return launch_command_parser().parse_args(options)
        except SystemExit as stop:
            reason = said.getvalue().strip().splitlines()[-1:]
            raise MokaError(f"--launcher-args: accelerate refuses them: {''.join(reason)}.") from stop


def _read(launcher: str, file: Path) -> ClusterConfig:
    try:
        config = load_config_from_file(str(file))
        if not isinstance(config, ClusterConfig):
            raise ValueError("compute_environment is not LOCAL_MACHINE")
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise MokaError(f"--launcher {launcher}: accelerate cannot use {file}: {reason}. Correct the file.") from error
    return config


def _short(path: Path) -> str:
    """Relative where it is below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _checked_processes(launcher: str, config: ClusterConfig, parsed: argparse.Namespace) -> tuple[int, int]:
    """Return the numbers of processes and of machines; refuse what accelerate would start otherwise, or fail at late."""
    processes = config.num_processes if parsed.num_processes is None else parsed.num_processes
    machines = config.num_machines if parsed.num_machines is None else parsed.num_machines
    problem = None
    if config.distributed_type == "MULTI_CPU":
        problem = (
            "for distributed_type MULTI_CPU accelerate starts one process, silently. Write MULTI_GPU with use_cpu: true, or "
            "take --launcher cpu."
        )
    elif config.distributed_type == "NO" and processes > 1:
        problem = f"it is one process; {processes} are asked for. Take ddp, zero2 or cpu."
    elif processes < 1:
        problem = f"--num-processes: {processes} is too small; give at least 1."
    elif processes % machines:
        problem = f"--num-processes: {processes} processes cannot be spread evenly over {machines} machines."
    elif machines > 1 and not (parsed.main_process_ip or config.main_process_ip):
        problem = (
            f"{machines} machines need the first one's address, and each its number from 0: "
            "--launcher-args='--machine_rank 0 --main_process_ip 10.0.0.1'."
        )
    if problem is not None:
        raise MokaError(f"--launcher {launcher}: {problem}")
    return processes, machines


def _lacking_gpus(launcher: str, processes: int, machines: int) -> list[str]:
    here, gpus = processes // machines, torch.cuda.device_count()
    if here <= gpus:
        return []
    if not gpus:
        return [f"--launcher {launcher} needs a GPU for each process, and this machine has none. Take --launcher cpu."]
    return [
        f"--launcher {launcher}: {here} processes on this machine need as many GPUs, and it has {gpus}. "
        f"Give --num-processes {gpus * machines}."
    ]
