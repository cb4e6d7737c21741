"""Hidden states of a forward: those between the first quarter of the blocks and the rest, of every kind of model."""

import pytest
import torch

from moka.adapter.text_decoder import decoder_blocks
from moka.balance.features import hidden_states

from ..analysis.conftest import EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_hidden_states_are_the_inputs_of_a_block_with_their_graph(name):
    make, *arguments = EXAMPLES[name]
    example = make(*arguments)
    blocks, given = decoder_blocks(example.model)[1], []
    handle = blocks[0].register_forward_hook(lambda module, args, output: given.append(output))
    with hidden_states(example.model) as found:
        example.model(**example.batch)
    handle.remove()
    output = given[0][0] if isinstance(given[0], tuple) else given[0]
    assert len(blocks) == 2
    assert torch.equal(found[0], output)
    assert found[0].shape[:2] == example.batch["input_ids"].shape
    assert found[0].requires_grad
    example.model(**example.batch)
    assert len(found) == 1  # nothing is kept outside of the block


@pytest.mark.parametrize("reentrant", [True, False])
def test_features_have_their_gradient_under_checkpointing(kit, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = kit.make_model()
        batch = kit.collate(kit.make_data(model, 2))
        batch.pop("sample_ids")
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with hidden_states(model) as found:
            loss = model(**batch).loss
        (loss + found[0].pow(2).mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
