"""Balance strategies: hand-computed coefficients, what they do to a training, and what they refuse."""

import json
import math
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import moka
from moka.analysis.contribution import Contribution
from moka.balance import OGM, OPM, STRATEGIES, BalanceStrategy, Handles, LearningRates, StepContext, build_strategies
from moka.balance.strategy import ratios_of
from moka.cli.main import main
from moka.errors import MokaError
from moka.testing import mllms
from moka.training import config_from_dict, run_training

CASE = mllms.CASES["qwen2_5_omni"]


def adapted():
    config = moka.MokaConfig(r=4, alpha=8, dropout=0.0, task_type="CAUSAL_LM", init_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(mllms.backbone(CASE), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "moka_A" in name else 0.1)
    return model


def batch_of(layouts=("t I A q q a a", "I A q a a")):
    prompt = mllms.prompt(CASE, list(layouts))
    return {**prompt.everything, "labels": prompt.labels}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 1.5], [math.e, 1 / math.e]),
        ([1.0, 2.0, 3.0], [math.exp(1.5), 1.0, math.exp(-1.5)]),
        ([2.0, 2.0], [1.0, 1.0]),
    ],
)
def test_dominance_ratios_by_hand(scores, expected):
    found = ratios_of(torch.tensor(scores, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_coefficients_by_hand():
    assert OGM(alpha=0.3).coefficient(math.e) == pytest.approx(1 - math.tanh(0.3 * math.e), abs=1e-6)
    assert OGM(alpha=0.3, continuous=True).coefficient(2.0) == pytest.approx(1 - math.tanh(0.3), abs=1e-6)
    assert [OGM(alpha=0.8).coefficient(rho) for rho in (1.0, 0.2)] == [1.0, 1.0]
    assert OPM().probability(2.0) == pytest.approx(0.5 * (1 + 0.5 * math.tanh(1)), abs=1e-6)
    assert [OPM().probability(rho) for rho in (1.0, 0.1)] == [0.0, 0.0]
    assert OPM(q_base=0.9).probability(50.0) == 1.0


def test_the_ratio_of_a_batch_is_that_of_its_likelihoods():
    model, batch = adapted(), batch_of()
    likelihood = Contribution(model, batch)
    picture, sound = (float(likelihood.log_likelihood({name}).mean()) for name in ("visual", "audio"))
    found = StepContext(model, batch, 1).dominance_ratios()
    assert found["visual"] == pytest.approx(math.exp(picture - sound), rel=1e-5)
    assert found["visual"] * found["audio"] == pytest.approx(1.0, rel=1e-5)
    assert StepContext(model, batch_of(["I q a", "A q a"]), 1).dominance_ratios() is None  # no sample has both


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)]
)
def test_scaled_updates_equal_a_learning_rate_of_its_own(make):
    """Rows of A are independent in these optimizers, so a second run at k times the rate has the rows to compare with."""
    k, results = 0.3, []
    for scaled, rate in ((True, 1.0), (False, 1.0), (False, k)):
        model = adapted()
        handles = Handles(model)
        optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
        optimizer.param_groups[0]["lr"] *= rate
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if scaled:
                handles.multiply("visual", k)
            handles.before_step()
            optimizer.step()
            handles.after_step()
        results.append({name: handles.rows(name) for name in handles.modalities})
    ours, full, slow = results
    for name in ("text", "audio"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], full[name], strict=True))
    for a, b in zip(ours["visual"], slow["visual"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_prediction_modulation_hides_at_its_rate_and_never_everything():
    strategy = OPM(p_execute=0.8)
    strategy.rho = {"visual": 2.0, "audio": 0.5}
    step, generator = StepContext(adapted(), batch_of(), 1), torch.Generator().manual_seed(0)
    lost = torch.zeros(2)
    for _ in range(3000):
        hidden = strategy.prepare(step, generator)
        if hidden is not None:
            assert not (hidden & ~step.tokens["visual"]).any()  # no text, no sound
            lost += (hidden & step.tokens["visual"]).any(1)
    q = 0.8 * strategy.probability(2.0)
    assert lost / 3000 == pytest.approx(torch.full((2,), q), abs=0.03)
    strategy.rho = {"visual": 9.0, "audio": 9.0}
    strategy.q_base = 1.0
    for _ in range(20):
        assert strategy.prepare(step, generator) is None or False  # each would lose both, and so keeps both
    only_picture = StepContext(step.model, batch_of(["I q a"]), 1)
    assert all(strategy.prepare(only_picture, generator) is None for _ in range(20))


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def train(tiny_config, folder, balance, **changes):
    settings = {"stages": [2], "data__validation": None, "training__max_steps": 4, "training__logging_steps": 1}
    settings |= {"training__eval_strategy": "no", "training__save_strategy": "no", "training__learning_rate": 0.01}
    raw = tiny_config(folder, **{**settings, **changes})
    return run_training(config_from_dict({**raw, "balance": balance}))


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def test_off_and_neutral_strategies_change_nothing(tiny_config, tmp_path):
    plain = adapter(train(tiny_config, tmp_path / "plain", []))
    neutral = [{"name": "learning_rates", "factors": {"audio": 1.0}}, {"name": "opm", "q_base": 0.0}]
    for name, tensor in adapter(train(tiny_config, tmp_path / "neutral", neutral)).items():
        assert torch.equal(tensor, plain[name]), name


def test_modulation_slows_the_side_that_is_ahead(tiny_config, tmp_path):
    """What the strategy logs is what it does: the scaled modality's A moves less than without it."""
    plain = adapter(train(tiny_config, tmp_path / "plain", [], training__max_steps=8))
    folder = train(
        tiny_config,
        tmp_path / "ogm",
        [{"name": "ogm", "alpha": 0.8, "every": 1, "smoothing": 0.9}],
        training__max_steps=8,
    )
    k = [{name: r[f"balance/ogm/k/{name}"] for name in ("visual", "audio")} for r in losses(folder)]
    rho = [{name: r[f"balance/ogm/rho/{name}"] for name in ("visual", "audio")} for r in losses(folder)]
    assert all(math.isclose(r["visual"] * r["audio"], 1.0, rel_tol=1e-4) for r in rho)
    assert all(
        one[name] == pytest.approx(OGM(alpha=0.8).coefficient(r[name]))
        for one, r in zip(k, rho, strict=True)
        for name in r
    )
    ahead = {name: sum(one[name] for one in k) for name in ("visual", "audio")}
    slowed = min(ahead, key=ahead.get)
    initial = adapter(train(tiny_config, tmp_path / "start", [], training__max_steps=1, training__learning_rate=0.0))
    rows = {"text": 0, "visual": 1, "audio": 2}

    def moved(tensors, name):
        return sum(
            float((tensors[key][rows[name]] - initial[key][rows[name]]).norm()) for key in tensors if "moka_A" in key
        )

    modulated = adapter(folder)
    assert moved(modulated, slowed) < 0.9 * moved(plain, slowed)


def test_declared_forwards_are_what_is_run(tiny_config, tmp_path, monkeypatch, capsys):
    calls = []
    own = StepContext.dominance_ratios
    monkeypatch.setattr(StepContext, "dominance_ratios", lambda self: calls.append(self.number) or own(self))
    train(tiny_config, tmp_path / "run", [{"name": "ogm", "every": 2}])
    assert calls == [1, 2, 4]  # the first measurement is needed at once
    assert "balance: ogm: 1.00 additional forwards" in capsys.readouterr().out


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_config, tmp_path, write_yaml):
    balance = [{"name": "ogm", "alpha": 0.5, "every": 3, "smoothing": 0.5}, {"name": "opm", "every": 3}]
    changes = {"training__save_strategy": "steps", "training__save_steps": 2, "training__max_steps": 6}
    full = adapter(train(tiny_config, tmp_path / "run", balance, **changes))
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/stage2/checkpoint-{step}")
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/adapter")
    raw = tiny_config(
        tmp_path / "run",
        **{
            "stages": [2],
            "data__validation": None,
            "training__logging_steps": 1,
            "training__eval_strategy": "no",
            "training__learning_rate": 0.01,
            **changes,
        },
    )
    run_training(config_from_dict({**raw, "balance": balance}), resume=True)
    for name, tensor in adapter(tmp_path / "run").items():
        assert torch.equal(tensor, full[name]), name


@pytest.mark.slow
def test_two_processes_decide_as_one(tiny_config, tmp_path, launch, write_yaml):
    changes = {
        "stages": [2],
        "data__validation": None,
        "training__max_steps": 6,
        "training__logging_steps": 1,
        "training__eval_strategy": "no",
        "training__save_strategy": "no",
        "training__optim": "sgd",
        "training__learning_rate": 0.05,
        "adapter__dropout": 0.0,
        "balance": [{"name": "ogm", "alpha": 0.5, "every": 2}],
    }
    size = tiny_config("unused")["training"]["per_device_train_batch_size"]
    one = tiny_config(tmp_path / "one", **changes)
    two = tiny_config(tmp_path / "two", **{**changes, "training__per_device_train_batch_size": size // 2})
    for raw in (one, two):
        for spec in raw["model"]["modalities"].values():
            spec["encoder"]["dropout"] = 0.0  # each process draws its own
    run_training(config_from_dict(one))
    done = launch("torchrun", "train", write_yaml(tmp_path / "two.yaml", two))
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        for key in ("loss", "balance/ogm/rho/visual", "balance/ogm/k/visual"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("balance", "words"),
    [
        ([{"name": "oggm"}], ["balance[0].name", "'oggm'", "Did you mean 'ogm'"]),
        ([{"name": "ogm", "alhpa": 1}], ["balance[0].alhpa", "Did you mean 'alpha'"]),
        ([{"name": "ogm", "alpha": 0}], ["alpha", "above 0"]),
        ([{"name": "ogm", "alpha": "much"}], ["balance[0]", "much"]),
        ([{"name": "ogm", "apply": "grad"}], ["apply", "'grad'", "update, gradient"]),
        ([{"name": "ogm", "every": 0}], ["every", "0"]),
        ([{"name": "opm", "q_base": 2}], ["q_base", "0 to 1"]),
        ([{"name": "learning_rates", "factors": {"audio": -1}}], ["factors.audio", "-1"]),
        ([{"name": "learning_rates"}], ["balance[0]", "factors"]),
        ([{"name": "ogm"}, {"name": "ogm"}], ["named twice"]),
        (["ogm"], ["balance[0]", "mapping"]),
    ],
)
def test_wrong_settings_are_named(tiny_config, tmp_path, balance, words):
    with pytest.raises(MokaError) as caught:
        config_from_dict({**tiny_config(tmp_path / "run"), "balance": balance})
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_work_is_refused_before_the_first_step(tiny_config, tmp_path, write_yaml, capsys):
    with pytest.raises(MokaError, match=r"adapter.method moka"):
        train(tiny_config, tmp_path / "lora", [{"name": "ogm"}], adapter={"method": "lora"})
    with pytest.raises(MokaError, match=r"unknown modality 'video'.*text, visual, audio"):
        train(tiny_config, tmp_path / "named", [{"name": "learning_rates", "factors": {"video": 2.0}}])
    modalities = {"visual": tiny_config("unused")["model"]["modalities"]["visual"]}
    data = {"train": "embedded:visual-text", "train_size": 16}
    raw = tiny_config(
        tmp_path / "one", stages=[2], model__modalities=modalities, data=data, training__eval_strategy="no"
    )
    config = write_yaml(tmp_path / "one.yaml", {**raw, "balance": [{"name": "ogm"}]})
    assert main(["train", str(config)]) == 2
    assert "balance.ogm: it compares 2 or more modalities" in capsys.readouterr().err


def test_every_strategy_says_what_it_needs():
    for name, strategy in STRATEGIES.items():
        made = strategy(factors={"audio": 2.0}) if strategy is LearningRates else strategy()
        assert isinstance(made, BalanceStrategy)
        assert made.name == name
        assert made.needs(["visual", "audio"]).forwards_per_step >= 0
        assert "arXiv" in (strategy.__doc__ or "") or strategy is LearningRates
    assert build_strategies([]) == []
