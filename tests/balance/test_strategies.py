"""The formulas by hand, and the quantity that each strategy changes, in the right modality when sides are swapped."""

import math

import numpy as np
import pytest
import torch

from moka.analysis import Contribution
from moka.balance import MLA, OGM, OPM, Handles, InfoReg, MMPareto, ParetoB, Relearning, UnimodalLosses
from moka.balance.handles import averaged
from moka.balance.inforeg import in_window, leading
from moka.balance.mla import projection
from moka.balance.ogm import agm_coefficients, ogm_coefficients, speed_coefficients
from moka.balance.opm import amco_share, dependence, opm_rates
from moka.balance.pareto import pareto_mix, pareto_weights
from moka.balance.relearning import Lifts, relearning_weight
from moka.balance.sampler import ids_of, weighted_order
from moka.balance.strategy import Context, Scores, dominance
from moka.balance.unimodal import blending_weights, distillation, jensen_shannon, residual_weight
from moka.balance.valuation import Valuation, copies_of
from moka.errors import MokaError

EXACT = {"abs": 1e-6, "rel": 0}


def test_the_dominance_ratio_of_two_and_three_by_hand():
    # exp(s_v - s_a): the better explanation has the lower NLL.
    assert dominance({"visual": 1.0, "audio": 2.0}) == pytest.approx({"visual": math.e, "audio": 1 / math.e}, **EXACT)
    # exp(mean of the others - own): (2 + 3) / 2 - 1 = 1.5, (1 + 3) / 2 - 2 = 0, (1 + 2) / 2 - 3 = -1.5
    three = dominance({"a": 1.0, "b": 2.0, "c": 3.0})
    assert three == pytest.approx({"a": 4.481689, "b": 1.0, "c": 0.223130}, **EXACT)
    assert dominance({"a": 1.0}) == {}
    assert dominance({"a": 5.0, "b": 5.0}) == {"a": 1.0, "b": 1.0}
    assert all(math.isfinite(rho) for rho in dominance({"a": 0.0, "b": 1e6}).values())
    assert dominance({"a": float("nan"), "b": 1.0}) == {"a": 1.0, "b": 1.0}


def test_ogm_by_hand():
    # 1 - tanh(0.3 * e) = 1 - 0.672605
    found = ogm_coefficients({"visual": math.e, "audio": 1 / math.e}, 0.3)
    assert found == pytest.approx({"visual": 0.3273953, "audio": 1.0}, **EXACT)
    # three: only what is above 1 is slowed; 1 - tanh(0.1 * 4.481689), 1 - tanh(0.1 * 1.5)
    found = ogm_coefficients({"a": 4.481689, "b": 1.5, "c": 0.22313}, 0.1)
    assert found == pytest.approx({"a": 0.5796073, "b": 0.8511150, "c": 1.0}, **EXACT)
    assert ogm_coefficients({"a": 1.0, "b": 1.0}, 0.8) == {"a": 1.0, "b": 1.0}  # a tie
    assert ogm_coefficients({"a": 1 + 1e-9}, 0.8)["a"] == pytest.approx(1 - math.tanh(0.8))  # the paper's jump
    assert ogm_coefficients({"a": 1 + 1e-9}, 0.8, smooth=True)["a"] == pytest.approx(1.0)
    assert ogm_coefficients({"a": 2.0}, 0.3, smooth=True)["a"] == pytest.approx(1 - math.tanh(0.3))


def test_agm_and_cggm_by_hand():
    found = agm_coefficients({"a": 2.0, "b": 0.5}, {"a": 1.5, "b": 0.7}, alpha=1.0)
    assert found == pytest.approx({"a": math.exp(-0.5), "b": math.exp(0.2)}, **EXACT)
    assert speed_coefficients({"a": 0.3, "b": 0.1}) == pytest.approx({"a": 0.325, "b": 0.975}, **EXACT)
    assert speed_coefficients({"a": -1.0, "b": -2.0}) == {"a": 1.0, "b": 1.0}
    assert speed_coefficients({"a": 0.2, "b": -2.0}) == pytest.approx({"a": 0.0, "b": 1.3}, **EXACT)


def test_opm_by_hand():
    # 0.5 * (1 + 0.5 * tanh(e - 1)) = 0.5 * (1 + 0.5 * 0.937656)
    found = opm_rates({"visual": math.e, "audio": 1 / math.e}, 0.5, 0.5)
    assert found == pytest.approx({"visual": 0.7344140, "audio": 0.0}, **EXACT)
    found = opm_rates({"a": 4.481689, "b": 1.5, "c": 0.22313}, 0.4, 0.5)
    assert found == pytest.approx({"a": 0.5996220, "b": 0.4924234, "c": 0.0}, **EXACT)
    assert opm_rates({"a": 1.0, "b": 1.0}, 0.5, 0.5) == {"a": 0.0, "b": 0.0}
    assert opm_rates({"a": 9.0}, 0.9, 1.0)["a"] == 1.0


def test_amco_by_hand():
    assert dependence({"a": 1.0, "b": 2.0})["a"] == pytest.approx(1 / (1 + math.exp(-1)), **EXACT)
    assert amco_share(0.15, 0.3) == pytest.approx(0.3 * math.sin(math.pi / 4), **EXACT)
    assert amco_share(0.9, 0.3) == pytest.approx(0.3, **EXACT)


def test_mmpareto_by_hand():
    g, u = [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])]
    mixed, c, cosine = pareto_mix(g, u, gamma=1.5)  # no conflict: the sum, times gamma
    assert (c, cosine) == (0.5, pytest.approx(2**-0.5, **EXACT))
    assert mixed[0].tolist() == pytest.approx([3.0, 1.5], **EXACT)
    # In conflict: c = (uu - gu) / (gg + uu - 2 gu) = (1.25 + 1) / (1 + 1.25 + 2) = 9 / 17
    g, u = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 0.5])]
    mixed, c, _ = pareto_mix(g, u)
    assert c == pytest.approx(9 / 17, **EXACT)
    h = torch.tensor([2 / 17, 8 / 17])  # 2 (9 (1, 0) + 8 (-1, 1/2)) / 17
    scale = max(1.0, 0.5 / (68**0.5 / 17))  # |g + u| = 0.5
    assert mixed[0].tolist() == pytest.approx((h * scale).tolist(), **EXACT)
    # Two tensors of one modality: one c for both, a magnitude for each.
    g = [torch.tensor([1.0]), torch.tensor([2.0])]
    u = [torch.tensor([-2.0]), torch.tensor([-1.0])]
    mixed, c, _ = pareto_mix(g, u)  # gg 5, uu 5, gu -4: c = 1/2
    assert c == pytest.approx(0.5, **EXACT)
    assert [h.item() for h in mixed] == pytest.approx([-1.0, 1.0], **EXACT)
    # At the edge c stays within the paper's 0.001.
    assert pareto_mix([torch.tensor([9.0, 0.0])], [torch.tensor([-0.001, 0.0])])[1] == pytest.approx(0.001, abs=2e-3)
    zero = torch.zeros(2)
    assert pareto_mix([zero], [torch.ones(2)])[1] == 0.5
    assert torch.equal(pareto_mix([zero], [zero])[0][0], zero)


def test_the_mixture_never_hurts_either_loss():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        g, u = torch.randn(2, 6, generator=generator) * torch.tensor([[1.0], [3.0]])
        (h,), c, cosine = pareto_mix([g], [u])
        assert h @ g >= -1e-5 * g.norm() * h.norm()
        assert h @ u >= -1e-5 * u.norm() * h.norm()
        assert (cosine > 0) == (c == 0.5) or c == pytest.approx(0.5, abs=1e-3)


def test_minimum_norm_weights_of_two_and_three_by_hand():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    assert pareto_weights(g @ g.T) == pytest.approx([9 / 17, 8 / 17], **EXACT)
    # Orthogonal but for a conflict of the first two: w_i goes as 1 / |g_i|^2 where all are orthogonal.
    g = torch.eye(3) * torch.tensor([1.0, 2.0, 4.0])
    gram = g @ g.T
    gram[0, 1] = gram[1, 0] = -1e-12
    assert pareto_weights(gram) == pytest.approx([16 / 21, 4 / 21, 1 / 21], **EXACT)
    assert pareto_weights(torch.ones(3, 3)) == pytest.approx([1 / 3] * 3)  # no conflict
    drawn = torch.Generator().manual_seed(0)
    for _ in range(30):
        g = torch.randn(3, 4, generator=drawn, dtype=torch.float64)
        gram = g @ g.T
        weights = torch.tensor(pareto_weights(gram), dtype=torch.float64)
        if (gram < 0).any():  # the condition of optimality: no vector is closer to the origin along h
            h = weights @ g
            assert ((g @ h) >= h @ h - 1e-6).all()


def test_residual_weights_by_hand():
    assert residual_weight(torch.tensor([math.log(0.25), 0.0])).tolist() == pytest.approx([4.75, 4.0], **EXACT)


def test_scores_are_means_over_rows_that_have_two_modalities(kit):
    model = kit.make_model().eval()
    kinds = (("visual", "audio"), ("visual",), ("audio", "visual"), ())
    batch = kit.collate([kit.make_sample(model, i, kind) for i, kind in enumerate(kinds)])
    batch.pop("sample_ids")
    ctx, scores = Context(model), Scores(decay=0.5)
    with ctx.micro_batch(batch):
        scores.measure(ctx)
    assert scores.reduce(ctx)
    found = Contribution(model, batch)
    for name in ("visual", "audio"):
        expected = -found.log_likelihood([name])[[0, 2]].mean().item()
        assert scores.current[name] == pytest.approx(expected, rel=1e-5)
    first = dict(scores.running)
    with ctx.micro_batch(batch):
        scores.measure(ctx)
    scores.reduce(ctx)
    assert scores.running == pytest.approx(first)  # the same batch, the same mean
    with ctx.micro_batch({k: v for k, v in kit.collate([kit.make_sample(model, 5, ())]).items() if k != "sample_ids"}):
        scores.measure(ctx)
    assert not scores.reduce(ctx)  # nothing to compare
    assert scores.running == pytest.approx(first)


class Fixed(Scores):
    """Scores that are given."""

    def __init__(self, values):
        super().__init__(0.0)
        self.given = values

    def measure(self, ctx):
        pass

    def reduce(self, ctx):
        self.current = self.running = dict(self.given)
        return True


def moved(kit, tmp_path, strategy, scores, **settings):
    """Mean absolute movement of A by modality in one step, relative to that without the strategy."""
    found = []
    for name, balance in (("with", [strategy]), ("without", [])):
        model = kit.make_model()
        handles = Handles(model)
        if balance:
            strategy.scores = Fixed(scores)
        before = {m: handles.copy(m) for m in handles.modalities}
        kit.make_trainer(tmp_path / name, balance, model, max_steps=1, **settings).train()
        after = {m: handles.A(m) for m in handles.modalities}
        found.append({m: sum((after[m][n] - before[m][n]).abs().mean().item() for n in after[m]) for m in after})
    return {m: found[0][m] / found[1][m] for m in found[0]}


@pytest.mark.parametrize(("strong", "weak"), [("visual", "audio"), ("audio", "visual")])
@pytest.mark.parametrize(("apply", "optim"), [("update", "adamw_torch"), ("update", "sgd"), ("grad", "sgd")])
def test_ogm_slows_the_modality_that_leads(kit, tmp_path, strong, weak, apply, optim):
    ratios = moved(kit, tmp_path, OGM(alpha=0.3, apply=apply), {strong: 1.0, weak: 2.0}, optim=optim)
    assert ratios[strong] == pytest.approx(1 - math.tanh(0.3 * math.e), rel=1e-3)
    assert ratios[weak] == pytest.approx(1, rel=1e-5)
    assert ratios["text"] == pytest.approx(1, rel=1e-5)


def test_a_gradient_that_is_scaled_moves_adam_all_the_same(kit, tmp_path):
    ratios = moved(kit, tmp_path, OGM(alpha=0.3, apply="grad"), {"visual": 1.0, "audio": 2.0}, optim="adamw_torch")
    assert ratios["visual"] == pytest.approx(1, rel=1e-3)


def test_ogm_of_equal_modalities_is_the_run_without(kit, tmp_path):
    ratios = moved(kit, tmp_path, OGM(alpha=0.8), {"visual": 1.5, "audio": 1.5})
    assert set(ratios.values()) == {1.0}


def test_ogm_acts_in_its_window(kit, tmp_path):
    ratios = moved(kit, tmp_path, OGM(alpha=0.8, start=0.5), {"visual": 1.0, "audio": 2.0})
    assert set(ratios.values()) == {1.0}


def test_the_noise_of_ogm_ge_has_the_size_of_the_update(kit, tmp_path):
    model = kit.make_model()
    handles = Handles(model)
    before = handles.copy("audio")
    strategy = OGM(noise=True)
    strategy.scores = Fixed({"visual": 1.0, "audio": 2.0})
    kit.make_trainer(tmp_path / "noisy", [strategy], model, max_steps=1, optim="sgd").train()
    plain = kit.make_model()
    kit.make_trainer(tmp_path / "plain", [], plain, max_steps=1, optim="sgd").train()
    noisy, clean = handles.A("audio"), Handles(plain).A("audio")
    moving = [name for name in noisy if not torch.equal(clean[name], before[name])]
    assert len(moving) > 4
    for name in moving:
        ratio = (noisy[name] - clean[name]).std() / (clean[name] - before[name]).std()
        assert 0.7 < ratio < 1.3


def test_ogm_scales_the_parts_of_b(kit, tmp_path):
    strategy = OGM(alpha=0.3, share_B=True)
    strategy.scores = Fixed({"visual": 1.0, "audio": 2.0})
    trainer = kit.make_trainer(tmp_path, [strategy], optim="sgd", max_steps=1, learning_rate=1.0)
    before = kit.rows(trainer.model, "moka_B")
    trainer.train()
    parts, k = trainer.balance.handles.parts.parts, 1 - math.tanh(0.3 * math.e)
    layers = {name: layer.moka_B["default"].weight for name, layer in trainer.balance.handles.layers.items()}
    for name, own in parts.items():
        expected = k * own["visual"] + own["audio"] + own["text"]
        start = next(value for key, value in before.items() if key.startswith(name))
        torch.testing.assert_close(start - layers[name].detach(), expected, atol=1e-4, rtol=1e-4)


def test_the_random_side_deals_the_same_coefficients(kit):
    ctx = Context(kit.make_model(), seed=0)
    seen = set()
    for step in range(20):
        ctx.step = step
        strategy = OGM(alpha=0.3, random_side=True)
        strategy.scores.current = strategy.scores.running = {"visual": 1.0, "audio": 2.0}
        found = strategy._coefficients(ctx)
        assert sorted(found.values()) == pytest.approx([1 - math.tanh(0.3 * math.e), 1.0])
        seen.add(min(found, key=found.get))
    assert seen == {"visual", "audio"}


@pytest.mark.parametrize(("strong", "weak"), [("visual", "audio"), ("audio", "visual")])
def test_opm_hides_the_leading_modality_at_its_rate(kit, strong, weak):
    model = kit.make_model()
    strategy = OPM(q_base=0.5, lam=0.5, p_exe=1.0, warmup=0.0)
    strategy.rates = opm_rates(dominance({strong: 1.0, weak: 2.0}), 0.5, 0.5)
    batch = kit.collate(kit.make_data(model, 8))
    ids = batch.pop("sample_ids")
    ctx, hidden, total = Context(model), {strong: 0, weak: 0}, 0
    for step in range(1, 200):
        ctx.step, total = step, total + 8
        with ctx.micro_batch(batch, ids):
            strategy._drop(ctx)
            for name in hidden:
                if ctx.hidden is not None:
                    rows = (ctx.hidden & ctx._tokens_of[name]).any(1)
                    assert torch.equal(ctx.hidden & ctx._tokens_of[name], ctx._tokens_of[name] & rows[:, None])
                    hidden[name] += int(rows.sum())
    assert hidden[weak] == 0
    expected = strategy.rates[strong]
    assert hidden[strong] / total == pytest.approx(expected, abs=4 * (expected * (1 - expected) / total) ** 0.5)


def test_opm_never_takes_a_samples_last_modality(kit):
    model = kit.make_model()
    strategy = OPM()
    strategy.rates = {"visual": 1.0, "audio": 0.9999}
    kinds = (("visual", "audio"), ("visual",), ("audio",), ())
    batch = kit.collate(kit.make_data(model, 8, kinds))
    ids, ctx = batch.pop("sample_ids"), Context(model)
    with ctx.micro_batch(batch, ids):
        strategy._drop(ctx)
        lost = [(ctx.hidden & ctx._tokens_of[name]).any(1).tolist() for name in ("visual", "audio")]
    assert lost == [[True, False, False, False] * 2, [False] * 8]


def test_hidden_tokens_change_nothing_that_the_model_says(kit):
    """What is hidden may be anything: the loss is the same, and the hidden modality's A has no gradient."""
    model = kit.make_model()
    batch = kit.collate(kit.make_data(model, 4))
    batch.pop("sample_ids")
    other = {**batch, "input_features": torch.randn_like(batch["input_features"])}
    losses = []
    for one in (batch, other):
        ctx = Context(model)
        with ctx.micro_batch(one):
            ctx.hide("audio", torch.ones(4, dtype=torch.bool))
            given, block = ctx.visible(one)
            with block:
                losses.append(model(**given).loss)
    assert torch.equal(*losses)
    losses[0].backward()
    handles = Handles(model)
    assert not any(grad.any() for grad in handles.gradient("audio").values())
    assert any(grad.any() for grad in handles.gradient("visual").values())


def test_amco_hides_a_growing_part_of_the_dependent_modality(kit):
    model = kit.make_model()
    strategy = OPM(mode="partial", epsilon=0.8, warmup=0.0)
    strategy.rates = {"visual": 0.0, "audio": 1.0}
    batch = kit.collate(kit.make_data(model, 4))
    ids, ctx, shares = batch.pop("sample_ids"), Context(model), []
    ctx.total_steps = 10
    for step in (1, 4, 9):
        ctx.step = step
        with ctx.micro_batch(batch, ids):
            strategy.prepare(batch, ctx) if step % strategy.every else None
            shares.append(0 if ctx.hidden is None else int(ctx.hidden.sum()))
            assert ctx.hidden is None or not (ctx.hidden & ctx._tokens_of["visual"]).any()
    assert shares == [0, 4 * 1, 4 * 2]  # of three tokens each: 0.16, 0.57 and 0.8 of them, rounded down


def test_uniform_losses_are_the_sum_of_the_masked_likelihoods(kit, tmp_path):
    model = kit.make_model()
    trainer = kit.make_trainer(
        tmp_path / "with", [UnimodalLosses(weight=0.5, scale={"audio": 2.0})], model, max_steps=1
    )
    plain = kit.make_trainer(tmp_path / "without", max_steps=1)
    batch = kit.collate(kit.make_data(model, 4))
    ids = batch.pop("sample_ids")
    trainer.train(), plain.train()
    joint, total = (t.state.log_history[0]["loss"] for t in (plain, trainer))
    parts = {m: trainer.state.log_history[0][f"balance/unimodal_losses/{m}"] for m in ("visual", "audio")}
    assert total == pytest.approx(joint + sum(parts.values()), rel=1e-5)
    # The trainer's first batch has the seed's order: any batch shows the same relation to the likelihoods.
    fresh = kit.make_model().eval()
    ctx, found = Context(fresh), Contribution(fresh, batch)
    with ctx.micro_batch(batch, ids):
        own = UnimodalLosses(weight=0.5, scale={"audio": 2.0}).loss(torch.tensor(0.0), ctx)
    expected = -(0.5 * found.log_likelihood(["visual"]) + 1.0 * found.log_likelihood(["audio"])).mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_margin_of_crmt_by_hand(kit):
    model = kit.make_model().eval()
    batch = kit.collate(kit.make_data(model, 4))
    batch.pop("sample_ids")
    ctx, found = Context(model), Contribution(model, batch)
    with ctx.micro_batch(batch):
        own = UnimodalLosses(form="margin", weight=2.0).loss(torch.tensor(0.0), ctx)
    p = {m: found.log_likelihood([m]).exp() for m in ("visual", "audio")}
    expected = 2.0 * torch.log(1 / p["visual"] - 1 + 1 / p["audio"] - 1 + 1e-5).mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


def test_reconboost_weights_what_the_rest_does_not_know(kit):
    model = kit.make_model().eval()
    batch = kit.collate(kit.make_data(model, 4))
    batch.pop("sample_ids")
    ctx, found = Context(model), Contribution(model, batch)
    with ctx.micro_batch(batch):
        own = UnimodalLosses(form="residual").loss(torch.tensor(0.0), ctx)
    visual, audio = (found.log_likelihood([m]) for m in ("visual", "audio"))
    expected = -((5 - audio.exp()) * visual + (5 - visual.exp()) * audio).mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mmpareto_mixes_what_autograd_says(kit, tmp_path):
    """The gradient of A_m that the optimizer gets is the mixture of both losses' gradients, over two micro-batches."""
    seen = {}
    model = kit.make_model()
    data = kit.make_data(model, 4)
    strategy = MMPareto(gamma=1.0)
    trainer = kit.make_trainer(
        *(tmp_path, [strategy], model, data), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    update = strategy.update

    def watch(handles, ctx):
        seen["sum"] = {m: {n: g.clone() for n, g in handles.gradient(m).items()} for m in handles.modalities}
        update(handles, ctx)
        seen["mixed"] = {m: {n: g.clone() for n, g in handles.gradient(m).items()} for m in handles.modalities}

    strategy.update = watch
    trainer.train()
    reference = kit.make_model()
    handles = Handles(reference)
    batch = kit.collate(data)
    batch.pop("sample_ids")
    reference(**batch).loss.backward()
    joint = {m: {n: g.clone() for n, g in handles.gradient(m).items()} for m in handles.modalities}
    for name in ("visual", "audio"):
        reference.zero_grad()
        (-Contribution(reference, batch).log_likelihood([name], grad=True).mean()).backward()
        own = {n: g.clone() for n, g in handles.gradient(name).items()}
        layers = list(own)
        expected, _, _ = pareto_mix([joint[name][n] for n in layers], [own[n] for n in layers])
        for layer, h in zip(layers, expected, strict=True):
            plain = joint[name][layer] + own[layer]
            for found, reference_of in ((seen["sum"], plain), (seen["mixed"], h)):
                assert (found[name][layer] - reference_of).norm() <= 1e-4 * max(float(plain.norm()), 1e-3)
    for layer in joint["text"]:
        assert torch.equal(seen["mixed"]["text"][layer], seen["sum"]["text"][layer])  # shared: the plain sum


def test_pareto_of_b_is_the_plain_sum_without_a_conflict_and_hurts_no_part_with_one(kit):
    model = kit.make_model()
    handles, ctx = Handles(model), Context(model)
    generator = torch.Generator().manual_seed(0)
    for conflict in (False, True):
        parts = {}
        for name, layer in handles.layers.items():
            weight = layer.moka_B["default"].weight
            base = torch.rand(weight.shape, generator=generator)
            parts[name] = {
                "text": base,
                "visual": base * (-0.5 if conflict else 0.5) + 0.1,
                "audio": base.clone() + 0.2,
            }
            weight.grad = sum(parts[name].values())
        handles.parts_of_B = lambda parts=parts: parts
        before = {name: grad.clone() for name, grad in handles.gradients_of_B().items()}
        ParetoB().update(handles, ctx)
        after = handles.gradients_of_B()
        if not conflict:
            assert all(torch.equal(after[name], before[name]) for name in before)
            continue
        for modality in ("text", "visual", "audio"):
            gain = sum((after[name] * parts[name][modality]).sum().item() for name in after)
            assert gain >= -1e-4
        norms = [sum(g.pow(2).sum().item() for g in one.values()) for one in (after, before)]
        assert norms[0] >= norms[1] * (1 - 1e-5)


def test_one_process_averages_with_itself():
    rows = {"a": torch.ones(2)}
    assert averaged(rows) is rows


def test_relearning_by_hand():
    gap, w = relearning_weight(0.999, 0.499, lam=3.0, cap=0.95)
    assert (gap, w) == (pytest.approx(0.5, **EXACT), pytest.approx(math.tanh(1.5), **EXACT))
    assert relearning_weight(0.999, 0.499, lam=3.0, cap=0.5)[1] == 0.5
    assert relearning_weight(0.2, 0.2, lam=3.0, cap=0.5) == (0.0, 0.0)
    assert relearning_weight(0.0, 0.0, lam=3.0, cap=0.5) == (0.0, 0.0)


@pytest.mark.parametrize("target", ["init", "zero"])
@pytest.mark.parametrize("noisy", ["visual", "audio"])
def test_relearning_moves_back_the_modality_that_does_not_generalise(kit, target, noisy):
    model = kit.make_model()
    handles, ctx = Handles(model), Context(model)
    handles.keep_init()
    start = {m: handles.copy(m) for m in handles.modalities}
    for name in handles.modalities:
        handles.set(name, {layer: row + 1.0 for layer, row in handles.A(name).items()})
    ctx.total_steps, ctx.step, ctx.validation = 8, 3, lambda: iter(())
    strategy = Relearning(events=[0.5], cap=0.9, target=target)
    other = {"visual": "audio", "audio": "visual"}[noisy]
    reads = iter([{noisy: 1.0, other: 1.0}, {noisy: 0.8, other: 1.0}])  # of training, then of validation batches
    strategy.lifts.read = lambda ctx: next(reads)
    original, Lifts.read = Lifts.read, lambda self, ctx: next(reads)
    try:
        strategy.interval(handles, ctx)
    finally:
        Lifts.read = original
    w = math.tanh(3 * 0.2 / 1.001)
    for layer, row in handles.A(noisy).items():
        goal = start[noisy][layer] if target == "init" else torch.zeros_like(row)
        torch.testing.assert_close(row, w * goal + (1 - w) * (start[noisy][layer] + 1))
    for name in (other, "text"):
        for layer, row in handles.A(name).items():
            assert torch.equal(row, start[name][layer] + 1)


def test_lifts_are_means_over_rows_that_have_the_modality(kit):
    model = kit.make_model().eval()
    batch = kit.collate([kit.make_sample(model, i, k) for i, k in enumerate((("visual", "audio"), ("visual",), ()))])
    batch.pop("sample_ids")
    ctx, lifts, found = Context(model), Lifts(), Contribution(model, batch)
    with ctx.micro_batch(batch):
        lifts.measure(ctx)
    assert lifts.read(ctx) == pytest.approx(
        {
            "visual": found.lift(["visual"])[:2].mean().item(),
            "audio": found.lift(["audio"])[0].item(),
        },
        rel=1e-4,
        abs=1e-6,
    )


def test_inforeg_by_hand():
    assert leading({"visual": 1.0, "audio": 1.5}) == ("visual", pytest.approx(0.5))
    assert leading({"a": 2.0, "b": 1.0, "c": 4.0}) == ("b", pytest.approx(2.0))
    assert in_window([], 0.05, 10)
    assert in_window([1.0], 0.05, 10)
    assert in_window([1.0, 1.2], 0.05, 10)  # means 1.1 and 1.0: 0.0909
    assert not in_window([1.0, 1.1], 0.05, 10)  # 1.05 and 1.0: 0.0476
    assert not in_window([1.0, 0.5], 0.05, 10)
    assert in_window([9.0, 1.0, 2.0], 0.05, 1)  # the last only: 2 and 1
    assert not in_window([0.0, 0.0], 0.05, 10)


@pytest.mark.parametrize(("strong", "weak"), [("visual", "audio"), ("audio", "visual")])
def test_inforeg_keeps_the_leading_modality_near_its_anchor(kit, tmp_path, strong, weak):
    """The larger beta, the nearer; the other modality and one that is outside of its window move as without."""
    distances = []
    for beta, threshold in ((0.0, 0.05), (5.0, -10.0), (30.0, -10.0), (30.0, 10.0)):
        model = kit.make_model()
        handles = Handles(model)
        before = {m: handles.copy(m) for m in handles.modalities}
        strategy = InfoReg(beta=beta, window=100, threshold=threshold)
        strategy.scores = Fixed({strong: 1.0, weak: 2.0})
        strategy.history = {strong: [1.0, 1.0]}
        kit.make_trainer(tmp_path / f"{beta}{threshold}", [strategy], model).train()
        after = {m: handles.A(m) for m in handles.modalities}
        distances.append({m: sum((after[m][n] - before[m][n]).norm().item() for n in after[m]) for m in after})
    free, some, much, outside = (one[strong] for one in distances)
    assert much < some < free
    assert outside == free


def test_inforegs_fisher_information_is_the_mean_square_of_the_gradients(kit, tmp_path):
    strategy = InfoReg(window=2, every=1)
    seen, update = [], strategy.update

    def watch(handles, ctx):
        seen.append(sum(float(g.pow(2).mean()) for g in handles.gradient("audio").values()))
        update(handles, ctx)

    strategy.update = watch
    kit.make_trainer(tmp_path, [strategy], max_steps=4).train()
    assert strategy.history["audio"] == pytest.approx([seen[0] + seen[1], seen[2] + seen[3]], rel=1e-6)


def test_mlas_projection_by_hand():
    # I - z z^T / (0.1 + z z) for z = (1, 2): k^T z = 5, divided by 5.1, then by the norm.
    expected = torch.tensor([[1 - 1 / 5.1, -2 / 5.1], [-2 / 5.1, 1 - 4 / 5.1]])
    found = projection(torch.eye(2), torch.tensor([1.0, 2.0]), alpha=0.1, leak=0.0)
    assert found.flatten().tolist() == pytest.approx((expected / expected.norm()).flatten().tolist(), **EXACT)
    leaky = projection(torch.eye(2), torch.tensor([1.0, 2.0]), alpha=0.1, leak=0.5)
    mixed = 0.5 * expected + 0.5 * torch.eye(2)
    assert leaky.flatten().tolist() == pytest.approx((mixed / mixed.norm()).flatten().tolist(), **EXACT)
    # A second direction: P z of the first P.
    k = found.double() @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = found.double() - torch.outer(k, k) / (0.01 + k[0])
    again = projection(found, torch.tensor([1.0, 0.0]), alpha=0.01, leak=0.0)
    assert again.flatten().tolist() == pytest.approx((second / second.norm()).flatten().tolist(), **EXACT)
    three = projection(torch.eye(3), torch.tensor([0.0, 0.0, 3.0]), alpha=0.1, leak=0.0)
    diagonal = torch.tensor([1.0, 1.0, 1 - 9 / 9.1])
    assert torch.diagonal(three).tolist() == pytest.approx((diagonal / diagonal.norm()).tolist(), **EXACT)


def test_mla_alternates_and_projects_from_the_second_turn_on(kit, tmp_path):
    strategy = MLA(p_alt=1.0, leak=0.0)
    trainer = kit.make_trainer(tmp_path, [strategy], max_steps=3, optim="sgd")
    seen, update = [], strategy.update

    def watch(handles, ctx):
        hidden = [m for m in ("visual", "audio") if not any(g.any() for g in handles.gradient(m).values())]
        plain = {n: g.clone() for n, g in handles.gradients_of_B().items()}
        before = dict(strategy.projections)
        update(handles, ctx)
        seen.append((hidden, plain, {n: g.clone() for n, g in handles.gradients_of_B().items()}, before))

    strategy.update = watch
    trainer.train()
    assert [hidden for hidden, *_ in seen] == [["audio"], ["visual"], ["audio"]]
    assert all(torch.equal(seen[0][1][name], seen[0][2][name]) for name in seen[0][1])
    for _, plain, projected, before in seen[1:]:
        for name, grad in plain.items():
            torch.testing.assert_close(projected[name], grad @ before[name].T, atol=1e-5, rtol=1e-4)


def test_mlas_joint_steps_are_the_plain_ones(kit, tmp_path):
    ours = kit.make_trainer(tmp_path / "mla", [MLA(p_alt=0.0)])
    plain = kit.make_trainer(tmp_path / "plain")
    ours.train(), plain.train()
    for name, weight in kit.weights(plain.model).items():
        assert torch.equal(weight, kit.weights(ours.model)[name]), name


def test_mlas_projection_protects_what_the_modality_before_has_learnt(kit):
    """B's answer to the mean z~ of the modality before moves less: the step along it is nearly removed."""
    z = torch.tensor([1.0, -2.0, 0.5, 1.0])
    P = projection(torch.eye(4), z, alpha=0.01, leak=0.0)
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    kept = (grad @ P.T @ z).norm() / (grad @ z).norm()
    assert kept < 0.01


def test_copies_by_hand():
    assert [copies_of(phi) for phi in (1.5, 1.0, 0.99, 0.4, 0.39, 0.0, -0.1, -0.11, -1.0)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
    ]


def test_quarters_of_likelihood_values_by_hand():
    strategy = Valuation(value="log_likelihood")
    strategy.table = {f"s{i}": {"visual": float(i), "audio": float(-i)} for i in range(8)}
    copies = strategy._copies()
    assert [copies[f"s{i}"]["visual"] for i in range(8)] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert [copies[f"s{i}"]["audio"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("weights", [[1.0] * 7, [1.0, 2.0, 3.0, 6.0], [7.0, 1.0, 1.0, 1.0, 1.0], [0.5] * 3 + [4.0]])
def test_an_epoch_has_its_size_and_each_sample_its_share(weights):
    n, total = len(weights), np.zeros(len(weights))
    for seed in range(300):
        order = weighted_order(weights, np.random.default_rng(seed))
        assert len(order) == n
        counts = np.bincount(order, minlength=n)
        share = np.array(weights) * n / sum(weights)
        assert (counts >= np.floor(share + 1e-9)).all()
        assert (counts <= np.floor(share + 1e-9) + 1).all()
        total += counts
    assert total / 300 == pytest.approx(np.array(weights) * n / sum(weights), abs=0.15)
    if len(set(weights)) == 1:
        assert sorted(order) == list(range(n))


def test_values_are_the_shapley_values_of_the_samples(kit):
    model = kit.make_model().eval()
    kinds = (("visual", "audio"), ("visual", "audio"), ("visual",))
    batch = kit.collate([kit.make_sample(model, i, kind) for i, kind in enumerate(kinds)])
    ids, ctx, found = batch.pop("sample_ids"), Context(model), Contribution(model, batch)
    strategy = Valuation(value="log_likelihood")
    with ctx.micro_batch(batch, ids):
        strategy.prepare(batch, ctx)
    assert ctx.forwards == 4
    strategy.update(None, ctx)
    v = {s: found.log_likelihood(s) for s in ((), ("visual",), ("audio",), ("visual", "audio"))}
    visual = (v["visual",] - v[()] + v["visual", "audio"] - v["audio",]) / 2
    assert set(strategy.table) == {"s0", "s1"}  # the third has no sound to compare with
    for i in range(2):
        assert strategy.table[f"s{i}"]["visual"] == pytest.approx(visual[i].item(), abs=1e-5)


def test_a_modality_of_little_value_is_shown_alone_as_often_as_its_copies_say(kit):
    model = kit.make_model()
    strategy = Valuation(every=10_000)
    strategy.copies = {"s0": {"visual": 0, "audio": 3}, "s1": {"visual": 1, "audio": 0}}
    batch = kit.collate(kit.make_data(model, 3))
    ids, ctx = batch.pop("sample_ids"), Context(model)
    hidden = {name: torch.zeros(3) for name in ("visual", "audio")}
    steps = 400
    for step in range(1, steps + 1):
        ctx.step = step
        with ctx.micro_batch(batch, ids):
            strategy.prepare(batch, ctx)
            for name in hidden:
                if ctx.hidden is not None:
                    hidden[name] += (ctx.hidden & ctx._tokens_of[name]).any(1)
    assert (hidden["visual"] / steps).tolist() == pytest.approx([0.75, 0, 0], abs=0.08)
    assert (hidden["audio"] / steps).tolist() == pytest.approx([0, 0.5, 0], abs=0.1)


def test_samples_come_as_often_as_they_and_their_copies(kit, tmp_path):
    strategy = Valuation(warmup=0.0, value="weighted_correct", every=10_000)
    trainer = kit.make_trainer(tmp_path, [strategy], max_steps=8)
    assert ids_of(trainer.train_dataset) == [f"s{i}" for i in range(16)]
    strategy.table = {f"s{i}": {"visual": 1.0, "audio": -1.0 if i < 4 else 1.0} for i in range(16)}
    seen, loss = [], trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        seen.extend(inputs["sample_ids"])
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    assert len(seen) == 32
    often = sum(int(one[1:]) < 4 for one in seen)  # four of weight 4, twelve of weight 1
    assert often == pytest.approx(32 * 16 / 28, abs=2)


def test_a_stream_is_refused_where_samples_are_drawn(kit, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(MokaError, match=r"valuation.*streamed"):
        kit.make_trainer(tmp_path, [Valuation()], data=Stream(), eval_dataset=None)


def test_gradient_blending_by_hand():
    # G / O^2: 0.2 / 0.25, 0.1 / 0.01 and 0 (it rose); mean 1
    found = blending_weights({"joint": 0.2, "a": 0.1, "b": -0.3}, {"joint": 0.5, "a": -0.1, "b": 0.2})
    assert found == pytest.approx({"joint": 3 * 0.8 / 10.8, "a": 3 * 10 / 10.8, "b": 0.0}, **EXACT)
    assert blending_weights({"joint": -1.0, "a": -1.0}, {"joint": 0.1, "a": 0.1}) == {"joint": 1.0, "a": 1.0}
    assert math.isfinite(blending_weights({"joint": 1.0, "a": 1.0}, {"joint": 0.0, "a": 1.0})["joint"])


def test_the_jensen_shannon_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    mean = (p + q) / 2
    expected = ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2
    assert jensen_shannon(torch.stack([p, q]).log()).item() == pytest.approx(expected.item(), **EXACT)
    assert jensen_shannon(torch.stack([p, p, p]).log()).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_by_hand():
    """Of two modalities, one answer token: the right one teaches the other by how much more it knows."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.6, 0.1])
    log_p = torch.stack([p, q]).log()[:, None, None].requires_grad_()  # [2, 1 row, 1 place, 3]
    targets = torch.tensor([[0]])
    nll = -log_p[..., 0]
    found = distillation(log_p, nll, targets)
    kl = (p * (p / q).log()).sum().item()
    assert found.item() == pytest.approx((0.7 - 0.3) * kl, **EXACT)
    found.sum().backward()
    assert not log_p.grad[0].any()
    assert log_p.grad[1].any()
    # The strongest is wrong: its highest probability is another token's.
    wrong = torch.stack([torch.tensor([0.4, 0.5, 0.1]), torch.tensor([0.3, 0.6, 0.1])]).log()[:, None, None]
    assert distillation(wrong, -wrong[..., 0], targets).item() == 0


@pytest.mark.parametrize("form", ["distill", "alignment"])
def test_compared_losses_are_those_of_the_masked_likelihoods(kit, form):
    model = kit.make_model().eval()
    batch = kit.collate(
        [kit.make_sample(model, i, k) for i, k in enumerate((("visual", "audio"),) * 2 + (("visual",),))]
    )
    batch.pop("sample_ids")
    ctx, found = Context(model), Contribution(model, batch)
    with ctx.micro_batch(batch):
        own = UnimodalLosses(form=form).loss(torch.tensor(0.0), ctx)
    log_p, nll = {}, 0.0
    for name in ("visual", "audio"):
        one, targets = found.answer_distribution([name])
        log_p[name] = one[:2]
        expected = one.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
        torch.testing.assert_close(expected.sum(1) / 2, found.log_likelihood([name]))
        nll = nll - found.log_likelihood([name])[:2].sum() * 2
    answer = targets[:2] != -100
    k = 0.95 if form == "alignment" else 0.0
    stacked = torch.stack(list(log_p.values()))
    each = jensen_shannon(stacked) * k if k else 0.0
    if form == "distill":
        parts = -stacked.gather(-1, targets[None, :2].clamp(min=0)[..., None].expand(2, -1, -1, 1))[..., 0] * answer
        each = distillation(stacked, parts, targets[:2])
    expected = ((1 - k) * nll + (each * answer).sum()) / 6  # three rows of two answer tokens
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)
