"""Every shipped configuration: parsed, and run from stage 1 to scored answers with tiny parts on the formats' fixtures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moka
from moka.data import open_source
from moka.demo.wheels import cache_dir
from moka.errors import MokaError
from moka.evaluation import BENCHMARKS, evaluate, evaluate_benchmark
from moka.training import load_config, run_training

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RUNNABLE = sorted(p.relative_to(CONFIGS) for p in CONFIGS.glob("**/*.yaml") if p.parts[-2] != "accelerate")
RUNNABLE = [path for path in RUNNABLE if path.parts[0] != "shared"]
CELLS = [path for path in RUNNABLE if path.parts[0] != "quickstart"]
FIXTURES = ROOT / "tests/data/formats/fixtures"
# Two steps of four samples; the fixtures hold files that cannot be used, on purpose.
SMALL = [
    "model.tiny=true",
    "output.samples=1",
    "evaluation.max_new_tokens=4",
    "data.on_bad_media=substitute",
    "data.bad_media_budget=0.9",
    *(
        f"{section}.{key}"
        for section in ("alignment", "training")
        for key in ("global_batch_size=4", "per_device_train_batch_size=2", "warmup_steps=1", "save_strategy=no")
    ),
]


@pytest.fixture
def workplace(tmp_path):
    """A folder with ``data/FORMAT`` for every format, as the configurations name them."""
    folder = tmp_path
    (folder / "data").mkdir()
    for fixture in FIXTURES.iterdir():
        (folder / "data" / fixture.name).symlink_to(fixture)
    return folder


@pytest.mark.parametrize("path", RUNNABLE, ids=str)
def test_configuration_is_read_and_its_comment_names_its_own_command(path):
    config = load_config(CONFIGS / path)
    comment = (CONFIGS / path).read_text("utf-8").split("\nbase:")[0]
    assert f"configs/{path}" in comment
    assert all(
        f"configs/{path}" == named or "shared" in named or "accelerate" in named
        for named in re.findall(r"configs/\S+\.yaml", comment)
    )
    assert bool(config.model.modalities) == (config.model.kind == "composed")
    assert set(config.evaluation.benchmarks) <= set(BENCHMARKS)


@pytest.mark.parametrize("path", CELLS, ids=str)
def test_cell_has_the_papers_hyperparameters(path):
    config = load_config(CONFIGS / path)
    section = config.training if 2 in config.stages else config.alignment
    assert section["learning_rate"] == 1e-4
    assert section["lr_scheduler_type"] == "cosine"
    assert section["warmup_steps"] == 0.03
    assert section["global_batch_size"] in (64, 80)
    launched = yaml.safe_load((CONFIGS / "accelerate/zero2_offload.yaml").read_text("utf-8"))["num_processes"]
    assert section["global_batch_size"] % (launched * section["per_device_train_batch_size"]) == 0
    if 2 in config.stages:
        adapter = config.adapter
        assert [adapter[key] for key in ("method", "r", "alpha", "dropout")] == ["moka", 4, 16, 0.05]
        assert adapter["target_modules"] is None  # the seven projections


SCENARIOS = sorted({path.parent for path in CELLS})


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_scenario_runs_from_stage_one_to_scored_answers(scenario, workplace, monkeypatch):
    """In the order of names: stage 1 hands its connectors over to stage 2."""
    monkeypatch.chdir(workplace)
    for path in sorted(CELLS):
        if path.parent != scenario:
            continue
        config = load_config(CONFIGS / path, SMALL)
        run = run_training(config)
        assert json.loads((run / "summary.json").read_text("utf-8"))["method"] in ("moka", "stage 1 only")
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert max(record["step"] for record in steps) == 2
        for name in config.evaluation.benchmarks:
            results = evaluate_benchmark(run, name, progress=False)
            predictions = (run / "benchmarks" / name / "predictions.jsonl").read_text("utf-8").splitlines()
            assert results["strict"]["n"] == len(predictions) > 0
            assert json.loads((run / "benchmarks" / name / "score.json").read_text("utf-8")).keys() == results.keys()


@pytest.mark.parametrize("path", [path for path in RUNNABLE if path.parts[0] == "quickstart"], ids=str)
def test_quickstart_runs_tiny_and_answers_its_test_questions(path, workplace, monkeypatch):
    if path.stem == "photographs" and not list((cache_dir() / "data").glob("stamps-*")):
        pytest.skip("the photographs (161 MB) are not in the cache")
    monkeypatch.chdir(workplace)
    config = load_config(CONFIGS / path, [*SMALL[:3], "data.validation_size=2"])
    run = run_training(config)
    samples = open_source(config.data.test, "test", size=8)
    result = evaluate(moka.load(run), samples, blank=False, max_new_tokens=3, progress=False)
    assert result["conditions"]["as given"]["overall"]["n"] == 8


def test_recipe_runs_its_stages_under_a_launcher(workplace):
    cell = "configs/qwen2_7b/speech_text"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
            *(str(ROOT / "recipes/speech_text.py"), "--tiny", "--config"),
            *(str(ROOT / cell / "stage1.yaml"), str(ROOT / cell / "stage2.yaml")),
            *("--set", *SMALL),
        ],
        cwd=workplace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = workplace / "runs/qwen2_7b/speech_text/stage2-tiny"
    assert {path.name for path in (run / "benchmarks").iterdir()} == {"asr", "mmau", "air-bench"}
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_wheel_has_the_configurations_and_finds_them_by_name(tmp_path):
    """Built from a copy without links, installed without its dependencies, and asked from another folder."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__")
    )
    assert not [path for path in source.rglob("*") if path.is_symlink()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    built = subprocess.run([*pip, str(tmp_path / "there"), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    ask = (
        "import moka.config as c; from moka.training.launch import launcher_names; print(c.__file__); "
        "print(c.find_config('quickstart/audio_visual_text')); print(launcher_names())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "there")}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    module, config, launchers = done.stdout.strip().splitlines()
    assert module.startswith(str(tmp_path / "there"))
    assert config == str(tmp_path / "there/moka/configs/quickstart/audio_visual_text.yaml")
    assert "zero2" in launchers


def test_an_unknown_name_has_the_nearest_as_a_hint():
    with pytest.raises(MokaError, match="quickstart/audio_visual_text"):
        load_config("quickstart/audio_visual_txt")
