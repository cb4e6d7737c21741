"""Partial-modality inference, the maps of the interaction, and norms, checked against the definition."""

import pytest
import torch

import moka
from moka.adapter import active_modalities, gradient_norms, interaction_weights, modality_norms
from moka.adapter.context import current

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.kwargs()).logits


def hooks(model):
    """Every hook in a model by module and kind."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return {
        (name, kind): list(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds if getattr(m, kind)
    }


@pytest.fixture(autouse=True)
def nothing_stays_behind(model):
    """No hook, no call, no block."""
    before = hooks(model)
    yield
    assert hooks(model) == before
    assert (current.call, current.block) == (None, None)


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
@pytest.mark.parametrize("names", [["text"], ["visual"], ["visual", "audio"], ["audio", "text"], []], ids=str)
def test_active_modalities_are_those_of_an_adapter_that_adapts_no_other(model, tiny, batch, names, merged):
    if names:
        expected = logits(tiny.adapted(adapt=names), batch)
    else:
        with model.disable_adapter():
            expected = logits(model, batch)
    everything = logits(model, batch)
    if merged:
        model.merge_adapter()
    with active_modalities(model, names):
        tiny.same(logits(model, batch), expected)
        text = tiny.rows(["t t q"])
        bare = tiny.backbone()(text.input_ids).logits
        same_as_bare = torch.allclose(logits(model, text), bare, atol=1e-4, rtol=1e-4)
        assert same_as_bare == ("text" not in names)
    assert not torch.allclose(everything, expected, atol=1e-2)
    tiny.same(logits(model, batch), everything)


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_active_modalities_while_generating(model, tiny, batch, merged):
    settings = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = tiny.adapted(adapt=["visual"]).generate(**batch.kwargs(), **settings)
    if merged:
        model.merge_adapter()
    with active_modalities(model, ["visual"]):
        got = model.generate(**batch.kwargs(), **settings)
    tiny.same(torch.stack(got.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("names", [["visual"], "visual", ("visual", "text")])
def test_active_modalities_hold_in_a_routing_block_and_training(model, batch, names):
    given, block = batch.text, batch.ids
    with active_modalities(model, names):
        expected = logits(model, batch)
        with moka.routing(model, **block):
            torch.testing.assert_close(model(**given).logits, expected)
    with moka.routing(model, **block):
        everything = model(**given).logits
        with active_modalities(model, names):
            torch.testing.assert_close(model.train()(**given).logits, expected)
        assert not torch.allclose(everything, expected, atol=1e-2)


def test_unknown_modality(model):
    for given, names, message in [
        (model, ["vision"], r"'vision'.*\['text', 'visual', 'audio'\]"),
        (torch.nn.Linear(1, 1), [], "Linear"),
    ]:
        with pytest.raises(moka.MokaError, match=f"active_modalities.*{message}"), active_modalities(given, names):
            pass


def test_interaction_weights_are_the_softmax_of_the_definition(model, batch):
    inputs = []
    layer = model.get_submodule(FIRST)
    handle = layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    logits(model, batch)
    handle.remove()
    maps = interaction_weights(model, batch.kwargs())
    assert len(maps) == 14
    found, x, A = maps[FIRST], inputs[0], layer.moka_A["default"].weight.detach()
    rows_of = {0: 0, 1: 1, 3: 2}
    checked = 0
    for b in range(4):
        types, groups, real = batch.mm_token_type_ids[b], batch.interaction_ids[b], batch.attention_mask[b]
        media = [t for t in range(len(types)) if types[t] > 0 and groups[t] > 0 and real[t]]
        question = [t for t in range(len(types)) if types[t] == 0 and groups[t] > 0 and real[t]]
        if not media or not question:
            assert not found.weights[b].any()
            continue
        z = torch.stack([A[rows_of[int(types[t])]] @ x[b, t] for t in range(len(types))])
        expected = (z[media] @ z[question].T / 2).softmax(-1)  # r = 4
        n, k = len(media), len(question)
        assert found.query_index[b, :n].tolist() == media
        assert found.key_index[b, :k].tolist() == question
        assert found.query_mask[b].tolist() == [i < n for i in range(found.query_mask.shape[1])]
        torch.testing.assert_close(found.weights[b, :n, :k], expected, atol=1e-5, rtol=1e-4)
        checked += n
    assert checked > 5


def test_interaction_weights_of_a_batch_without_media(model, tiny):
    with pytest.raises(moka.MokaError, match=r"interaction_weights.*mm_token_type_ids"):
        interaction_weights(model, tiny.rows(["t q q"]).kwargs())


@pytest.mark.parametrize("share_b", [True, False])
def test_modality_norms_are_those_of_the_definition(tiny, batch, share_b):
    model = tiny.adapted(share_b=share_b, interaction_weight={"visual": 0.5, "audio": 2.0})
    layer, seen = model.get_submodule(FIRST), []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model, batch)
    handle.remove()
    x, out = seen[0]
    norms = modality_norms(model, batch.kwargs())
    assert len(norms) == 14
    assert set(norms[FIRST]) == {"text", "visual", "audio"}
    for row, (name, type_id) in enumerate({"text": 0, "visual": 1, "audio": 3}.items()):
        here = (batch.mm_token_type_ids == type_id) & batch.attention_mask.bool()
        own = norms[FIRST][name]
        z = x[here] @ layer.moka_A["default"].weight[row].T
        update = (out - layer.base_layer(x))[here]
        assert own.tokens == here.sum()
        assert own.z == pytest.approx(z.norm(dim=-1).mean().item(), rel=1e-4)
        assert own.update == pytest.approx(update.norm(dim=-1).mean().item(), rel=1e-3)
        assert (own.interaction > 0.1) == (name != "text")
    text = modality_norms(model, tiny.rows(["t t q"]).kwargs())[FIRST]
    assert set(text) == {"text"}
    assert text["text"].interaction == 0


def test_gradient_norms_by_modality(tiny, batch):
    model = tiny.adapted().train()
    with pytest.raises(moka.MokaError, match=r"gradient_norms.*backward"):
        gradient_norms(model)
    image_only = tiny.rows(["q q i i t t"])
    model(**image_only.kwargs(), labels=image_only.input_ids).loss.backward()
    norms = gradient_norms(model)[FIRST]
    layer = model.get_submodule(FIRST)
    assert norms["A.audio"] == 0
    assert min(norms["A.text"], norms["A.visual"], norms["B"]) > 0
    assert norms["A.visual"] == pytest.approx(layer.moka_A["default"].weight.grad[1].norm().item())
    apart = tiny.adapted(share_b=False).train()
    apart(**image_only.kwargs(), labels=image_only.input_ids).loss.backward()
    assert gradient_norms(apart)[FIRST]["B.audio"] == 0
    assert gradient_norms(apart)[FIRST]["B.visual"] > 0


def test_diagnostics_leave_training_as_it_was(model, batch):
    model.train()
    interaction_weights(model, batch.kwargs())
    modality_norms(model, batch.kwargs())
    assert all(m.training for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_forward_that_fails_leaves_nothing_after(model, batch):
    with pytest.raises(moka.MokaError, match=r"interaction_ids.*\[4, 3\]"):
        modality_norms(model, {**batch.kwargs(), "interaction_ids": torch.zeros(4, 3, dtype=torch.long)})


def test_several_active_adapters_are_refused(tiny, batch):
    model = tiny.adapted()
    model.add_adapter("second", tiny.config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(moka.MokaError, match=r"\['default', 'second'\].*set_adapter"):
        interaction_weights(model, batch.kwargs())
