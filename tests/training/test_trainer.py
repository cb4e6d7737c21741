"""The trainer: equal losses however a batch is cut, checkpoints of what is trained, no half-written result."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from transformers import Trainer

from moka.data import EncodedDataset
from moka.errors import MokaError
from moka.modeling.build import attach_adapter, build_model
from moka.modeling.encoders import ENCODERS
from moka.training import config_from_dict
from moka.training import trainer as trainer_module
from moka.training.arguments import training_arguments
from moka.training.run_dir import RunFolder
from moka.training.trainer import MokaTrainer

NO_DROPOUT = {
    "adapter__dropout": 0.0,
    "model__modalities__visual__encoder__dropout": 0.0,
    "model__modalities__audio__encoder__dropout": 0.0,
    "training__save_strategy": "no",
    "alignment__save_strategy": "no",
    "training__eval_strategy": "no",
}


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}


@pytest.mark.parametrize("objective", ["embedding", "language_modeling"])
def test_accumulated_batches_lose_as_one_big_batch(train, tmp_path, objective):
    changes = {
        **NO_DROPOUT,
        "alignment__objective": objective,
        "alignment__global_batch_size": 8,
        "training__global_batch_size": 8,
        "alignment__max_steps": 3,
        "training__max_steps": 3,
    }
    found = {}
    for size in (8, 2):
        sizes = {"alignment__per_device_train_batch_size": size, "training__per_device_train_batch_size": size}
        found[size] = losses(train(tmp_path / str(size), **changes, **sizes))
    assert len(found[8]) == 6
    assert found[2] == pytest.approx(found[8], rel=1e-4)


def test_checkpoints_hold_what_is_trained_and_no_backbone(trained_run, backbones):
    backbone = sum(t.numel() for t in load_file(backbones["llama"] / "model.safetensors").values())
    one, two = (trained_run / f"checkpoints/stage{stage}/checkpoint-2" for stage in (1, 2))
    assert not list((trained_run / "checkpoints").rglob("model.safetensors"))
    for file, parts in (
        (one / "connector.safetensors", ("encoders.", "projectors.")),
        (two / "adapter_model.safetensors", (".moka_A", ".moka_B", ".encoders.", ".projectors.")),
    ):
        tensors = load_file(file)
        assert all(any(part in f".{key}" or key.startswith(part) for part in parts) for key in tensors)
        assert all(any(part in f".{key}" for key in tensors) for part in parts)
    assert sum(t.numel() for t in load_file(one / "connector.safetensors").values()) < backbone
    # Adam keeps two numbers for each trained one.
    trained = sum(t.numel() for t in load_file(two / "adapter_model.safetensors").values())
    state = torch.load(two / "optimizer.pt")["state"]
    assert sum(s["exp_avg"].numel() for s in state.values()) == trained


def test_every_trained_parameter_of_a_tower_in_the_adapted_model_can_get_a_gradient(train, tiny_config, tmp_path):
    """DDP waits for one of each; peft makes all of its copy trainable, also the layers after the one that is read."""
    raw = tiny_config(tmp_path / "x")
    tower = {"type": "clip", "trainable": True, "layer": -2, "model_config": ENCODERS["clip"].tiny_model}
    raw["model"]["modalities"]["visual"]["encoder"] = tower
    config = config_from_dict(raw)
    adapted = attach_adapter(build_model(config.model)[0], config.adapter).train()
    encoder = adapted.base_model.model.encoders["visual"].modules_to_save["default"]
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    (encoder(torch.randn(encoder.dummy_input(2).shape)) ** 3).sum().backward()
    assert trained == {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert any("layers.0" in name for name in trained)
    assert not any("layers.1" in name for name in trained)


@pytest.mark.parametrize("method", ["moka", "lora"])
def test_any_field_of_the_adapters_configuration_reaches_it(train, tmp_path, method):
    changes = {"adapter__method": method, "adapter__rank_pattern": {"q_proj": 3}, "adapter__bias": "none"}
    run = train(tmp_path / "run", **NO_DROPOUT, stages=[2], training__max_steps=1, **changes)
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    ranks = {name.split(".")[-3]: t.shape[-2] for name, t in tensors.items() if "_A." in name}
    assert ranks == {"q_proj": 3, "v_proj": 2}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_each_part_gets_its_learning_rate(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x"))
    model, processor = build_model(config.model)
    adapted = attach_adapter(model, config.adapter)
    rates = {"learning_rate": 0.5, "encoder_learning_rate": 0.25, "projector_learning_rate": 0.125}
    arguments = training_arguments({**rates, "weight_decay": 0.1}, tmp_path / "x")
    trainer = MokaTrainer(model=adapted, args=arguments, processing_class=processor)
    of = {id(p): g for g in trainer.create_optimizer().param_groups for p in g["params"]}
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(of) == len(trained)
    for name, parameter in trained.items():
        expected = 0.25 if ".encoders." in name else 0.125 if ".projectors." in name else 0.5
        assert of[id(parameter)]["lr"] == expected
        if name.endswith(".bias"):
            assert of[id(parameter)]["weight_decay"] == 0.0
    assert {group["weight_decay"] for group in of.values()} == {0.0, 0.1}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_exhausted_memory_names_the_batch_size(train, tmp_path, monkeypatch, error):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(MokaTrainer, "compute_loss", fail)
    with pytest.raises(MokaError, match=r"training.per_device_train_batch_size: 4 .*memory"):
        train(tmp_path / "run", **NO_DROPOUT, stages=[2])


def test_a_killed_worker_names_the_number_of_workers(train, tmp_path, monkeypatch, killed):
    get = EncodedDataset.__getitem__

    def killed(self, index):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    monkeypatch.setattr(EncodedDataset, "__getitem__", killed)
    with pytest.raises(MokaError, match=r"training.dataloader_num_workers: 1: "):
        train(tmp_path / "run", **NO_DROPOUT, stages=[2], training__dataloader_num_workers=1)


def test_an_adapter_that_learned_nothing_is_saved_with_a_warning(train, tmp_path, capsys):
    run = train(tmp_path / "run", **NO_DROPOUT, stages=[2], training__learning_rate=0.0)
    assert "still zero" in capsys.readouterr().out
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert (run / "summary.json").exists()


def test_few_methods_of_the_trainer_are_overridden_and_each_has_its_reason():
    own = [name for name in vars(MokaTrainer) if name in dir(Trainer) and callable(getattr(Trainer, name))]
    overridden = sorted(set(own) - {"__init__", "__module__", "__doc__", "__static_attributes__"})
    assert len(overridden) <= 10, overridden
    assert sum(name.startswith("_") for name in overridden) <= 4, overridden
    assert all(f"- ``{name}``: " in trainer_module.__doc__ for name in overridden)


@pytest.fixture
def largest_file():
    """Files may grow to so many bytes: the operating system's own refusal in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files")
@pytest.mark.parametrize(
    ("changes", "words"), [({"stages": [2]}, "checkpoint-2"), (NO_DROPOUT, "connector")], ids=["checkpoint", "result"]
)
def test_a_full_disk_leaves_nothing_half_written(train, tiny_config, tmp_path, largest_file, changes, words):
    raw = tiny_config(tmp_path / "run", **changes, data__validation=None)
    largest_file(20_000)
    with pytest.raises(MokaError, match=rf"{words} cannot be written: the disk is full .*--resume"):
        train(raw)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} <= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert not list(run.glob("checkpoints/*/*")) + list(run.rglob("*.tmp"))
    largest_file(resource.RLIM_INFINITY)
    train(raw, resume=True)
    assert (run / "summary.json").exists()


def test_full_disk_at_the_start_leaves_no_folder(tiny_config, tmp_path, largest_file):
    config = config_from_dict(tiny_config(tmp_path / "run"))
    largest_file(100)
    with pytest.raises(MokaError, match="the disk is full"):
        RunFolder(tmp_path / "run").create(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", [[], [".lock"], [".config.yaml.x1.tmp"], ["config.yaml"], ["config.yaml", "adapter"]])
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_killed_run_leaves_a_folder_that_some_command_takes(trained_run, tmp_path, left, how):
    """Killed before its configuration was there, or while --overwrite removed an earlier run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        source = trained_run / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            (folder / name).write_bytes(source.read_bytes() if source.exists() else b"half")
    is_run = "config.yaml" in left
    allowed = how in ([{"resume": True}, {"overwrite": True}] if is_run else [{}, {"overwrite": True}])
    run_folder = RunFolder(folder)
    try:
        if allowed:
            run_folder.check(**{"resume": False, "overwrite": False, **how})
        else:
            with pytest.raises(MokaError, match=r"output.dir|--resume"):
                run_folder.check(**{"resume": False, "overwrite": False, **how})
    finally:
        run_folder.lock.release()


def test_clearing_removes_the_configuration_last(trained_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        RunFolder(folder)._clear()
    assert RunFolder(folder).is_run()


def test_secrets_are_not_written(tiny_config, tmp_path):
    raw = tiny_config(tmp_path / "run", training__hub_token="hf_secret")
    RunFolder(tmp_path / "run").create(config_from_dict(raw))
    assert "hf_secret" not in (tmp_path / "run/config.yaml").read_text()
    RunFolder(tmp_path / "run").check_same(config_from_dict(raw))


def test_overwrite_replaces_a_run_and_nothing_else(trained_run, train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(MokaError, match="not empty"):
        train(folder, overwrite=True)
    assert (folder / "config.yaml").read_text() == "mine: 1\n"

    (folder / "config.yaml").write_text((trained_run / "config.yaml").read_text())
    (folder / "notes.txt").write_text("mine")
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(MokaError, match="already has a run"):
        train(folder)
    train(folder, stages=[1], alignment__max_steps=1, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "evaluation.json").exists()  # of the run before
    assert RunFolder(folder).metrics()[-1]["step"] == 1


def test_gradient_checkpointing_changes_no_loss(train, tmp_path):
    changes = {**NO_DROPOUT, "training__max_steps": 3, "alignment__max_steps": 2}
    plain = losses(train(tmp_path / "plain", **changes))
    both = {"training__gradient_checkpointing": True, "alignment__gradient_checkpointing": True}
    assert losses(train(tmp_path / "saving", **changes, **both)) == pytest.approx(plain, rel=1e-5)


def test_best_checkpoint_is_the_result_where_asked(train, tiny_config, tmp_path):
    """A rate that ruins the model after the first evaluation: the result is the one before."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    for stage, name, file in ((1, "alignment", "connector.safetensors"), (2, "training", "adapter_model.safetensors")):
        raw = tiny_config(tmp_path / name, stages=[stage])
        raw[name] |= {**best, "learning_rate": 0.5}
        folder = train(raw)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        scores = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
        step = min(scores, key=scores.get)
        result = load_file(folder / ("connector" if stage == 1 else "adapter") / file)
        expected = load_file(folder / f"checkpoints/stage{stage}/checkpoint-{step}" / file)
        last = load_file(folder / f"checkpoints/stage{stage}/checkpoint-6" / file)
        assert all(torch.equal(result[key], expected[key]) for key in expected)
        assert step == 6 or not all(torch.equal(result[key], last[key]) for key in last)


REFUSING = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}"
)


@pytest.fixture
def odd_rows(tmp_path):
    """A data set whose line 12 begins with an answer, or has half of a surrogate pair."""

    def write(odd):
        lines = []
        for number in range(1, 25):
            messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "one"}]
            lines.append(json.dumps({"messages": odd if number == 12 else messages}))
        path = tmp_path / "odd.jsonl"
        path.write_text("\n".join(lines))
        return str(path)

    return write


@pytest.mark.parametrize(
    "odd",
    [
        [
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "what"},
            {"role": "assistant", "content": "two"},
        ],
        [{"role": "user", "content": "half \ud800 pair"}, {"role": "assistant", "content": "two"}],
    ],
    ids=["template", "tokenizer"],
)
def test_a_row_that_the_template_or_tokenizer_refuses_is_named_before_the_first_step(
    train, tiny_config, tmp_path, odd_rows, odd, capsys
):
    own = {"data__train": odd_rows(odd), "data__train_size": None, "data__validation": None, "stages": [2]}
    raw = tiny_config(tmp_path / "run", **own, model__chat_template=REFUSING)
    with pytest.raises(MokaError, match=r"odd\.jsonl:12"):
        train(raw)
    assert not (tmp_path / "run").exists()
    raw["data"]["on_bad_media"] = "skip"
    run = train(raw)
    assert "1 sample" in capsys.readouterr().out
    assert (run / "summary.json").exists()
