"""``moka train``: what a run leaves after, and what it says to each kind of bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moka.modeling import build

QUIET = ("training.save_strategy=no", "alignment.save_strategy=no", "training.max_steps=2", "alignment.max_steps=2")


def jsonl(tmp_path, media, change=None, name="bad.jsonl"):
    """A copy of the media folder whose data a test may spoil: the path of its JSONL, and its folder."""
    folder = tmp_path / "media"
    shutil.copytree(media, folder)
    samples = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    if change is not None:
        change(samples, folder)
    (folder / name).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder / name


def on(path):
    return [f"data.{name}={path}" for name in ("train", "alignment", "validation", "test")]


def test_a_run_leaves_all_it_promises(moka, config_file):
    path, run = config_file()
    done = moka("train", path, *QUIET)
    assert done.code == 0
    assert f"done: {run}  (next: moka eval {run})" in done.out
    for command in ("generate", "demo", "diagnose"):
        assert f"moka {command} {run}" in done.out
    names = {p.name for p in run.iterdir()}
    assert names >= {
        *("config.yaml", "connector", "adapter", "metrics.jsonl", "loss.png", "samples.jsonl", "README.md"),
        *("summary.json", "tensorboard"),
    }
    assert not list(run.rglob("*.part"))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").rglob("events.out.*"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {(r["stage"], r["step"]) for r in records if "loss" in r} == {(s, k) for s in (1, 2) for k in (1, 2)}
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert samples[0]["question"] == "[image] [audio] Which digit is written?"
    assert samples[0]["reference"]
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["training"]["max_steps"] == 2
    assert resolved["adapter"]["dropout"] == 0.05  # a default, written out


def test_overrides_may_follow_options(moka, config_file):
    path, run = config_file(stages=[1])
    assert moka("train", path, "--overwrite", *QUIET).code == 0
    assert (run / "connector/connector.json").exists()
    assert moka("train", path, "--nonsense", *QUIET).code == 2


def test_stage_two_from_connectors_equals_both_at_once(moka, config_file, tmp_path):
    path, run = config_file()
    assert moka("train", path, *QUIET).code == 0
    assert moka("train", path, *QUIET, "stages=[1]", f"output.dir={tmp_path / 'one'}").code == 0
    connectors = f"model.connectors=[{tmp_path / 'one/connector'}]"
    done = moka("train", path, *QUIET, "stages=[2]", connectors, f"output.dir={tmp_path / 'two'}")
    assert done.code == 0
    assert "start untrained" not in done.out
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "two", run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    done = moka("train", path, *QUIET, "stages=[2]", f"output.dir={tmp_path / 'untrained'}")
    assert done.code == 0
    assert "projectors.audio start untrained" in done.out


def test_help_config_prints_the_keys(moka):
    done = moka("train", "--help-config")
    assert done.code == 0
    assert "  share_b: true" in done.out
    assert "  global_batch_size:" in done.out
    assert "  learning_rate:" in done.out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rang=4", ["adapter.rang"]),
        ("adapter.target_modules=[no_such_layer]", ["adapter", "no_such_layer"]),
        ("adapter.adapt=[smell]", ["adapter", "smell"]),
        ("training.bf16=true", ["training.bf16", "GPU"]),
        ("training.optim=adamw_torchy", ["training", "adamw_torchy"]),
        ("no-equals-sign", ["no-equals-sign", "section.key=value"]),
        ("model.backbone=/no/such/folder", ["model.backbone", "/no/such/folder"]),
        ("model.max_length=100000", ["model.max_length", "512"]),
        ("model.chat_template=chatmll", ["chatmll", "chatml"]),
        ("model.modalities.visual.encoder.type=convimage", ["convimage", "conv-image"]),
        ("model.modalities.visual.projector.tokens=0", ["tokens", "0"]),
        ("data.train=null", ["data.train", "not set"]),
        ("data.train=embedded:audio-visual", ["audio-visual-text"]),
        ("data.train=none.jsonl", ["none.jsonl", "does not exist"]),
        ("output.dir=/proc/nope/run", ["output.dir", "/proc/nope/run"]),
        ("output.dir=FILE", ["output.dir", "is a file"]),
        ("output.dir=FILE/deeper", ["output.dir", "is a file"]),
        *(
            (f"adapter.method=lora {override}", ["adapter"])
            for override in ("adapter.r=0", "adapter.dropout=1.5", "adapter.target_modules=[nothing]")
        ),
    ],
)
def test_bad_configuration_is_one_line_and_leaves_nothing(refused, config_file, tmp_path, override, words):
    path, run = config_file()
    (tmp_path / "file").write_text("mine")
    line = refused("train", path, *override.replace("FILE", str(tmp_path / "file")).split())
    for word in words:
        assert word in line, line
    assert not run.exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_keeps_the_traceback(moka, config_file):
    path, _ = config_file()
    with pytest.raises(ValueError, match="unknown key"):
        moka("train", path, "adapter.rang=4", "--debug")


def test_folder_that_has_a_run_is_refused(refused, config_file, trained_run):
    path, _ = config_file()
    before = sorted((p, p.stat().st_mtime_ns) for p in trained_run.rglob("*"))
    line = refused("train", path, f"output.dir={trained_run}")
    assert "already has a run" in line
    assert "--resume" in line
    assert sorted((p, p.stat().st_mtime_ns) for p in trained_run.rglob("*")) == before


def _spoil(name, how):
    def change(samples, folder):
        how(folder / name)

    return change


def _set_content(part):
    def change(samples, folder):
        samples[3]["messages"][0]["content"][0] = part

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_spoil("3.png", Path.unlink), ["3.png", "does not exist"]),
        (_spoil("3.png", lambda p: p.write_bytes(p.read_bytes()[:300])), ["3.png", "truncated"]),
        (_spoil("3.wav", lambda p: p.write_bytes(p.read_bytes()[:5000])), ["3.wav", "truncated"]),
        (_set_content({"type": "image"}), ["bad.jsonl:4", "placeholder without a medium"]),
        (lambda samples, folder: samples.clear(), ["bad.jsonl", "empty"]),
        (lambda samples, folder: samples[2]["messages"].pop(), ["bad.jsonl:3", "assistant"]),
    ],
    ids=["absent picture", "cut picture", "cut sound", "placeholder", "empty file", "no answer"],
)
def test_bad_data_is_one_line_and_leaves_nothing(refused, config_file, media, tmp_path, change, words):
    data = jsonl(tmp_path, media, change)
    path, run = config_file()
    line = refused("train", path, *on(data))
    for word in words:
        assert word in line, line
    assert not run.exists()


def test_damaged_file_met_in_training_leaves_nothing(refused, config_file, media, tmp_path, monkeypatch):
    """Of a large data set only a part is tried before; here none, and a loader's worker meets the file."""
    from moka.training import datasets

    monkeypatch.setattr(datasets, "_TRIED", 1)
    data = jsonl(tmp_path, media, _spoil("3.png", lambda p: p.write_text("only text")))
    path, run = config_file(stages=[2])
    line = refused("train", path, *on(data), "training.dataloader_num_workers=1", "training.max_steps=20")
    assert "3.png" in line
    assert "not an image" in line
    assert "Caught" not in line
    assert not run.exists()


def test_bad_media_can_be_substituted_and_are_reported(moka, config_file, media, tmp_path):
    data = jsonl(tmp_path, media, _spoil("3.png", lambda p: p.write_text("only text")))
    path, run = config_file(stages=[2])
    done = moka("train", path, *on(data), "data.on_bad_media=substitute", "data.bad_media_budget=0.2")
    assert done.code == 0, done.err[-800:]
    assert "1 sample replaced by others" in done.out
    (record,) = map(json.loads, (run / "bad-media-train.jsonl").read_text().splitlines())
    assert record["id"] == "s3"
    assert (run / "adapter").is_dir()


def test_bad_media_can_be_left_out_before_training(moka, config_file, media, tmp_path):
    data = jsonl(tmp_path, media, _spoil("3.png", lambda p: p.write_text("only text")))
    path, run = config_file(stages=[2])
    skip = ["data.on_bad_media=skip", "data.bad_media_budget=0.2"]
    done = moka("train", path, *on(data), *skip)
    assert done.code == 0, done.err[-800:]
    assert "1 of 8 samples left out" in done.out
    totals, record = map(json.loads, (run / "bad-media-train.jsonl").read_text().splitlines())
    assert totals == {"tried": 8, "skipped": 1}
    assert "samples of data.train left out for bad media | 1 |" in (run / "README.md").read_text("utf-8")
    assert (record["id"], record["action"]) == ("s3", "skip")
    # The file was corrected meanwhile: the run to be resumed keeps to the samples it began with.
    shutil.copy(tmp_path / "media" / "2.png", tmp_path / "media" / "3.png")
    (run / "summary.json").unlink()
    again = moka("train", path, *on(data), *skip, "--resume")
    assert again.code == 0, again.err[-800:]
    assert "1 of 8 samples left out" in again.out


def test_more_bad_media_than_the_budget_leave_no_run(refused, config_file, media, tmp_path):
    data = jsonl(tmp_path, media, _spoil("3.png", lambda p: p.write_text("only text")))
    path, run = config_file(stages=[2])
    line = refused("train", path, *on(data), "data.on_bad_media=skip", "data.bad_media_budget=0")
    for word in ("1 of 8 samples", "budget allows 0", "3.png", "data.bad_media_budget"):
        assert word in line
    assert not run.exists()


def test_connectors_of_another_model_are_refused(refused, config_file, backbones, trained_run, tmp_path):
    path, run = config_file(stages=[2], model__connectors=[str(trained_run / "connector")])
    other = tmp_path / "other"  # of the same shapes
    shutil.copytree(backbones["llama"], other)
    weights = load_file(other / "model.safetensors")
    save_file({key: t + 0.01 for key, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for override, word in (
        (f"model.backbone={backbones['qwen2']}", "backbone"),
        (f"model.backbone={other}", "backbone_fingerprint"),
        ("model.modalities.visual.encoder.width=24", "visual encoder"),
        ("model.modalities.audio.projector.tokens=3", "audio projector"),
        ("model.modalities.audio.projector={type: mlp}", "audio projector"),
    ):
        line = refused("train", path, override)
        assert word in line, line
        assert "connector" in line, line
        assert not run.exists()


def _drop_one(folder):
    tensors = load_file(folder / "connector.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "connector.safetensors")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: (folder / "connector.safetensors").write_bytes(b"cut"), "truncated"),
        (lambda folder: (folder / "connector.safetensors").unlink(), "no stage-1 result"),
        (lambda folder: (folder / "connector.json").write_text('{"format'), "damaged"),
        (lambda folder: (folder / "connector.json").write_text("{}"), "lacks"),
        (_drop_one, "missing"),
    ],
)
def test_damaged_connectors_are_refused(refused, config_file, trained_run, tmp_path, change, word):
    path, run = config_file(stages=[2])
    folder = tmp_path / "connector"
    shutil.copytree(trained_run / "connector", folder)
    change(folder)
    assert word in refused("train", path, f"model.connectors=[{folder}]")
    assert not run.exists()


def test_each_part_comes_from_one_connector(refused, moka, config_file, trained_run, tmp_path):
    path, run = config_file(stages=[2])
    visual = [f"data.alignment={_pictures(tmp_path)}", f"model.modalities={_visual(path)}"]
    assert moka("train", path, "stages=[1]", *QUIET, *visual, f"output.dir={tmp_path / 'visual'}").code == 0
    line = refused("train", path, f"model.connectors=[{tmp_path / 'visual/connector'}]")
    assert "projectors.audio" in line
    twice = f"{trained_run / 'connector'}, {trained_run / 'connector'}"
    assert "name one of them" in refused("train", path, f"model.connectors=[{twice}]")
    assert not run.exists()


def _visual(path):
    modalities = yaml.safe_load(path.read_text())["model"]["modalities"]
    return json.dumps({"visual": modalities["visual"]})


def _pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.full((28, 28), 200, np.uint8)).save(folder / "a.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "one"},
    ]
    (folder / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    return folder / "a.jsonl"


@pytest.mark.parametrize("evaluated", [False, True])
def test_model_card_has_what_it_says(trained_run, tmp_path, evaluated, moka):
    run = trained_run
    if evaluated:
        run = tmp_path / "run"
        shutil.copytree(trained_run, run)
        assert moka("eval", run).code == 0
    text = (run / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    front = yaml.safe_load(header)
    assert front["library_name"] == "peft"
    assert sorted(front["tags"]) == ["moka", "multimodal"]
    assert ("Not evaluated yet." in body) is not evaluated
    assert "| stage 2 | one process, PeftModel" in body
    assert "{" not in body
    assert "`KeyError: 'MOKA'`" in body
    code = body.split("```python\n")[1].split("```")[0]
    # The names in it exist: run it with real media in the places of the user's.
    assert f'moka.load("{run.as_posix()}")' in code
    assert 'image="picture.png", audio="sound.wav"' in code
    assert (run / "adapter/README.md").read_text() == text
    assert "Free Spoken Digit Dataset" in body


def test_code_of_the_model_card_runs(trained_run, media, tmp_path, monkeypatch, capsys):
    code = (trained_run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    shutil.copy(media / "0.png", tmp_path / "picture.png")
    shutil.copy(media / "0.wav", tmp_path / "sound.wav")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    answer = capsys.readouterr().out
    assert answer == names["model"].generate("Your question?", image="picture.png", audio="sound.wav") + "\n"


def test_skeleton_for_checks_counts_what_the_real_adapter_has(tiny_config, tmp_path):
    from moka.training import config_from_dict

    for method in ("moka", "lora"):
        config = config_from_dict(tiny_config(tmp_path / "x", adapter__method=method))
        model, _ = build.build_model(config.model)
        before = {name: (p.requires_grad, p.device) for name, p in model.named_parameters()}
        counted = build.adapter_parameters(model, config.adapter)
        assert {name: (p.requires_grad, p.device) for name, p in model.named_parameters()} == before
        assert counted == build.count_parameters(build.attach_adapter(model, config.adapter))["adapter"]


def test_installed_command_and_module_say_the_same(tmp_path):
    """Real processes, as a user starts them."""
    for command in ([Path(sys.executable).with_name("moka")], [sys.executable, "-m", "moka"]):
        done = subprocess.run(
            [*command, "train", tmp_path / "none.yaml"], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]  # libraries may print lines of their own before
        assert last.startswith(f"moka: error: No configuration file {tmp_path / 'none.yaml'}")


def test_embedded_tasks_with_knobs_are_trained_validated_and_evaluated_on(moka, tiny_config, write_yaml, tmp_path):
    source = "embedded:audio-visual-text"
    train = {"source": source, "missing": {"visual": 0.5, "audio": 0.5}, "corrupt": {"visual": 0.3}}
    changes = {"data__train": train, "data__validation": {"source": source, "noise": {"audio": 1.0}}}
    changes |= {"data__test": {"source": source, "leak": 1.0}, "stages": [2], "training__max_steps": 3}
    done = moka("train", write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **changes)))
    assert done.code == 0, done.err
    assert "Free Spoken Digit Dataset" in (tmp_path / "run/README.md").read_text()
    done = moka("eval", tmp_path / "run", "--size", "4", "--no-blank")
    assert done.code == 0, done.err
    assert f"{source}, leak 1.0, test" in (tmp_path / "run/evaluation.json").read_text()
