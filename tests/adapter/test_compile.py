"""``torch.compile``: the layers are one graph; how many tokens interact depends on the data and is settled before it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import moka

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_whole_model_is_one_graph(tiny, batch, merged):
    model = tiny.adapted()
    if merged:
        model.merge_adapter()
    with torch.no_grad():
        expected = model(**batch.kwargs(*ROUTED), use_cache=False).logits
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        got = compiled(**batch.kwargs(*ROUTED), use_cache=False).logits
    torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    assert counter.op_count > 14 * 3  # at least the base layer's product, A's and B's, in every adapted layer


@pytest.mark.parametrize("other", [["q q q i i t t a t t", "t q i i q q"], ["t t q q t t"]], ids=["media", "text"])
def test_other_routings_of_the_compiled_model(tiny, batch, other):
    """Guards or inputs, whatever the compiler makes of a routing: no routing may be baked into the graph."""
    model = tiny.adapted()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for rows in (batch, tiny.rows(other), batch):
            expected = model(**rows.kwargs(*ROUTED), use_cache=False).logits
            torch.testing.assert_close(compiled(**rows.kwargs(*ROUTED), use_cache=False).logits, expected)
    swapped = tiny.rows()
    swapped.mm_token_type_ids = torch.where(swapped.mm_token_type_ids == 1, 3, swapped.mm_token_type_ids)
    with torch.no_grad():
        expected = model(**swapped.kwargs(*ROUTED), use_cache=False).logits
        got = compiled(**swapped.kwargs(*ROUTED), use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_full_graph_inside_a_routing_block(tiny, batch):
    """``fullgraph=True`` refuses any break: forward and backward equal those without the compiler."""
    ids = batch.kwargs(*ROUTED[1:])

    def train(model, run):
        with moka.routing(model, **ids):
            loss = run(
                input_ids=batch.input_ids,
                attention_mask=ids["attention_mask"],
                labels=batch.input_ids,
                use_cache=False,
            ).loss
        loss.backward()
        return tiny.gradients(model)

    model = tiny.adapted().train()
    expected = train(model, model)
    model.zero_grad()
    got = train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_blocks_compiled_one_by_one(tiny, batch):
    """Regional compilation, as accelerate does it."""
    model = tiny.adapted()
    with torch.no_grad():
        expected = model(**batch.kwargs(*ROUTED), use_cache=False).logits
        for block in model.base_model.model.model.layers:
            block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(**batch.kwargs(*ROUTED), use_cache=False).logits, expected)
