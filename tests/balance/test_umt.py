"""UMT by hand: the teachers' features, the model's own tensors afterwards, and what is refused; single_modality."""

import json

import pytest
import torch

from moka.balance import UMT, SingleModality
from moka.balance.features import hidden_states
from moka.balance.strategy import Context
from moka.balance.umt import relative_error
from moka.errors import MokaError

from .test_pmr import run_loss

EXACT = {"abs": 1e-6, "rel": 0}


@pytest.fixture
def batch(kit, model):
    found = kit.collate(kit.make_data(model, 4, (("visual", "audio"), ("visual",))))
    found.pop("sample_ids")
    return found


@pytest.fixture
def teacher(kit, tmp_path):
    """An adapter like that of ``model`` with other values, and the folder in which it was saved."""
    made = kit.make_model()
    for name, weight in made.named_parameters():
        if "moka_" in name:
            weight.data += 0.3
    made.save_pretrained(tmp_path / "teacher")
    return made.eval(), str(tmp_path / "teacher")


def test_the_relative_error_by_hand():
    states = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    taught = torch.tensor([[[2.0, 0.0], [0.0, 5.0]], [[1.0, 1.0], [0.0, 0.0]]])
    both = torch.tensor([[True, True], [False, False]])
    # 1 / 4 and (9 + 1) / 25
    assert relative_error(states, taught, both).tolist() == pytest.approx([(0.25 + 0.4) / 2, 0.0], **EXACT)


@pytest.mark.parametrize("modality", ["visual", "audio"])
def test_the_loss_is_the_distance_to_the_teacher_with_one_modality(kit, model, batch, teacher, modality):
    other, folder = teacher
    strategy = UMT({modality: folder}, w=3.0)
    strategy.check(model)
    before = kit.weights(model)
    found, ctx = run_loss(model, strategy, batch)
    for name, weight in kit.weights(model).items():
        assert torch.equal(weight, before[name]), name
    assert ctx.forwards == 1
    hidden = "audio" if modality == "visual" else "visual"
    only, with_teacher = Context(other), Context(model)
    with only.micro_batch(batch):
        only.hide(hidden, torch.ones(4, dtype=torch.bool))
        given, block = only.visible(batch)
        with block, hidden_states(other) as taught, torch.no_grad():
            other(**given)
    with with_teacher.micro_batch(batch), hidden_states(model) as own:
        model(**batch)
        error = relative_error(own[-1], taught[-1], with_teacher.tokens_of(modality))
    assert found.item() == pytest.approx(3.0 * error.mean().item(), rel=1e-5)
    if modality == "audio":  # of two rows
        assert error[1] == error[3] == 0 < error[0]
    found.backward()
    assert any(
        p.grad[("text", "visual", "audio").index(modality)].any()
        for n, p in model.named_parameters()
        if ".moka_A." in n and p.grad is not None
    )


def test_a_model_that_is_its_own_teacher_is_not_pulled(kit, batch, tmp_path):
    """Pictures come first and read no question here, so that they are the same with sound and without."""
    model = kit.make_model(interaction="none")
    model.save_pretrained(tmp_path / "same")
    strategy = UMT({"visual": str(tmp_path / "same")})
    strategy.check(model)
    assert run_loss(model, strategy, batch)[0].item() == pytest.approx(0.0, abs=1e-8)


def test_teachers_that_do_not_fit_are_refused(kit, model, teacher, tmp_path):
    with pytest.raises(MokaError, match=r"umt: teachers is empty.*single_modality"):
        UMT()
    with pytest.raises(MokaError, match=r"umt: teachers.visual: .*nowhere has no adapter.*single_modality"):
        UMT({"visual": str(tmp_path / "nowhere")}).check(model)
    kit.make_model(r=2).save_pretrained(tmp_path / "rank")
    with pytest.raises(MokaError, match=r"teachers.audio: .*rank.*\[3, 2, 48\].*\[3, 4, 48\]"):
        UMT({"audio": str(tmp_path / "rank")}).check(model)
    settings = json.loads((tmp_path / "teacher/adapter_config.json").read_text())
    (tmp_path / "teacher/adapter_config.json").write_text(json.dumps({**settings, "alpha": 99.0}))
    with pytest.raises(MokaError, match=r"adapter.alpha is 99.0"):
        UMT({"audio": teacher[1]}).check(model)
    with pytest.raises(MokaError, match=r"umt: unknown modality 'smell'"):
        kit.make_trainer(tmp_path / "run", [UMT({"smell": teacher[1]})])


@pytest.mark.parametrize(("modality", "other"), [("visual", "audio"), ("audio", "visual")])
def test_a_run_of_one_modality_never_sees_the_others(kit, tmp_path, modality, other):
    strategy = SingleModality(modality)
    model = kit.make_model()
    before = kit.rows(model)
    data = kit.make_data(model, 16, (("visual", "audio"), ("visual",), ("audio",), ()))
    kit.make_trainer(tmp_path, [strategy], model, data, max_steps=4).train()
    row = {name: k for k, name in enumerate(("text", "visual", "audio"))}
    for name, weight in kit.rows(model).items():
        assert torch.equal(weight[row[other]], before[name][row[other]])
    assert any(not torch.equal(w[row[modality]], before[n][row[modality]]) for n, w in kit.rows(model).items())


@pytest.mark.parametrize("modality", ["", "text"])
def test_a_run_of_no_modality_is_refused(modality):
    with pytest.raises(MokaError, match="single_modality: modality"):
        SingleModality(modality)


def test_the_heavier_the_nearer_to_the_teacher(kit, tmp_path):
    """Mean distance over the last two of 16 steps, by weight; the teacher was trained for longer, on the picture only."""
    teacher = kit.make_model()
    kit.make_trainer(tmp_path / "run", [SingleModality("visual")], teacher, max_steps=16).train()
    teacher.save_pretrained(tmp_path / "teacher")
    found = []
    for w in (0.01, 1.0, 100.0):
        trainer = kit.make_trainer(tmp_path / str(w), [UMT({"visual": str(tmp_path / "teacher")}, w=w)], max_steps=16)
        trainer.train()
        logged = [r["balance/umt/visual"] / w for r in trainer.state.log_history if "balance/umt/visual" in r]
        found.append(sum(logged[-2:]) / 2)
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.8 * found[0]
