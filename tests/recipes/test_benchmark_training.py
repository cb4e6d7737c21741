"""The benchmark of training runs as its documentation says, and its table has what it measured."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/benchmark_training.py"
VARIANTS = ["as they come", "grouped by length", "packed", "cached features", "packed, cached features"]


@pytest.mark.slow
def test_table_and_file_hold_each_variant(tmp_path):
    options = ["--tiny", "--rounds", "1", "--processes", "1", "--json", str(tmp_path / "figures.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 rounds of 5 steps" in done.stdout
    lines = [line for line in done.stdout.splitlines() if re.match(r"\| 1 \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in cells] == VARIANTS
    speeds = [float(row[2].split(" ")[0].replace(",", "")) for row in cells]
    ratios = [float(row[3].split(" ")[0]) for row in cells]
    assert ratios[0] == 1
    assert ratios == pytest.approx([speed / speeds[0] for speed in speeds], abs=0.01)
    padding = dict(zip(VARIANTS, (int(row[4].rstrip("%")) for row in cells), strict=True))
    assert padding["grouped by length"] < padding["as they come"]
    assert padding["cached features"] == padding["as they come"]
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(one["processes"], one["samples"], len(one["rounds"])) for one in results] == [(1, n, 1) for n in VARIANTS]
    assert [round(one["rounds"][0]["tokens_per_second"]) for one in results] == [round(speed) for speed in speeds]


def test_steps_that_leave_nothing_to_measure_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--steps", "2"])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "--steps 2: the first 2 are not counted; give 3 or more" in capsys.readouterr().err
