"""The text path while ``generate`` decodes: equal to the plain layers, two products a layer, and always up to date."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moka.adapter import ops

ROUTED = ("mm_token_type_ids", "interaction_ids", "attention_mask")


def logits(model, batch, **options):
    """Logits of six greedy steps, [6, batch, vocabulary]."""
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**batch.kwargs(), **settings, **options).logits)


@pytest.mark.parametrize(
    "settings",
    [{}, {"share_b": False}, {"scale_position": "input"}, {"adapt": ["visual"]}, {"text_merged": True}],
    ids=str,
)
def test_decoding_equals_the_plain_layers(tiny, batch, settings):
    model = tiny.adapted(**settings)
    ours = logits(model, batch)
    with tiny.plain_layers():
        torch.testing.assert_close(logits(model, batch), ours, atol=1e-4, rtol=1e-4)


def test_decoding_with_two_adapters_equals_the_plain_layers(tiny, batch):
    model = tiny.adapted()
    model.add_adapter("second", tiny.config(r=2, target_modules=["q_proj", "down_proj"], share_b=False))
    tiny.strong_(model, seed=9)
    first = logits(model, batch)
    model.base_model.set_adapter(["default", "second"])
    ours = logits(model, batch)
    assert not torch.allclose(ours, first, atol=1e-2)
    with tiny.plain_layers():
        torch.testing.assert_close(logits(model, batch), ours, atol=1e-4, rtol=1e-4)


def test_nothing_is_kept_from_one_generate_to_the_next(tiny, batch):
    model = tiny.adapted()
    before = logits(model, batch)
    tiny.strong_(model, seed=4)
    changed = logits(model, batch)
    assert not torch.allclose(changed, before, atol=1e-2)
    with model.disable_adapter():
        bare = logits(model, batch)
    assert not torch.allclose(bare, changed, atol=1e-2)
    tiny.strong_(model)
    assert torch.equal(logits(model, batch), before)


CHANGES = {
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "switch": lambda model: model.set_adapter("second"),
    "merge": lambda model: model.merge_adapter(),
    "unmerge": lambda model: model.unmerge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_takes_effect(tiny, batch, change):
    """A streamer or a stopping rule may change the adapters in the middle of ``generate``."""

    def fresh():
        model = tiny.adapted()
        model.add_adapter("second", tiny.config())
        tiny.strong_(model, seed=9)
        if change == "unmerge":
            model.merge_adapter()
        return model

    def run(model):
        def changed(ids, scores):
            if ids.shape[1] == batch.input_ids.shape[1] + 3:  # after the fourth step's logits
                CHANGES[change](model)
            return scores

        return logits(model, batch, logits_processor=[changed])

    ours, plain = run(fresh()), logits(fresh(), batch)
    with tiny.plain_layers():
        torch.testing.assert_close(run(fresh()), ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[:4], plain[:4], atol=1e-4, rtol=1e-4)
    assert torch.allclose(ours[4:], plain[4:], atol=1e-3) == (change in ("merge", "unmerge"))


def test_a_decode_step_is_the_base_layers_and_two_products_each(tiny):
    prompt = tiny.rows(["t i i q q t"])

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    def of(model, tokens, **kwargs):
        with Count() as count:
            model.generate(prompt.input_ids, max_new_tokens=tokens, do_sample=False, **kwargs)
        return count.calls

    def one_step(model, **kwargs):
        calls = of(model, 3, **kwargs)
        calls.subtract(of(model, 2, **kwargs))
        return {name: calls[name] for name in ("mm", "addmm", "addmm_", "bmm", "index_select", "gather", "add")}

    model, bare = tiny.adapted(), one_step(tiny.backbone())
    assert bare["mm"] >= 14
    with_adapter = {**bare, "mm": bare["mm"] + 14, "addmm": bare["addmm"] + 14}
    assert one_step(model, **prompt.kwargs(*ROUTED)) == with_adapter
    model.merge_adapter()
    assert one_step(model, **prompt.kwargs(*ROUTED)) == bare


def test_a_replaced_forward_stays(tiny, batch):
    """accelerate moves weights between devices that way."""
    model = tiny.adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    calls = []
    own = layer.forward
    layer.forward = lambda x: calls.append(x.shape[1]) or own(x)
    model.generate(**batch.kwargs(), max_new_tokens=4, do_sample=False)
    model(**batch.kwargs())
    assert calls == [10, 1, 1, 1, 10]


def test_a_model_in_training_drops_out_while_it_decodes(tiny, batch, monkeypatch):
    model = tiny.adapted(dropout=0.5).train()
    drawn = []
    monkeypatch.setattr(ops, "draw_seed", lambda: drawn.append(1) or 7)
    model.generate(**batch.kwargs(), max_new_tokens=4, do_sample=False)
    assert len(drawn) == 4 * 8  # in the prefill and in three steps: q, k, v; o; gate, up; down of two blocks


def test_gradients_at_a_decode_position(tiny):
    model = tiny.adapted()
    prompt = tiny.rows(["t i i q q t"])
    found = []

    def scores_with_gradients(ids, scores):
        if ids.shape[1] > 6:
            with torch.enable_grad():
                loss = model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits.sum()
                found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        return scores

    with torch.no_grad():
        cache = model(**prompt.kwargs(), use_cache=True).past_key_values
    model.generate(**prompt.kwargs(), max_new_tokens=3, do_sample=False, logits_processor=[scores_with_gradients])
    assert found
    assert all(grad.abs().max() > 0 for grad in found[0][:2])
