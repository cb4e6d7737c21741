"""Greedy by hand: the two paths of B's gradient, who learns faster through the question, and the steps without it."""

import math
from types import SimpleNamespace

import pytest
import torch

from moka.analysis.gradients import observed_gradients
from moka.balance import Greedy, Handles
from moka.balance.greedy import faster
from moka.balance.strategy import Context
from moka.errors import MokaError


def test_the_faster_modality_by_hand():
    # log10 of 10 / 1 and of 2 / 20
    lead, difference = faster({"visual": [10.0, 1.0], "audio": [2.0, 20.0]})
    assert (lead, difference) == ("visual", pytest.approx(2.0, abs=1e-6))
    assert faster({"a": [1.0, 1.0], "b": [10.0, 1.0], "c": [1.0, 100.0]}) == ("b", pytest.approx(3.0, abs=1e-6))
    assert faster({"visual": [10.0, 1.0]}) == ("", 0.0)
    assert faster({"visual": [10.0, 1.0], "audio": [0.0, 1.0]}) == ("", 0.0)


@pytest.mark.parametrize("interaction", ["question", "mean"])
def test_the_parts_of_both_paths_are_those_of_the_equations(kit, interaction):
    """The direct part is s sum_t delta_t z_t^T over a modality's tokens, from the inputs and the outputs' gradients."""
    model = kit.make_model(interaction=interaction).eval()
    batch = kit.collate(kit.make_data(model, 4, (("visual", "audio"), ("visual",))))
    batch.pop("sample_ids")
    handles, inputs, deltas = Handles(model), {}, {}
    for name, layer in handles.layers.items():
        layer.register_forward_hook(
            lambda module, args, output, name=name: (
                (
                    inputs.__setitem__(name, args[0].detach()),
                    output.register_hook(lambda grad: deltas.__setitem__(name, grad)),
                )[-1]
                and None
            )
        )
    with observed_gradients(model, paths=True) as found:
        model(**batch).loss.backward()
    types = batch["mm_token_type_ids"]
    some = 0.0
    for name, layer in handles.layers.items():
        for modality, kind in (("visual", 1), ("audio", 3)):
            z = inputs[name][types == kind] @ handles.A(modality)[name].T  # [tokens, r]
            direct = layer.moka_scaling["default"] * deltas[name][types == kind].T @ z
            total, through = found.parts[name][modality], found.interaction[name][modality]
            torch.testing.assert_close(total - through, direct, atol=1e-5, rtol=1e-4)
            some += float(through.abs().sum())
        assert not found.interaction[name]["text"].any()
    assert some > 0


@pytest.mark.parametrize(("modality", "other"), [("visual", "audio"), ("audio", "visual")])
def test_without_the_interaction_is_a_weight_of_zero(kit, modality, other):
    model = kit.make_model().eval()
    without = kit.make_model(interaction_weight={modality: 0.0, other: 1.0}).eval()
    batch = kit.collate(kit.make_data(model, 4))
    batch.pop("sample_ids")
    ctx = Context(model)
    with ctx.micro_batch(batch):
        ctx.without_interaction(modality)
        given, block = ctx.visible(batch)
        with block:
            loss = model(**given).loss
    torch.testing.assert_close(loss, without(**batch).loss)
    assert not torch.isclose(loss, model(**batch).loss, atol=1e-6)


def fake_handles(parts):
    """Handles that have B of norm 1 and these parts: modality -> (through the interaction, directly)."""
    tables = [{"layer": {m: torch.tensor([[float(values[k])]]) for m, values in parts.items()}} for k in (0, 1)]
    both = {"layer": {m: tables[0]["layer"][m] + tables[1]["layer"][m] for m in parts}}
    return SimpleNamespace(
        B=lambda: {"layer": torch.ones(1, 1)}, parts=SimpleNamespace(parts=both, interaction=tables[0])
    )


@pytest.mark.parametrize(("fast", "slow"), [("visual", "audio"), ("audio", "visual")])
def test_the_faster_modality_loses_the_question_for_a_window(kit, model, fast, slow):
    strategy, ctx = Greedy(window=2, warmup=0.0), Context(model)
    ctx.total_steps = 100
    handles = fake_handles({fast: (3.0, 1.0), slow: (1.0, 2.0)})
    strategy.update(handles, ctx)
    assert strategy.speeds == {fast: [9.0, 1.0], slow: [1.0, 4.0]}
    assert (strategy.side, strategy.left) == (fast, 2)
    batch = kit.collate(kit.make_data(model, 2))
    batch.pop("sample_ids")
    for left in (1, 0):
        with ctx.micro_batch(batch):
            strategy.prepare(batch, ctx)
            assert torch.equal(ctx.apart, ctx.tokens_of(fast))
        strategy.update(handles, ctx)
        assert strategy.left == left
    assert strategy.speeds == {fast: [9.0, 1.0], slow: [1.0, 4.0]}  # measured in ordinary steps only
    with ctx.micro_batch(batch):
        strategy.prepare(batch, ctx)
        assert ctx.apart is None
    assert faster(strategy.speeds)[1] == pytest.approx(math.log10(36))


def test_equal_speeds_and_the_warm_up_change_nothing(model):
    ctx = Context(model)
    ctx.total_steps = 100
    equal, early = Greedy(warmup=0.0), Greedy(warmup=0.5)
    equal.update(fake_handles({"visual": (2.0, 1.0), "audio": (4.0, 2.0)}), ctx)
    early.update(fake_handles({"visual": (3.0, 1.0), "audio": (1.0, 2.0)}), ctx)
    assert (equal.left, early.left, early.speeds) == (0, 0, {})


def test_the_control_draws_the_modality(model):
    ctx, seen = Context(model), set()
    ctx.total_steps = 100
    for step in range(20):
        ctx.step = step
        strategy = Greedy(warmup=0.0, random_side=True)
        strategy.update(fake_handles({"visual": (3.0, 1.0), "audio": (1.0, 2.0)}), ctx)
        seen.add(strategy.side)
    assert seen == {"visual", "audio"}


@pytest.mark.parametrize("interaction", ["none", "reversed"])
def test_adapters_whose_media_do_not_read_the_question_are_refused(kit, tmp_path, interaction):
    with pytest.raises(MokaError, match=rf"greedy: .*adapter.interaction is {interaction}.*question"):
        kit.make_trainer(tmp_path, [Greedy()], kit.make_model(interaction=interaction))


def test_batches_without_interaction_ids_are_refused(kit, model):
    batch = kit.collate(kit.make_data(model, 2))
    ctx = Context(model)
    left = {name: value for name, value in batch.items() if name not in ("interaction_ids", "sample_ids")}
    with ctx.micro_batch(left), pytest.raises(MokaError, match="interaction_ids"):
        ctx.without_interaction("visual")
