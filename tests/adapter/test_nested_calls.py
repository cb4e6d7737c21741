"""Forwards inside forwards, and forwards that fail: each call has its own routing, and leaves none after."""

import types

import pytest
import torch

import moka


@pytest.mark.parametrize("reach", ["model", "base", "decoder"])
@pytest.mark.parametrize(
    "layouts", [["q q i i i a a t t t"] * 4, ["i q q", "t i q"]], ids=["same shape", "other shape"]
)
def test_a_forward_of_the_same_model_inside_a_forward(model, tiny, batch, layouts, reach):
    inner, base = tiny.rows(layouts, seed=9), model.get_base_model()
    target = {"model": model, "base": base, "decoder": base.model}[reach]
    with torch.no_grad():
        expected, separate = model(**batch.kwargs()).logits, target(**inner.kwargs())[0]
        found = []

        def hook(*_):
            if not found:
                found.append(None)
                found[0] = target(**inner.kwargs())[0]

        base.model.layers[0].register_forward_hook(hook)
        assert torch.equal(model(**batch.kwargs()).logits, expected)
    assert torch.equal(found[0], separate)


def test_a_forward_of_another_adapted_model_inside_a_forward(model, tiny, batch):
    other, inner = tiny.adapted("qwen2"), tiny.rows(["i q q", "t i q"], seed=9)
    with torch.no_grad():
        expected, separate = model(**batch.kwargs()).logits, other(**inner.kwargs()).logits
        found = []
        for layer in model.get_base_model().model.layers:
            layer.register_forward_hook(lambda *_: found.append(other(**inner.kwargs()).logits))
        assert torch.equal(model(**batch.kwargs()).logits, expected)
    assert len(found) == 2
    assert all(torch.equal(logits, separate) for logits in found)


def test_a_forward_that_calls_the_decoder_twice_with_other_tokens(model, tiny, batch):
    """As losses on pairs do within one replaced forward."""
    other, base = tiny.rows(["q q i i i a a t t t"] * 4, seed=9), model.get_base_model()
    with torch.no_grad():
        expected = [model(**rows.kwargs()).logits for rows in (batch, other)]

        def both(self, **kwargs):
            return [self.lm_head(self.model(**rows)[0]) for rows in (kwargs, other.kwargs())]

        base.forward = types.MethodType(both, base)
        found = model(**batch.kwargs())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, moka.MokaError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("verb", ["forward", "generate", "base", "decoder"])
def test_an_exception_leaves_no_routing_after(model, tiny, batch, error, verb):
    base = model.get_base_model()
    run = {"forward": model, "generate": model.generate, "base": base, "decoder": base.model}[verb]
    layer, x = base.model.layers[0].self_attn.q_proj, torch.randn(*batch.input_ids.shape, 64)
    other = tiny.rows(["q q i i i a a t t t"] * 4, seed=9)

    def fail(*_):
        raise error("stopped")

    with torch.no_grad():
        expected = base.model(**other.kwargs())[0]
        if error is moka.MokaError:  # a forward that is refused
            with pytest.raises(error, match=r"mm_token_type_ids .*\[4, 9\]"):
                run(**{**batch.kwargs(), "mm_token_type_ids": batch.mm_token_type_ids[:, 1:]})
        else:
            handle = base.model.layers[1].register_forward_hook(fail)
            with pytest.raises(error, match="stopped"):
                run(**batch.kwargs())
            handle.remove()
        # The decoder, and a layer outside of any forward: neither finds what the failed forward knew.
        assert torch.equal(base.model(**other.kwargs())[0], expected)
        # torch runs no hook after a keyboard interrupt, so that only calls of the PeftModel can clean up after one.
        if error is not KeyboardInterrupt or verb in ("forward", "generate"):
            with pytest.warns(UserWarning, match="mm_token_type_ids"):
                layer(x)
