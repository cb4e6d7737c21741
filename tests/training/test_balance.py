"""`balance:` in a run's YAML: off is the run without, two processes are one, a killed run resumes exactly, bad input is refused."""

import json

import pytest
import yaml

from moka.errors import MokaError
from moka.training import config_from_dict

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


@pytest.mark.parametrize("balance", [["ogm"], ["opm"], ["mmpareto"]], ids=lambda names: "+".join(names))
@pytest.mark.slow
def test_two_processes_train_as_one(train, train_two, tmp_path, as_one, halves, losses, same_weights, balance):
    settings = {
        "ogm": {"name": "ogm", "every": 2, "alpha": 0.8},
        "opm": {"name": "opm", "every": 2, "warmup": 0.0, "q_base": 0.8},
        "mmpareto": {"name": "mmpareto"},
    }
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
def test_rates_by_modality_under_zero_2_are_those_without(train, train_two, tmp_path, as_one, write_zero, losses):
    changes = {
        **as_one,
        "stages": [2],
        "training__eval_strategy": "no",
        "training__adam_epsilon": 1e-3,
        "balance": [{"name": "lr_scale", "scale": {"visual": 0.3, "audio": 2.0}}],
    }
    one = train(tmp_path / "one", **changes)
    zero = {"training__deepspeed": str(write_zero(tmp_path, "zero2")), "training__per_device_train_batch_size": 2}
    train_two(tmp_path / "two", "torchrun", **{**changes, **zero})
    assert json.loads((tmp_path / "two/summary.json").read_text())["engines"]["2"]["zero_stage"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


def test_the_configuration_reads_back_as_itself(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x", balance=ALL))
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))).to_dict() == config.to_dict()
