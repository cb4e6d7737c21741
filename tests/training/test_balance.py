"""`balance:` in a run's YAML: off is the run without, two processes are one, a killed run resumes exactly, bad input is refused."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from moka.balance import STRATEGIES
from moka.errors import MokaError
from moka.training import config_from_dict

DYING = Path(__file__).with_name("dying.py")

ALL = [
    {"name": "opm", "every": 2, "warmup": 0.0, "q_base": 0.8},
    {"name": "ogm", "every": 2, "alpha": 0.8},
    {"name": "unimodal_losses", "weight": 0.5},
    {"name": "pareto_b"},
]


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("balance/")} for line in lines if "loss" in line]


@pytest.mark.parametrize("entry", [{"name": "single_modality", "modality": "visual"}, {"name": "mla", "p_alt": 1.0}])
def test_media_that_are_hidden_in_the_first_step_do_not_stop_the_run(train, tmp_path, entry):
    """Their projectors get no gradient then, which otherwise is a fault that the run is stopped for."""
    assert (train(tmp_path / "run", stages=[2], balance=[entry], training__max_steps=2) / "adapter").is_dir()


def test_an_empty_list_is_the_run_without(train, tmp_path, same_adapter, curve):
    plain = train(tmp_path / "plain", stages=[2])
    empty = train(tmp_path / "empty", stages=[2], balance=[])
    same_adapter(empty, plain)
    assert curve(empty) == curve(plain)
    assert not list(empty.rglob("balance.pt"))


def test_a_run_logs_what_its_strategies_do_and_resumes_exactly(train, tmp_path, killed, same_adapter, curve, capsys):
    full = train(tmp_path / "full", stages=[2], balance=ALL)
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("balance: ")] == [
        entry["name"] for entry in ALL
    ]
    assert {"balance/ogm/visual", "balance/opm/audio", "balance/score/visual"} <= figures(full)[0].keys()
    assert (full / "checkpoints/stage2/checkpoint-4/balance.pt").is_file()
    files = json.loads((full / "checkpoints/stage2/checkpoint-4/checkpoint.json").read_text())["files"]
    assert "balance.pt" in files
    folder = killed(full, tmp_path / "again", 4)
    train(folder, stages=[2], balance=ALL, resume=True)
    same_adapter(folder, full)
    assert curve(folder) == curve(full)
    assert figures(folder) == figures(full)


def test_observing_modalities_beside_a_strategy_that_does_changes_nothing(train, tmp_path, same_adapter):
    runs = [
        train(tmp_path / str(every), stages=[2], balance=[{"name": "pareto_b"}], training__observe_modalities=every)
        for every in (0, 1)
    ]
    same_adapter(*runs)
    assert "update_share/visual" in (runs[1] / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance": [{"name": "ogn"}]}, ["balance", "ogn", "Did you mean 'ogm'"]),
        ({"balance": [{"name": "ogm", "alfa": 1.0}]}, ["balance", "alfa", "Did you mean 'alpha'"]),
        ({"balance": "ogm"}, ["balance", "list"]),
        ({"balance": [{"name": "ogm"}], "stages": [1]}, ["balance: ogm", "stages", "[2]"]),
        ({"balance": [{"name": "ogm"}], "adapter__method": "lora"}, ["balance: ogm", "lora", "moka"]),
        (
            {"balance": [{"name": "greedy"}], "adapter__interaction": "none"},
            ["balance: greedy", "adapter.interaction", "none", "question"],
        ),
        ({"balance": [{"name": "umt"}]}, ["balance: umt", "teachers", "single_modality"]),
        ({"balance": [{"name": "single_modality"}]}, ["balance: single_modality", "modality", "visual"]),
        ({"balance": [{"name": "pareto_b"}], "adapter__share_b": False}, ["balance: pareto_b", "share_b"]),
        (
            {"balance": [{"name": "opm"}], "training__packing": True, "model__max_length": 96},
            ["balance: opm", "training.packing"],
        ),
        (
            {"balance": [{"name": "lr_scale", "scale": {"smell": 2.0}}]},
            ["balance: lr_scale", "'smell'", "visual", "audio"],
        ),
    ],
)
def test_bad_settings_are_refused_when_the_file_is_read(tiny_config, tmp_path, changes, words):
    with pytest.raises(MokaError) as error:
        config_from_dict(tiny_config(tmp_path / "run", **changes))
    for word in words:
        assert word in str(error.value)


def test_a_run_of_one_modality_is_refused(tiny_config, tmp_path):
    raw = tiny_config(tmp_path / "run", balance=[{"name": "opm"}])
    del raw["model"]["modalities"]["audio"]
    with pytest.raises(MokaError, match=r"balance: opm: .*visual"):
        config_from_dict(raw)


@pytest.mark.parametrize(
    "balance",
    [["ogm"], ["opm"], ["mmpareto"], ["pmr", "greedy", "norm_balance", "umt"]],
    ids=lambda names: "+".join(names),
)
@pytest.mark.slow
def test_two_processes_train_as_one(train, train_two, tmp_path, as_one, halves, losses, same_weights, balance):
    settings = {
        "ogm": {"name": "ogm", "every": 2, "alpha": 0.8},
        "opm": {"name": "opm", "every": 2, "warmup": 0.0, "q_base": 0.8},
        "mmpareto": {"name": "mmpareto"},
        "pmr": {"name": "pmr", "every": 3},
        "greedy": {"name": "greedy", "warmup": 0.0, "window": 2},
        "norm_balance": {"name": "norm_balance", "every": 5},
        "umt": {"name": "umt", "teachers": {"audio": str(tmp_path / "teacher")}},
    }
    if "umt" in balance:
        only = [{"name": "single_modality", "modality": "audio"}]
        train(tmp_path / "teacher", **as_one, stages=[2], balance=only, data__validation=None)
    changes = {
        **as_one,
        "stages": [2],
        "balance": [settings[name] for name in balance],
        "training__eval_strategy": "no",
    }
    changes["training__adam_epsilon"] = 1e-3  # gradients that are nothing but rounding do not count
    one = train(tmp_path / "one", **changes)
    train_two(tmp_path / "two", **{**changes, "training__per_device_train_batch_size": 2})
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    for ours, theirs in zip(figures(tmp_path / "two"), figures(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_rates_and_values_by_modality_under_zero_2_are_those_without(
    train, train_two, tmp_path, as_one, write_zero, losses
):
    changes = {
        **as_one,
        "stages": [2],
        "training__eval_strategy": "no",
        "training__adam_epsilon": 1e-3,
        "balance": [
            {"name": "lr_scale", "scale": {"visual": 0.3, "audio": 2.0}},
            {"name": "norm_balance", "every": 5},
            {"name": "greedy", "warmup": 0.0, "window": 2},
        ],
    }
    one = train(tmp_path / "one", **changes)
    zero = {"training__deepspeed": str(write_zero(tmp_path, "zero2")), "training__per_device_train_batch_size": 2}
    train_two(tmp_path / "two", "torchrun", **{**changes, **zero})
    assert json.loads((tmp_path / "two/summary.json").read_text())["engines"]["2"]["zero_stage"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


# Every strategy that keeps something between steps, with those beside it that change other things.
STATEFUL = {
    "losses and updates": [
        {"name": "opm", "every": 2, "warmup": 0.0, "q_base": 0.8},
        {"name": "ogm", "every": 2, "alpha": 0.8, "noise": True},
        {"name": "unimodal_losses", "form": "blend", "every": 1, "batches": 1, "events": [0.2, 0.4, 0.7]},
        {"name": "relearning", "every": 2, "batches": 1, "events": [0.3, 0.75]},
        {"name": "inforeg", "every": 2, "window": 3, "beta": 30.0, "threshold": -10.0},
        {"name": "pmr", "every": 3},
        {"name": "greedy", "warmup": 0.0, "window": 2},
    ],
    "steps of one modality": [
        {"name": "mla"},
        {"name": "norm_balance", "every": 3},
        {"name": "ogm", "form": "exp", "every": 2},
    ],
    "samples": [
        {"name": "valuation", "every": 2, "warmup": 0.0, "value": "log_likelihood"},
        {"name": "ogm", "form": "speed", "every": 2},
    ],
}


def test_every_strategy_with_a_state_is_killed_below():
    settings = {"lr_scale": {"scale": {"visual": 2.0}}, "umt": {"teachers": {"visual": "run"}}}
    settings["single_modality"] = {"modality": "visual"}
    with_state = {name for name, kind in STRATEGIES.items() if kind(**settings.get(name, {})).state_dict()}
    assert {entry["name"] for group in STATEFUL.values() for entry in group} == with_state


def same_state(one, other):
    """Equal values, tensors bit for bit, in nested containers."""
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in other)
    if isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


@pytest.mark.slow
@pytest.mark.parametrize("group", STATEFUL)
def test_a_process_killed_between_checkpoints_resumes_exactly(
    train, tiny_config, tmp_path, launch, write_yaml, same_adapter, curve, group
):
    """Killed by SIGKILL in step 6 of 8, after the checkpoint at step 4; `moka train --resume` in a process of its own."""
    changes = {
        "stages": [2],
        "balance": STATEFUL[group],
        "data__train_size": 16,  # epochs of four steps, the last of which began after the checkpoint
        "training__max_steps": 8,
        "training__save_steps": 4,
    }
    full = train(tmp_path / "full", **changes)
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **changes))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = launch("one", "training_step,2,5,0,self,SIGKILL", "train", config, program=[DYING], **threads)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    checkpoints = tmp_path / "run/checkpoints/stage2"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    resumed = launch("one", "train", config, "--resume", **threads)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "checkpoint-4" in resumed.stdout
    same_adapter(tmp_path / "run", full)
    assert curve(tmp_path / "run") == curve(full)
    assert figures(tmp_path / "run") == figures(full)
    states = [
        torch.load(folder / "checkpoints/stage2/checkpoint-8/balance.pt", weights_only=True)
        for folder in (tmp_path / "run", full)
    ]
    assert same_state(*states)


def test_the_configuration_reads_back_as_itself(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x", balance=ALL))
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))).to_dict() == config.to_dict()
