"""``model: {kind: hf}``: Hugging Face multimodal LLMs through `moka train`, evaluation, loading, merging and export."""

import json

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file

import moka
from moka.cli.main import main
from moka.data import open_samples
from moka.errors import MokaError
from moka.export.run import export
from moka.modeling.hf_model import load_mllm, model_inputs
from moka.testing.tiny_mllms import KINDS, MEDIA
from moka.training import config_from_dict, run_training


@pytest.fixture(scope="module")
def write_data(tmp_path_factory):
    """Writes a JSONL file of twelve questions about the media that a kind of model takes; every third lacks the first."""

    def write(kind):
        folder = tmp_path_factory.mktemp(kind)
        noise, lines = np.random.default_rng(0), []
        for i in range(12):
            Image.fromarray(noise.integers(0, 255, (18, 24, 3), np.uint8)).save(folder / f"{i}.png")
            sound = noise.standard_normal(5000 + 100 * i).astype(np.float32) / 9
            soundfile.write(folder / f"{i}.wav", sound, 8000)
            parts = [{"type": "image", "image": f"{i}.png"}, {"type": "audio", "audio": f"{i}.wav"}]
            parts = [part for part in parts if part["type"] in MEDIA[kind]]
            parts = parts[i % 3 == 2 and len(parts) > 1 :]
            parts.append({"type": "text", "text": f"Which digit is number {i}?"})
            answer = ["one", "two", "three"][i % 3]
            chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"id": f"s{i}", "category": answer, "messages": chat}) + "\n")
        (folder / "data.jsonl").write_text("".join(lines))
        return folder / "data.jsonl"

    return write


def raw(kind, data, folder, **changes):
    values = {
        "stages": [2],
        "model": {"kind": "hf", "name": f"tiny:{kind}"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": dict.fromkeys(("train", "validation", "test"), str(data)),
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.03,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "optim": "sgd",
        },
        "output": {"dir": str(folder), "samples": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = value if not name else {**values[section], name: value}
    return values


@pytest.fixture(scope="module", params=KINDS)
def run(request, write_data, tmp_path_factory):
    """The kind, data file and folder of a finished run."""
    data = write_data(request.param)
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_training(config_from_dict(raw(request.param, data, folder, training__learning_rate=1.0)))
    return request.param, data, folder


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def logits(loaded, samples):
    rows = [loaded.processor.encode(loaded.decoding.decode_sample(sample)["messages"]) for sample in samples]
    batch = loaded.processor.pad(rows)
    batch.pop("labels")
    with torch.no_grad():
        return loaded.model(**batch).logits


def samples_of(data):
    return list(open_samples(str(data), "test").select(range(4)))


def test_the_loss_of_a_first_step_is_the_collators(run):
    kind, data, folder = run
    model, processor = load_mllm(f"tiny:{kind}", torch.float32)
    collator = moka.MultimodalCollator(processor.processor)
    samples = list(open_samples(str(data), "test").select(range(12)))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(42)).tolist()[:4]  # of transformers' sampler
    batch = collator([samples[index] for index in order])
    loss = model(**model_inputs(model, batch)).loss.item()
    assert losses(folder)[0] == pytest.approx(loss, abs=1e-5)  # B is zero


def test_a_run_is_trained_loaded_and_evaluated(run, capsys):
    kind, data, folder = run
    found = losses(folder)
    assert found[-1] < found[0]
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    rows = {"visual": "image" in MEDIA[kind], "audio": "audio" in MEDIA[kind]}
    for name, tensor in tensors.items():
        if "moka_A" in name:
            assert len(tensor) == 1 + sum(rows.values())
    loaded = moka.load(folder)
    trained = logits(loaded, samples_of(data))
    with loaded.model.disable_adapter():
        assert not torch.allclose(trained, logits(loaded, samples_of(data)), atol=1e-3)
    assert isinstance(loaded.generate("Which digit?", max_new_tokens=2), str)
    assert main(["eval", str(folder)]) == 0
    scores = json.loads((folder / "evaluation.json").read_text())["conditions"]
    assert set(scores) == {"as given", *(f"{name} blanked" for name, there in rows.items() if there)}
    assert scores["as given"]["overall"]["n"] == 12
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    single = loaded.generate_batch([samples_of(data)[0]["messages"][:1]], max_new_tokens=16)
    assert answers[0]["prediction"] == single[0]


def test_merged_and_exported(run, tmp_path):
    kind, data, folder = run
    expected = logits(moka.load(folder), samples_of(data))
    report = export(folder, tmp_path / "merged", "text-merged", samples=data)
    assert report.changed == report.expected > 0
    assert report.largest_difference < 1e-4
    torch.testing.assert_close(logits(moka.load(tmp_path / "merged"), samples_of(data)), expected, atol=1e-4, rtol=1e-3)
    report = export(folder, tmp_path / "text", "hf-backbone", samples=data)
    assert report.lost
    assert tf.AutoModelForMultimodalLM.from_pretrained(tmp_path / "text").config.model_type == (
        load_mllm(f"tiny:{kind}", torch.float32)[0].config.model_type
    )
    assert export(folder, tmp_path / "lora", "lora").changed > 0


def test_lora_is_a_changed_line(write_data, tmp_path):
    data = write_data("qwen2-audio")
    values = raw("qwen2-audio", data, tmp_path / "run", adapter={"method": "lora", "r": 4, "alpha": 8})
    folder = run_training(config_from_dict(values))
    names = list(load_file(folder / "adapter/adapter_model.safetensors"))
    assert all("language_model" in name and "lora_" in name for name in names)
    assert isinstance(moka.load(folder).generate("Which digit?", max_new_tokens=2), str)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moka", "lora"])
def test_two_processes_train_and_evaluate_as_one(method, write_data, launch, write_yaml, tmp_path):
    data = write_data("qwen2.5-omni")
    changes = {
        "adapter": {"method": method, "r": 4, "alpha": 8, "dropout": 0.0},
        "training__per_device_train_batch_size": 2,
    }
    config = write_yaml(tmp_path / "two.yaml", raw("qwen2.5-omni", data, tmp_path / "two", **changes))
    done = launch("torchrun", "train", config)
    assert done.returncode == 0, done.stderr[-3000:]
    one = run_training(config_from_dict(raw("qwen2.5-omni", data, tmp_path / "one", adapter=changes["adapter"])))
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "two", one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)
    done = launch("torchrun", "eval", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["eval", str(one)]) == 0
    answers = [(folder / "predictions.jsonl").read_text() for folder in (tmp_path / "two", one)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"kind": "hf"}}, ["model.name"]),
        ({"model": {"kind": "hug", "name": "x"}}, ["model.kind", "composed, hf"]),
        ({"model": {"name": "x"}}, ["model.name", "kind: hf"]),
        ({"model__modalities": {"visual": {}}}, ["model.modalities"]),
        ({"model__connectors": ["x"]}, ["model.connectors"]),
        ({"model__chat_template": "plain"}, ["model.chat_template"]),
        ({"stages": [1, 2]}, ["stages: [1, 2]", "stages: [2]"]),
        ({"training__packing": True}, ["training.packing"]),
        ({"training__train_sampling_strategy": "group_by_length"}, ["train_sampling_strategy", "random"]),
        ({"data__feature_cache": "x"}, ["data.feature_cache"]),
        ({"model__name": "/none"}, ["model.name", "/none"]),
        ({"model__name": "tiny:gpt"}, ["model.name", "tiny:gpt", "tiny:qwen2.5-omni"]),
        ({"model": {"kind": "hf", "name": "some/model", "tiny": True}}, ["model.name", "some/model"]),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, changes, words):
    with pytest.raises(MokaError) as caught:
        run_training(config_from_dict(raw("qwen2-audio", "embedded:speech-text", tmp_path / "run", **changes)))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_media_that_the_model_does_not_take_are_named(write_data, tmp_path):
    data = write_data("qwen2.5-omni")
    with pytest.raises(MokaError, match=r"sample 's0'.*'image'.*takes text, audio"):
        run_training(config_from_dict(raw("qwen2-audio", data, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_feature_cache_is_for_composed_models(write_data, write_yaml, tmp_path, capsys):
    config = write_yaml(tmp_path / "run.yaml", raw("qwen2-audio", write_data("qwen2-audio"), tmp_path / "run"))
    assert main(["cache", str(config), f"data.feature_cache={tmp_path / 'cache'}"]) == 2
    assert "model.kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    "balance",
    [
        [{"name": "ogm", "every": 1}, {"name": "opm", "every": 1, "warmup": 0.0}, {"name": "unimodal_losses"}],
        [{"name": "mmpareto"}, {"name": "mla"}, {"name": "inforeg", "every": 1}],
        [{"name": "valuation", "every": 1, "warmup": 0.0}, {"name": "relearning", "every": 1}, {"name": "cml"}],
    ],
    ids=lambda entries: "+".join(entry["name"] for entry in entries),
)
def test_balance_strategies_act_on_a_model_that_sees_and_hears(write_data, tmp_path, balance):
    data = write_data("qwen2.5-omni")
    run = run_training(config_from_dict(raw("qwen2.5-omni", data, tmp_path / "run", balance=balance)))
    logged = [key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)]
    for entry in balance:
        assert any(key.startswith(f"balance/{entry['name']}/") for key in logged), entry


def test_a_model_that_only_sees_has_nothing_to_compare(write_data, tmp_path):
    config = config_from_dict(raw("qwen2.5-vl", write_data("qwen2.5-vl"), tmp_path / "run", balance=[{"name": "ogm"}]))
    with pytest.raises(MokaError, match=r"balance: ogm: .*visual.*ablate: adapter"):
        run_training(config)
    assert not (tmp_path / "run").exists()
