"""Two real processes on gloo: launching a run, and reading what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "one": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    # `--cpu --num_processes 2` would start one process, and say nothing.
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.fixture(scope="session")
def launch():
    """``launch("torchrun", "train", config)``: `moka train config` in two processes; ``start=True`` does not wait.

    ``program`` takes the place of `-m moka`.
    """

    def run(launcher, *arguments, program=("-m", "moka"), start=False, timeout=180, **environment):
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        if launcher == "accelerate":
            own["ACCELERATE_USE_CPU"] = "true"
        command = [*LAUNCHERS[launcher], *map(str, program), *map(str, arguments)]
        settings = {"env": {**os.environ, **own, **environment}, "text": True}
        if start:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
        return subprocess.run(command, capture_output=True, check=False, timeout=timeout, **settings)

    return run


@pytest.fixture(scope="session")
def write_yaml():
    def write(path, raw):
        path.write_text(yaml.safe_dump(raw, sort_keys=False))  # modalities are made in their order
        return path

    return write


@pytest.fixture(scope="session")
def losses():
    """(stage, step) -> loss of a run folder."""

    def read(folder):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}

    return read
