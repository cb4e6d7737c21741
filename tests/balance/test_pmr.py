"""PMR by hand: distances to prototypes, the weak modality, prototypes over intervals; open answers are refused."""

import math

import pytest
import torch

from moka.balance import PMR
from moka.balance.features import hidden_states, pooled
from moka.balance.pmr import answers_of, prototype_log_probabilities
from moka.balance.strategy import Context
from moka.errors import MokaError

EXACT = {"abs": 1e-6, "rel": 0}


def run_loss(model, strategy, batch, step=1):
    """The strategy's loss of one micro-batch, the step's own being 0, and the context."""
    ctx = Context(model)
    ctx.step, ctx.total_steps = step, 100
    with ctx.micro_batch(batch):
        strategy.prepare(batch, ctx)
        given, block = ctx.visible(batch)
        with block:
            model(**given)
        return strategy.loss(torch.tensor(0.0), ctx), ctx


@pytest.fixture
def batch(kit, model):
    found = kit.collate(kit.make_data(model, 4))
    found.pop("sample_ids")
    return found


def features(model, batch):
    """Mean hidden states of each modality at the input of the second of two blocks."""
    ctx = Context(model)
    with ctx.micro_batch(batch), hidden_states(model) as found:
        model(**batch)
        return {name: pooled(found[-1], ctx.tokens_of(name)) for name in ctx.media}


def test_similarities_are_distances_by_hand():
    found = prototype_log_probabilities(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])).exp()
    total = math.exp(-5) + math.exp(-1)
    assert found[0].tolist() == pytest.approx([math.exp(-5) / total, math.exp(-1) / total], **EXACT)
    phi = torch.zeros(1, 2, requires_grad=True)  # on its own prototype
    prototype_log_probabilities(phi, torch.zeros(2, 2))[0, 0].backward()
    assert phi.grad.isfinite().all()


def test_a_class_is_an_answer():
    labels = torch.tensor([[-100, 5, 7], [-100, 5, 7], [-100, -100, 5], [-100, -100, -100]])
    assert answers_of(labels) == ["5 7", "5 7", "5", ""]


def test_pooled_features_by_hand():
    states = torch.tensor([[[1.0], [2.0], [6.0]], [[1.0], [1.0], [1.0]]])
    tokens = torch.tensor([[False, True, True], [False, False, False]])
    assert pooled(states, tokens).tolist() == [[4.0], [0.0]]


@pytest.mark.parametrize(("weak", "strong"), [("visual", "audio"), ("audio", "visual")])
def test_the_modality_that_tells_the_classes_apart_worse_is_pulled(kit, model, batch, weak, strong):
    """The strong one lies on its prototypes, those of the weak one are in reverse order."""
    phi, answers = features(model, batch), answers_of(batch["labels"])
    strategy = PMR(alpha=2.0)
    strategy.prototypes = {
        strong: dict(zip(answers, phi[strong].detach(), strict=True)),
        weak: dict(zip(answers, phi[weak].detach().flip(0), strict=True)),
    }
    loss, ctx = run_loss(model, strategy, batch)
    assert loss.item() == 0  # no score is known yet
    strategy.update(None, ctx)
    assert strategy.weak == weak
    assert len(strategy.sums[weak]) == 4
    loss, ctx = run_loss(model, strategy, batch)
    log_p = prototype_log_probabilities(phi[weak], phi[weak].flip(0))
    assert loss.item() == pytest.approx(-2.0 * log_p.diagonal().mean().item(), rel=1e-5)
    assert ctx._parts[f"pmr/loss/{weak}"] == pytest.approx(loss.item())
    loss.backward()
    row = {name: k for k, name in enumerate(("text", "visual", "audio"))}
    grads = [p.grad for n, p in model.named_parameters() if ".moka_A." in n and p.grad is not None]
    assert any(grad[row[weak]].any() for grad in grads)


def test_the_control_draws_the_modality(model):
    ctx, strategy, seen = Context(model), PMR(random_side=True), set()
    for step in range(20):
        ctx.step, strategy._scores = step, {"visual": [0.1, 1.0], "audio": [0.9, 1.0]}
        strategy.update(None, ctx)
        seen.add(strategy.weak)
    assert seen == {"visual", "audio"}


def test_prototypes_are_running_means_over_intervals():
    strategy, ctx = PMR(momentum=0.25, every=2), type("Step", (), {"step": 1})()
    strategy.prototypes = {"visual": {"5": torch.tensor([4.0, 0.0])}}
    strategy.sums = {"visual": {"5": [torch.tensor([6.0, 3.0]).double(), 3], "7": [torch.ones(2).double(), 1]}}
    strategy.interval(None, ctx)
    # 0.25 * (4, 0) + 0.75 * (2, 1)
    assert strategy.prototypes["visual"]["5"].tolist() == pytest.approx([2.5, 0.75], **EXACT)
    assert strategy.prototypes["visual"]["7"].tolist() == [1.0, 1.0]
    assert strategy.sums == {}
    ctx.step = 2
    strategy.sums = {"visual": {"5": [torch.zeros(2).double(), 1]}}
    strategy.interval(None, ctx)  # in the middle of an interval
    assert strategy.prototypes["visual"]["5"][0] == 2.5


def test_open_answers_are_refused(kit, tmp_path):
    """Every sample of the data has another answer."""
    with pytest.raises(MokaError) as error:
        kit.make_trainer(tmp_path, [PMR(max_classes=7)]).train()
    for word in ("pmr", "answers are open", "8", "max_classes", "7"):
        assert word in str(error.value)


def test_it_ends_with_its_window(kit, model, batch):
    strategy = PMR(end=0.5)
    _, ctx = run_loss(model, strategy, batch, step=60)
    strategy.update(None, ctx)
    assert strategy.sums == {}


def test_the_heavier_the_nearer_to_the_prototypes(kit, tmp_path):
    """Mean PCE of sound over the last two of eight steps, by alpha; its prototypes are given."""
    found = []
    for alpha in (0.01, 0.1, 1.0):
        model = kit.make_model()
        strategy, data = PMR(alpha=alpha), kit.make_data(model, 4)
        batch = kit.collate(data)
        batch.pop("sample_ids")
        phi, answers = features(model, batch)["audio"].detach(), answers_of(batch["labels"])
        strategy.prototypes, strategy.weak = {"audio": dict(zip(answers, phi.flip(0), strict=True))}, "audio"
        trainer = kit.make_trainer(tmp_path / str(alpha), [strategy], model, data)
        trainer.train()
        logged = [r["balance/pmr/loss/audio"] / alpha for r in trainer.state.log_history if "loss" in r]
        found.append(sum(logged[-2:]) / 2)
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.8 * found[0]
