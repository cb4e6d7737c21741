"""The circumstances of a measurement: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import moka

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ROOT = Path(__file__).resolve().parents[2]


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def versions() -> dict[str, str]:
    """Installed versions by package; moka's own first."""
    found = {"moka": moka.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of this tree and whether files differ from it; both None outside a git checkout."""
    try:
        head, status = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(status)}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """For the JSON of a result: machine, versions, commit. Memory in bytes."""
    machine = {
        "processor": processor_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "system": platform.system(),
        "gpus": gpus(),
        "environment": {name: os.environ[name] for name in THREADS if name in os.environ},
    }
    return {"machine": machine, "versions": versions(), **commit()}


def in_words(described: dict[str, Any] | None = None) -> str:
    """The machine in one line, as it is over a table."""
    described = described or describe()
    machine, packages = described["machine"], described["versions"]
    parts = [machine["processor"], f"{machine['cores']} cores"]
    if machine["gpus"]:
        parts.append(f"{len(machine['gpus'])} x {machine['gpus'][0]}")
    shown = ("torch", "transformers", "peft")
    return f"{', '.join(parts)}; {', '.join(f'{name} {packages[name]}' for name in shown)}"
