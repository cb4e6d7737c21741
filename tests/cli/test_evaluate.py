"""``moka eval``: figures on screen and in files, for every kind of run and of data."""

import json
import re
import shutil

import pytest
import yaml

from moka.demo.digit_tasks import EmbeddedTask
from moka.evaluation import evaluate, wilson
from moka.inference import Ensemble, load

QUIET = ("training.save_strategy=no", "alignment.save_strategy=no", "training.max_steps=2", "alignment.max_steps=2")


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the trained run to evaluate."""
    folder = tmp_path / "copy"
    shutil.copytree(trained_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def test_evaluation_counts_what_was_answered(moka, run):
    done = moka("eval", run)
    assert done.code == 0, done.err[-500:]
    result = json.loads((run / "evaluation.json").read_text())
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert set(result["conditions"]) == {"as given", "visual blanked", "audio blanked"}
    for condition, n in (("as given", 8), ("visual blanked", 4), ("audio blanked", 4)):
        scores = result["conditions"][condition]
        assert list(scores)[-1] == "overall"
        assert set(scores) == {"written", "spoken", "same", "sum", "overall"}
        assert scores["overall"]["n"] == n
        of = [p for p in predictions if p["condition"] == condition]
        assert len(of) == n
        for category, score in scores.items():
            mine = [p for p in of if category in ("overall", p["category"])]
            assert score["n"] == len(mine)
            assert score["right"] == sum(p["right"] for p in mine)
            assert score["accuracy"] == score["right"] / score["n"]
            assert score["interval"] == list(wilson(score["right"], score["n"]))
    for column in ("as given", "visual blanked", "audio blanked", "written", "overall", "Wilson"):
        assert column in done.out
    protocol = result["protocol"]
    assert protocol["n"] == 8
    assert re.fullmatch("[0-9a-f]{64}", protocol["questions_sha256"])
    assert "| as given: overall |" in (run / "README.md").read_text()


def test_evaluation_is_reproducible_and_options_hold(moka, run):
    moka("eval", run)
    first = (run / "predictions.jsonl").read_text(), (run / "evaluation.json").read_text()
    moka("eval", run, "--batch-size", "3")
    assert ((run / "predictions.jsonl").read_text(), (run / "evaluation.json").read_text()) == first
    done = moka("eval", run, "--size", "5", "--no-blank", "--split", "validation")
    result = json.loads((run / "evaluation.json").read_text())
    assert list(result["conditions"]) == ["as given"]
    assert result["conditions"]["as given"]["overall"]["n"] == 5
    assert "validation" in done.out


def test_run_without_test_data_is_reported(refused, run):
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["data"]["test"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    line = refused("eval", run)
    assert "data.test is not set" in line
    assert "--data FILE" in line
    assert not (run / "evaluation.json").exists()


def test_what_cannot_be_evaluated_is_reported(refused, run, tmp_path):
    assert "no run folder" in refused("eval", tmp_path)
    assert "none.jsonl" in refused("eval", run, "--data", tmp_path / "none.jsonl")
    assert "--size" in refused("eval", run, "--size", "0")
    assert "--batch-size" in refused("eval", run, "--batch-size", "-1")
    shutil.rmtree(run / "adapter")
    assert "stage-1 run only" in refused("eval", run)
    assert not (run / "evaluation.json").exists()


def test_sample_longer_than_the_context_is_named(refused, run, tmp_path):
    messages = [{"role": "user", "content": "seven " * 600}, {"role": "assistant", "content": "one"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "clip9", "messages": messages}) + "\n")
    line = refused("eval", run, "--data", tmp_path / "long.jsonl")
    assert "sample 'clip9'" in line
    assert "Too long" in line


@pytest.mark.parametrize(
    "adapter",
    [["adapter.method=lora"], ["adapter.share_b=false", "adapter.interaction=none"], ["adapter.preset=official-avt"]],
    ids=["lora", "multiple lora", "official"],
)
def test_every_method_goes_from_files_to_answers(moka, config_file, media, adapter):
    """A user's own pictures and sounds: train, evaluate, ask."""
    data = [f"data.{name}={media / 'data.jsonl'}" for name in ("train", "alignment", "validation", "test")]
    path, run = config_file(alignment__objective="language_modeling")
    assert moka("train", path, *QUIET, *data, *adapter).code == 0
    done = moka("eval", run)
    assert done.code == 0, done.err[-500:]
    scores = json.loads((run / "evaluation.json").read_text())["conditions"]
    assert set(scores) == {"as given", "visual blanked", "audio blanked"}
    assert {name: s["n"] for name, s in scores["as given"].items()} == {"even": 4, "odd": 4, "overall": 8}
    asked = moka("generate", run, "--image", media / "0.png", "--audio", media / "0.wav", "Which digit is written?")
    assert asked.code == 0
    first = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    short = moka(
        *("generate", run, "--image", media / "0.png", "--audio", media / "0.wav", "--max-new-tokens", "4"),
        "Which digit is written?",
    )
    assert short.out == first["prediction"] + "\n"


def test_options_of_a_benchmark_need_a_benchmark(refused, run):
    assert "--benchmark" in refused("eval", run, "--root", "somewhere")


def test_another_file_has_its_media_next_to_it(moka, run, media, tmp_path):
    """Not where those of the run's own data are."""
    shutil.copytree(media, tmp_path / "elsewhere")
    assert moka("eval", run, "--data", tmp_path / "elsewhere/data.jsonl", "--no-blank", "--size", "2").code == 0


def test_a_category_of_markup_is_no_markup(moka, run, media, tmp_path):
    shutil.copytree(media, tmp_path / "odd")
    data = tmp_path / "odd/data.jsonl"
    data.write_text(data.read_text().replace('"even"', '"[/red]"'))
    done = moka("eval", run, "--data", data, "--no-blank")
    assert done.code == 0, done.err[-500:]
    assert "[/red]" in done.out


def test_entropy_fusion_is_that_of_the_library_and_says_so(moka, run):
    done = moka("eval", run, "--decoding", "entropy-fusion", "--no-blank")
    assert done.code == 0, done.err[-500:]
    assert "entropy-fusion" in json.loads((run / "evaluation.json").read_text())["protocol"]["decoding"]
    loaded = load(run)
    loaded.settings = {"decoding": "entropy-fusion"}
    samples = EmbeddedTask("audio-visual-text", "test", size=8)
    expected = evaluate(loaded, samples, blank=False, batch_size=3, max_new_tokens=4, progress=False)["predictions"]
    found = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in found] == [one["prediction"] for one in expected]


def test_runs_of_one_modality_each_answer_together(moka, refused, run, config_file, tmp_path):
    members = {}
    for name in ("visual", "audio"):
        members[name] = tmp_path / name
        balance = [{"name": "single_modality", "modality": name}]
        config, _ = config_file(output__dir=str(members[name]), stages=[2], balance=balance, training__seed=len(name))
        assert moka("train", config, *(option for option in QUIET if "alignment" not in option)).code == 0
    done = moka("eval", members["visual"], "--ensemble", members["audio"], "--no-blank")
    assert done.code == 0, done.err[-500:]
    result = json.loads((members["visual"] / "ensemble/evaluation.json").read_text())
    assert result["conditions"]["as given"]["overall"]["n"] == 8
    assert not (members["visual"] / "evaluation.json").exists()
    ensemble = Ensemble({name: load(folder) for name, folder in members.items()})
    samples = EmbeddedTask("audio-visual-text", "test", size=8)
    expected = evaluate(ensemble, samples, blank=False, batch_size=4, max_new_tokens=4, progress=False)["predictions"]
    found = [json.loads(line) for line in (members["visual"] / "ensemble/predictions.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in found] == [one["prediction"] for one in expected]
    assert "trained on all modalities" in refused("eval", members["visual"], "--ensemble", run)
    assert "second run of visual" in refused("eval", members["visual"], "--ensemble", members["visual"])
    assert "--benchmark" in refused("eval", run, "--ensemble", run, "--benchmark", "pope")
