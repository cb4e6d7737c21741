"""The protocol: nothing without strategies, rates by modality, composition, refusals, exact resume."""

import copy
import shutil

import pytest
import torch
from transformers import Trainer

from moka.balance import (
    CML,
    OGM,
    OPM,
    PMR,
    STRATEGIES,
    UMT,
    BalanceCallback,
    BalancedTrainer,
    BalanceStrategy,
    Greedy,
    Handles,
    LearningRates,
    MMPareto,
    Needs,
    NormBalance,
    ParetoB,
    Relearning,
    UnimodalLosses,
    build_strategies,
)
from moka.balance.balance import check_engine
from moka.balance.strategy import Context
from moka.errors import MokaError


class PlainTrainer(Trainer):
    """transformers' own, for batches that name their samples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("sample_ids", None)
        return super().compute_loss(model, inputs, *args, **kwargs)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_without_strategies_a_run_is_bit_for_bit_that_of_the_plain_trainer(kit, tmp_path, optim):
    plain = kit.make_trainer(tmp_path / "plain", None, trainer_class=PlainTrainer, optim=optim, max_grad_norm=1.0)
    ours = kit.make_trainer(tmp_path / "ours", optim=optim, max_grad_norm=1.0)
    plain.train(), ours.train()
    same(kit.weights(ours.model), kit.weights(plain.model))
    assert [r.get("loss") for r in ours.state.log_history] == [r.get("loss") for r in plain.state.log_history]


def grouped(optimizer_class, model, factors, rate, **settings):
    """The reference: a parameter and a group for each modality, from rows of the stacked A, with lr k * rate."""
    handles, parameters, groups = Handles(model), {}, []
    for index, modality in enumerate(handles.modalities):
        for name, row in handles.A(modality).items():
            parameters[name, index] = p = torch.nn.Parameter(row.clone())
            groups.append({"params": [p], "lr": rate * factors.get(modality, 1.0)})
    return parameters, optimizer_class(groups, lr=rate, **settings)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.Adam, {}),
    ],
    ids=["SGD", "AdamW", "Adam"],
)
def test_the_row_update_equals_a_parameter_group_for_each_modality(kit, optimizer_class, settings):
    model, factors, rate = kit.make_model(), {"visual": 0.3, "audio": 2.0}, 1e-2
    parameters, reference = grouped(optimizer_class, model, factors, rate, **settings)
    handles = Handles(model)
    stacked = [handles.layers[name].moka_A["default"].weight for name in handles.layers]
    optimizer = optimizer_class(stacked, lr=rate, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for name, layer in handles.layers.items():
            weight = layer.moka_A["default"].weight
            weight.grad = torch.randn(weight.shape, generator=generator)
            for index in range(len(handles.modalities)):
                parameters[name, index].grad = weight.grad[index].clone()
        for modality, factor in factors.items():
            handles.lr_scale[modality] = factor
        handles.before_step()
        optimizer.step()
        handles.after_step()
        reference.step()
    for (name, index), expected in parameters.items():
        found = handles.layers[name].moka_A["default"].weight[index]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_row_update_equals_a_group_for_8_bit_adam(kit):
    """Rows of whole blocks of 256 numbers, as the moments are quantised by block; and a row that is set loses its moments."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, rate, factors = kit.make_model(r=128), 1e-2, {"visual": 0.3, "audio": 2.0}
    parameters, reference = grouped(bitsandbytes.optim.Adam8bit, model, factors, rate)
    handles = Handles(model)
    stacked = {name: layer.moka_A["default"].weight for name, layer in handles.layers.items()}
    handles.optimizer = bitsandbytes.optim.Adam8bit(list(stacked.values()), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for name, weight in stacked.items():
            weight.grad = torch.randn(weight.shape, generator=generator)
            for index in range(len(handles.modalities)):
                parameters[name, index].grad = weight.grad[index].clone()
        handles.lr_scale.update(factors)
        handles.before_step()
        handles.optimizer.step()
        handles.after_step()
        reference.step()
    for (name, index), expected in parameters.items():
        torch.testing.assert_close(stacked[name][index], expected, atol=1e-6, rtol=1e-6)
    handles.set("audio", handles.copy("audio"))
    row = handles.modalities.index("audio")
    for weight in stacked.values():
        state = handles.optimizer.state[weight]
        assert state["state1"].dtype == torch.uint8
        for number in (1, 2):
            codes = state[f"state{number}"].view(weight.shape)
            values = state[f"qmap{number}"][codes.int()]
            assert not values[row].any()
            assert values[0].any()


def test_adam_is_blind_to_a_factor_of_the_gradient_and_not_to_one_of_the_update():
    """Why updates are modulated: section 5 of Kingma and Ba, arXiv 1412.6980."""
    moved = {}
    for how in ("none", "grad", "update"):
        x, generator = torch.zeros(1, requires_grad=True), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam([x], lr=1e-3)
        for _ in range(500):
            x.grad = torch.randn(1, generator=generator) + 0.5
            if how == "grad":
                x.grad *= 0.2
            before = x.detach().clone()
            optimizer.step()
            if how == "update":
                x.data = before + 0.2 * (x.data - before)
        moved[how] = x.item()
    assert moved["grad"] == pytest.approx(moved["none"], rel=1e-3)
    assert moved["update"] == pytest.approx(0.2 * moved["none"], rel=1e-3)


def test_rates_by_modality_reach_only_its_rows(kit, tmp_path):
    plain = kit.make_trainer(tmp_path / "plain", max_steps=1)
    start = kit.rows(plain.model)
    slow = kit.make_trainer(tmp_path / "slow", [LearningRates({"visual": 0.5})], max_steps=1)
    plain.train(), slow.train()
    row = list(slow.balance.handles.modalities).index("visual")
    ours, theirs = kit.rows(slow.model), kit.rows(plain.model)
    for name, before in start.items():
        for index in range(len(before)):
            moved = theirs[name][index] - before[index]
            expected = before[index] + (0.5 if index == row else 1.0) * moved
            torch.testing.assert_close(ours[name][index], expected, atol=1e-7, rtol=1e-6)
    for name, weight in kit.weights(plain.model).items():
        if ".moka_A." not in name:
            assert torch.equal(weight, kit.weights(slow.model)[name]), name


def test_without_a_shared_b_its_rows_are_scaled_too(kit, tmp_path):
    runs = {}
    for scale in (None, {"visual": 0.5}):
        model = kit.make_model(share_b=False)
        start = kit.rows(model, "moka_B")
        balance = [LearningRates(scale)] if scale else []
        trainer = kit.make_trainer(tmp_path / str(scale), balance, model, max_steps=1)
        trainer.train()
        runs[str(scale)] = start, kit.rows(model, "moka_B")
    (start, plain), (_, slow) = runs.values()
    row = ["text", "visual", "audio"].index("visual")
    for name in start:
        expected = start[name].clone()
        expected += (plain[name] - start[name]) * torch.tensor([0.5 if i == row else 1.0 for i in range(3)])[
            :, None, None
        ]
        torch.testing.assert_close(slow[name], expected, atol=1e-6, rtol=1e-5)


def test_a_skipped_step_changes_nothing(kit):
    handles = Handles(kit.make_model())
    before = handles.copy("visual")
    handles.lr_scale["visual"] = 0.5
    handles.pull("visual", {name: torch.zeros_like(row) for name, row in before.items()}, 0.5)
    handles.before_step()
    handles.after_step(skipped=True)
    for name, row in handles.A("visual").items():
        assert torch.equal(row, before[name])
    assert handles.lr_scale["visual"] == 1.0


def test_coefficients_are_clipped_and_unknown_modalities_are_named(kit):
    handles = Handles(kit.make_model())
    handles.lr_scale["visual"] = 100
    handles.lr_scale["audio"] = 0
    assert dict(handles.lr_scale) == {"visual": 3.0, "audio": 0.05}
    with pytest.raises(MokaError, match="'smell'"):
        handles.lr_scale["smell"] = 1


def test_rows_that_are_set_lose_their_moments_and_others_keep_them(kit):
    model = kit.make_model()
    handles = Handles(model)
    stacked = [layer.moka_A["default"].weight for layer in handles.layers.values()]
    handles.optimizer = torch.optim.AdamW(stacked)
    for weight in stacked:
        weight.grad = torch.ones_like(weight)
    handles.optimizer.step()
    row = handles.modalities.index("audio")
    handles.set("audio", {name: torch.zeros_like(a) for name, a in handles.A("audio").items()})
    for weight in stacked:
        state = handles.optimizer.state[weight]
        assert not weight[row].any()
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert not moment[row].any()
            assert moment[[i for i in range(len(moment)) if i != row]].all()


def test_an_added_loss_of_all_modalities_is_the_trainers_own(kit, tmp_path):
    """So added losses have the trainer's unit, also under accumulation with batches of other numbers of tokens."""
    seen = []

    class Twice(BalanceStrategy):
        name = "twice"

        def needs(self):
            return Needs(losses=1)

        def loss(self, loss, ctx):
            again = ctx.nll(ctx.media, torch.ones(len(ctx.batch["labels"])))
            seen.append((loss.item(), again.item()))
            return loss

    model = kit.make_model()
    data = kit.make_data(model)
    data[0]["labels"] = [-100 if k + 1 < len(data[0]["labels"]) else label for k, label in enumerate(data[0]["labels"])]
    kit.make_trainer(tmp_path, [Twice()], model, data, max_steps=2, gradient_accumulation_steps=2).train()
    assert len(seen) == 4
    for loss, again in seen:
        assert again == pytest.approx(loss, rel=1e-5)


def test_what_is_drawn_depends_on_the_sample_and_not_on_the_process(kit):
    ctx = Context(kit.make_model(), seed=3)
    assert ctx.draw("opm", 4, "s1").random() == ctx.draw("opm", 4, "s1").random()
    assert ctx.draw("opm", 4, "s1").random() != ctx.draw("opm", 4, "s2").random()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"name": "ogn"}], ["ogn", "Did you mean 'ogm'"]),
        ([{"name": "ogm", "alhpa": 1}], ["alhpa", "Did you mean 'alpha'"]),
        ([{"name": "ogm", "alpha": "much"}], ["ogm", "alpha", "much", "float"]),
        ([{"name": "ogm", "alpha": -1}], ["ogm", "alpha", "-1"]),
        ([{"name": "ogm", "apply": "updates"}], ["apply", "grad", "Did you mean 'update'"]),
        ([{"name": "opm", "q_base": 1.5}], ["opm", "q_base", "1.5"]),
        ([{"name": "relearning", "events": [0.5, 1.0]}], ["relearning", "events", "1.0"]),
        ([{"name": "mla"}, {"name": "opm"}], ["mla", "opm", "visible tokens"]),
        ([{"name": "lr_scale"}], ["lr_scale", "scale"]),
        ([{"name": "lr_scale", "scale": {"visual": 9.0}}], ["scale.visual", "9"]),
        ([{"alpha": 1}], ["entry 1", "name"]),
        (["ogm"], ["entry 1", "ogm"]),
        ([{"name": "ogm"}, {"name": "lr_scale", "scale": {"visual": 2.0}}], ["lr_scale", "ogm", "updates of A"]),
        ([{"name": "opm"}, {"name": "opm"}], ["opm", "visible tokens"]),
        ([{"name": "mmpareto"}, {"name": "unimodal_losses"}], ["mmpareto", "unimodal_losses", "unimodal losses"]),
        ([{"name": "pareto_b"}, {"name": "ogm", "share_B": True}], ["pareto_b", "ogm", "gradients of B"]),
    ],
)
def test_bad_settings_are_named_with_what_is_allowed(entries, words):
    with pytest.raises(MokaError) as error:
        build_strategies(entries, "run.yaml: balance")
    for word in ("balance", *words):
        assert word in str(error.value)


def test_strategies_that_change_different_things_go_together(kit, tmp_path):
    trainer = kit.make_trainer(tmp_path, [OPM(q_base=0.9, warmup=0.0), OGM(every=2), UnimodalLosses(), ParetoB()])
    trainer.train()
    logged = {key for record in trainer.state.log_history for key in record}
    for modality in ("visual", "audio"):
        keys = {f"balance/score/{modality}", f"balance/ogm/{modality}", f"balance/opm/{modality}"}
        assert keys | {f"balance/unimodal_losses/{modality}", f"balance/pareto_b/weight/{modality}"} <= logged


@pytest.mark.parametrize("strategy", [OGM(), OPM(), UnimodalLosses(), MMPareto()], ids=lambda s: s.name)
def test_a_model_with_one_modality_is_refused_with_the_way_out(kit, tmp_path, strategy):
    model = kit.make_model(media=("visual",))
    with pytest.raises(
        MokaError, match=rf"balance: {strategy.name}: compares 2 modalities.*1 beside text \(visual\)"
    ) as error:
        kit.make_trainer(tmp_path, [strategy], model, [])
    assert ("ablate: adapter" if strategy.name == "ogm" else "lr_scale") in str(error.value)


def test_with_one_modality_text_is_compared_by_its_adapter(kit, tmp_path):
    model = kit.make_model(media=("visual",))
    data = kit.make_data(model, kinds=(("visual",),))
    trainer = kit.make_trainer(tmp_path, [OGM(ablate="adapter", every=1)], model, data, max_steps=2)
    trainer.train()
    coefficients = trainer.balance.strategies[0].coefficients
    assert set(coefficients) == {"text", "visual"}
    assert min(coefficients.values()) < 1 == max(coefficients.values())


@pytest.mark.parametrize(
    ("strategy", "zero", "fsdp", "words"),
    [
        (OGM(), 3, False, "ZeRO-3.*zero2"),
        (OGM(), None, True, "FSDP.*ddp"),
        (OGM(apply="grad"), 2, False, "DeepSpeed.*apply: update"),
        (Relearning(), 2, False, "relearning.*moments.*ddp"),
        (MMPareto(), 2, False, "mmpareto.*DeepSpeed.*ddp"),
        (UMT({"visual": "run"}), 3, False, "umt.*ZeRO-3.*zero2"),
        (NormBalance(), None, True, "norm_balance.*FSDP.*ddp"),
    ],
)
def test_engines_that_cannot_give_what_is_needed_are_refused(strategy, zero, fsdp, words):
    with pytest.raises(MokaError, match=words):
        check_engine([strategy], zero, fsdp)
    check_engine([OPM(), UnimodalLosses(), CML(), PMR()], 3, False)
    check_engine([OGM(), LearningRates({"visual": 2.0}), Greedy(), NormBalance()], 2, False)


def test_a_b_for_each_modality_is_refused_where_the_shared_one_is_split(kit, tmp_path):
    with pytest.raises(MokaError, match=r"pareto_b.*share_b"):
        kit.make_trainer(tmp_path, [ParetoB()], kit.make_model(share_b=False))


def test_validation_data_that_are_not_there_are_refused(kit, tmp_path):
    with pytest.raises(MokaError, match=r"relearning.*data.validation"):
        kit.make_trainer(tmp_path, [Relearning()], eval_dataset=None)


def test_a_callback_refuses_what_it_cannot_carry():
    for strategy, words in ((OGM(), "ogm"), (UnimodalLosses(), "unimodal_losses"), (CML(), "cml")):
        with pytest.raises(MokaError, match=f"{words}.*BalancedTrainerMixin"):
            BalanceCallback(strategy)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_callback_does_in_a_plain_trainer_what_the_mixin_does(kit, tmp_path, clip, capsys):
    """Also where the gradients that the callback sees are clipped already."""
    strategies = lambda: [LearningRates({"visual": 0.5}), ParetoB()]  # noqa: E731
    ours = kit.make_trainer(tmp_path / "ours", strategies(), optim="sgd", max_grad_norm=clip)
    callback = BalanceCallback(*strategies())
    theirs = kit.make_trainer(
        *(tmp_path / "theirs", None), trainer_class=PlainTrainer, callbacks=[callback], optim="sgd", max_grad_norm=clip
    )
    ours.train()
    capsys.readouterr()
    theirs.train()
    if not clip:  # else the mixture has another norm before clipping
        for name, weight in kit.weights(ours.model).items():
            torch.testing.assert_close(kit.weights(theirs.model)[name], weight, atol=1e-6, rtol=1e-5)
    assert "balance/pareto_b/weight/text" in capsys.readouterr().out


def test_a_callback_resumes_from_its_file(kit, tmp_path):
    make = lambda: BalanceCallback(LearningRates({"visual": 0.5}))  # noqa: E731
    settings = {"trainer_class": PlainTrainer, "save_strategy": "steps", "save_steps": 4}
    full = kit.make_trainer(tmp_path / "full", None, callbacks=[make()], **settings)
    full.train()
    again = kit.make_trainer(tmp_path / "full", None, callbacks=[make()], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "full/checkpoint-4"))
    same(kit.weights(again.model), kit.weights(full.model))


# Every strategy, with settings under which it acts within eight steps.
ACTING = {
    "lr_scale": {"scale": {"visual": 0.5}},
    "ogm": {"every": 3, "noise": True, "alpha": 0.8},
    "opm": {"every": 3, "warmup": 0.0, "q_base": 0.8},
    "unimodal_losses": {},
    "cml": {"lam": 1.0},
    "mmpareto": {},
    "pareto_b": {},
    "relearning": {"every": 2, "batches": 2, "events": [0.5, 0.7]},
    "inforeg": {"every": 2, "window": 3, "beta": 30.0, "threshold": -10.0},
    "mla": {},
    "valuation": {"every": 2, "warmup": 0.0, "value": "log_likelihood"},
    "pmr": {"every": 1, "momentum": 0.5},
    "umt": {},  # with the teachers of the fixture `build`
    "single_modality": {"modality": "visual"},
    "greedy": {"warmup": 0.0, "window": 2},
    "norm_balance": {"every": 3},
}
CASES = {
    **{name: {"name": name, **settings} for name, settings in ACTING.items()},
    **{f"ogm {form}": {"name": "ogm", "every": 2, "form": form, "alpha": 1.0} for form in ("exp", "speed")},
    "opm partial": {"name": "opm", "mode": "partial", "epsilon": 0.7, "every": 2, "warmup": 0.0},
    **{
        f"unimodal_losses {form}": {"name": "unimodal_losses", "form": form}
        for form in ("margin", "distill", "alignment", "residual")
    },
    "unimodal_losses blend": {
        **{"name": "unimodal_losses", "form": "blend", "events": [0.25, 0.45, 0.7], "batches": 2, "every": 1}
    },
}


@pytest.fixture(scope="session")
def build(kit, tmp_path_factory):
    """``build(case)``: its strategies, a list of one; of UMT with teachers that were saved as adapters."""
    folders = {}
    for k, name in enumerate(("visual", "audio"), start=1):
        teacher = kit.make_model()
        for key, weight in teacher.named_parameters():
            if "moka_" in key:
                weight.data += 0.1 * k
        folders[name] = str(tmp_path_factory.mktemp(name) / "adapter")
        teacher.save_pretrained(folders[name])

    def make(case):
        own = {"teachers": folders} if case == "umt" else {}
        return build_strategies([{**CASES[case], **own}])

    return make


def test_every_strategy_is_among_the_cases():
    assert {case["name"] for case in CASES.values()} == set(STRATEGIES)


@pytest.mark.parametrize(("name", "step"), [*((name, 4) for name in CASES), ("valuation", 6)])
def test_a_resumed_run_is_the_uninterrupted_one(kit, build, tmp_path, name, step):
    """At the end of an epoch, and within one."""

    def trainer(folder):
        data = kit.make_data(kit.make_model(), 16, (("visual", "audio"), ("visual",), ("audio",), ("visual", "audio")))
        balance = build(name)
        settings = {"save_strategy": "steps", "save_steps": step, "gradient_accumulation_steps": 2}
        return kit.make_trainer(folder, balance, data=data, per_device_train_batch_size=2, **settings)

    full = trainer(tmp_path / "full")
    full.train()
    shutil.copytree(tmp_path / f"full/checkpoint-{step}", tmp_path / f"again/checkpoint-{step}")
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / f"again/checkpoint-{step}"))
    same(kit.weights(again.model), kit.weights(full.model))
    ours, theirs = ([r for r in t.state.log_history if r.get("step", 0) > step and "loss" in r] for t in (again, full))
    keys = [key for key in theirs[0] if key not in ("epoch",)]
    assert [{k: r[k] for k in keys if k in r} for r in ours] == [{k: r[k] for k in keys if k in r} for r in theirs]
    plain = kit.make_trainer(
        tmp_path / "plain", data=full.train_dataset, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    plain.train()
    assert any(not torch.equal(w, kit.weights(full.model)[n]) for n, w in kit.weights(plain.model).items()), "it acts"


def test_a_resume_with_other_strategies_is_refused(kit, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    kit.make_trainer(tmp_path / "with", [OPM()], **settings).train()
    for balance, words in (([], r"written with strategies, and this run has none"), ([OGM()], r"\['opm'\].*\['ogm'\]")):
        with pytest.raises(MokaError, match=words):
            kit.make_trainer(tmp_path / "with", balance, **settings).train(str(tmp_path / "with/checkpoint-4"))
    kit.make_trainer(tmp_path / "without", **settings).train()
    with pytest.raises(MokaError, match=r"balance.pt"):
        kit.make_trainer(tmp_path / "without", [OPM()], **settings).train(str(tmp_path / "without/checkpoint-4"))


@pytest.mark.parametrize("name", CASES)
def test_measured_forwards_are_those_declared(kit, build, tmp_path, name):
    """Over six steps of two micro-batches, each of whose rows has both modalities."""
    strategy = build(name)[0]
    trainer = kit.make_trainer(
        tmp_path, [strategy], max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    calls = {True: 0, False: 0}
    decoder = trainer.model.get_base_model().language_model.model
    decoder.register_forward_hook(
        lambda *_: calls.__setitem__(torch.is_grad_enabled(), calls[torch.is_grad_enabled()] + 1)
    )
    trainer.train()
    needs, micro = strategy.needs(), 12
    assert calls[True] - micro == micro * needs.backwards(2)
    assert calls[False] == pytest.approx(micro * needs.forwards(2) + needs.once * needs._measured(2))
    assert (calls[False], calls[True] - micro) == (trainer.balance.ctx.forwards, trainer.balance.ctx.backwards)


@pytest.mark.parametrize("name", CASES)
def test_batches_without_media_and_with_one_kind_are_trained_on(kit, build, tmp_path, name):
    model = kit.make_model()
    data = kit.make_data(model, 16, ((), ("visual",), ("audio",), ("visual", "audio")))
    balance = build(name)
    trainer = kit.make_trainer(tmp_path, balance, model, data, per_device_train_batch_size=1, max_steps=16)
    trainer.train()
    assert all(weight.isfinite().all() for weight in kit.weights(model).values())


def test_costs_are_printed_before_training(kit, tmp_path, capsys):
    kit.make_trainer(tmp_path, [OGM(every=8), UnimodalLosses()], max_steps=1).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("balance: ")]
    assert [line.split(": ")[1] for line in lines] == ["ogm", "unimodal_losses"]
    assert "2 forwards without gradients every 8 steps" in lines[0]
    assert "2 forwards with backward a step" in lines[1]


def test_trainers_of_others_can_be_mixed_in(kit, tmp_path):
    class Mine(BalancedTrainer):
        pass

    trainer = kit.make_trainer(tmp_path, [OPM(every=1)], trainer_class=Mine, max_steps=2)
    trainer.train()
    assert copy.deepcopy(trainer.balance.strategies[0].state_dict())["running"].keys() == {"visual", "audio"}


def test_recomputed_activations_change_nothing(kit, tmp_path):
    found = []
    for checkpointing in (False, True):
        balance = [OPM(q_base=0.9, warmup=0.0, every=2), UnimodalLosses(), ParetoB()]
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model = kit.make_model()
        if checkpointing:
            model.enable_input_require_grads()
        trainer = kit.make_trainer(
            tmp_path / str(checkpointing),
            balance,
            model,
            **(settings if checkpointing else {}),
            optim="sgd",
            max_steps=4,
        )
        trainer.train()
        found.append(kit.weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-5, rtol=1e-4)


def test_batches_that_name_only_their_labels_are_trained_on(kit, tmp_path):
    """Without interaction ids the labels say which text is the question."""
    model = kit.make_model()
    data = [{k: v for k, v in sample.items() if k != "interaction_ids"} for sample in kit.make_data(model)]

    def collate(samples):
        batch = kit.collate([{**sample, "interaction_ids": [0] * len(sample["labels"])} for sample in samples])
        return {name: value for name, value in batch.items() if name != "interaction_ids"}

    trainer = kit.make_trainer(tmp_path, [OGM(every=1), UnimodalLosses()], model, data, max_steps=2)
    trainer.data_collator = collate
    trainer.train()
    assert trainer.balance.ctx.backwards == 4
