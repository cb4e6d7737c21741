"""The arguments of a stage: settings that fit the machine, a global batch divided exactly, everything tried before training."""

import importlib.util
import itertools
import os
import re
import warnings

import pytest
import torch

from moka.distributed import default_device
from moka.errors import MokaError
from moka.training import arguments
from moka.training.arguments import divide, loader_settings, training_arguments


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the settings look."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "usable_cores", lambda: 16)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", None])
def test_the_accelerator_that_there_is_is_used(tmp_path, monkeypatch, kind):
    """torch and accelerate name it; only a machine without any is told to use the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if kind else None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert default_device() == torch.device(f"{kind}:1" if kind else "cpu")
    assert training_arguments({}, tmp_path).use_cpu is (kind is None)
    assert training_arguments({"use_cpu": True}, tmp_path).use_cpu


def test_global_batch_that_cannot_be_had_is_reported(tmp_path):
    with pytest.raises(MokaError, match=r"alignment.global_batch_size: 10 cannot be divided over 1 processes.*: 4"):
        training_arguments({"global_batch_size": 10, "per_device_train_batch_size": 4}, tmp_path / "x", "alignment")
    section = {"global_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(MokaError, match="takes 2 accumulation steps, and gradient_accumulation_steps is 3"):
        training_arguments(section, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_global_batch_is_divided_exactly_or_refused_with_what_would_do():
    for total, largest, processes in itertools.product(range(1, 25), range(1, 10), range(1, 10)):
        try:
            size, steps = divide(total, largest, processes)
        except MokaError as error:
            assert total % processes or (total // processes > largest and (total // processes) % largest)
            remedies = {"per_device_train_batch_size to": 1, "launch": 2, "set global_batch_size to": 0}
            for words, position in remedies.items():
                found = re.search(rf"{words} ([\d, or]+)", str(error), re.IGNORECASE)
                for number in map(int, re.findall(r"\d+", found[1])) if found else ():
                    changed = [total, largest, processes]
                    changed[position] = number
                    divide(*changed)
        else:
            assert size * steps * processes == total
            assert 1 <= size <= largest


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"optim": "adamw_torchy"}, ["adamw_torchy"]),
        ({"optim": "lomo"}, ["optim", "lomo"]),
        ({"adam_beta1": 2}, ["adam_beta1", "2"]),
        ({"adam_epsilon": -1.0}, ["adam_epsilon", "-1"]),
        ({"lr_scheduler_type": "cosin"}, ["cosin"]),
        ({"lr_scheduler_kwargs": {"foo": 1}}, ["lr_scheduler_kwargs", "foo"]),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, ["strateg"]),
        ({"save_strategy": "best"}, ["save_strategy", "metric_for_best_model"]),
        ({"data_seed": 10**20}, ["data_seed"]),
        ({"log_level": "foo"}, ["log_level", "foo"]),
        ({"torch_compile_backend": "nope"}, ["torch_compile_backend", "NOPE"]),
        ({"neftune_noise_alpha": -5.0}, ["neftune_noise_alpha", "-5"]),
        ({"use_liger_kernel": True}, ["use_liger_kernel"]),
        ({"bf16": True, "use_cpu": True}, ["training.bf16"]),
        ({"fp16": True, "use_cpu": True}, ["training.fp16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_before_training(tmp_path, section, words):
    if "use_liger_kernel" in section and importlib.util.find_spec("liger_kernel"):
        pytest.skip("it is installed")
    with pytest.raises(MokaError) as caught:
        training_arguments(section, tmp_path / "x")
    assert all(word in str(caught.value) for word in ["training", *words])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("key", "value"), [("training__adam_beta1", 2), ("adapter__r", 10**9)])
def test_settings_of_stage_2_are_tried_before_stage_1_is_trained(train, tmp_path, key, value):
    with pytest.raises(MokaError, match=key.rpartition("__")[2]):
        train(tmp_path / "run", **{key: value})
    assert not (tmp_path / "run").exists()


def test_settings_of_a_machine_with_a_gpu(gpu):
    assert loader_settings({}) == {
        "dataloader_num_workers": 4,
        "dataloader_persistent_workers": True,
        "accelerator_config": {"non_blocking": True},
    }
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    # The cores of a process bound their number; one is the process's own.
    for cores, workers in ((3, 2), (2, 1), (1, 1)):
        arguments.usable_cores = lambda cores=cores: cores
        assert loader_settings({})["dataloader_num_workers"] == workers


def test_what_a_configuration_says_stays(gpu):
    given = {"dataloader_num_workers": 0, "accelerator_config": {"split_batches": True}}
    assert loader_settings(given) == {
        "dataloader_num_workers": 0,
        "accelerator_config": {"split_batches": True, "non_blocking": True},
    }
    given = {"dataloader_num_workers": 2, "dataloader_persistent_workers": False, "dataloader_pin_memory": False}
    assert loader_settings(given) == {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": False,
    }
    given = {"accelerator_config": {"non_blocking": False}}
    assert loader_settings(given)["accelerator_config"] == {"non_blocking": False}
    assert "accelerator_config" not in loader_settings({"accelerator_config": "accelerator.json"})


@pytest.mark.parametrize("section", [{}, {"dataloader_num_workers": 2}, {"dataloader_pin_memory": True}])
def test_on_a_cpu_nothing_is_pinned_and_no_one_warned(tmp_path, section, caplog):
    if torch.cuda.is_available():
        section = {**section, "use_cpu": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = training_arguments(section, tmp_path)
    assert arguments.dataloader_num_workers == section.get("dataloader_num_workers", 0)
    assert arguments.dataloader_persistent_workers == ("dataloader_num_workers" in section)
    assert not arguments.dataloader_pin_memory
    assert not arguments.accelerator_config.non_blocking
    assert not caplog.records
