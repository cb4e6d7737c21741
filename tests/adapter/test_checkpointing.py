"""Gradient checkpointing, reentrant or not, gives the gradients of no checkpointing (peft#2826, #2860)."""

import functools
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import moka

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


def checkpointed(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames the method, 5.20 has the old name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def forwards(tiny):
    """Two batches of one shape and different routings."""
    return tiny.rows(["i i a q q t", "q q i i t t"]), tiny.rows(["q t a a q i", "t i t q q a"], seed=5)


def train(model, batches, tiny, **context):
    """All forwards, then one backward; gradients and losses."""
    model.train()
    losses = []
    for batch in batches:
        losses.append(model(**batch.kwargs(), labels=batch.input_ids, use_cache=False).loss)
    sum((i + 1) * loss for i, loss in enumerate(losses)).backward()
    return tiny.gradients(model)


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(ours) == 28
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


@REENTRANT
@pytest.mark.parametrize("count", [1, 2], ids=["one forward", "two forwards"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_equal_no_checkpointing(tiny, kind, reentrant, count, when):
    batches = forwards(tiny)[:count]
    expected = train(tiny.adapted(kind), batches, tiny)
    backbone = tiny.backbone(kind)
    if when == "before":
        checkpointed(backbone, reentrant)
    model = tiny.adapted(kind, backbone=backbone)
    if when == "between":  # enabled again after a forward: the functions are new ones
        checkpointed(model, not reentrant)
        train(model, batches, tiny)
        model.zero_grad()
    if when != "before":
        checkpointed(model, reentrant)
    equal(train(model, batches, tiny), expected)


def test_the_two_routings_differ_in_their_gradients(tiny):
    """Without this difference the test above could not fail."""
    first, second = forwards(tiny)
    right = train(tiny.adapted(), [first], tiny)
    first.mm_token_type_ids, first.interaction_ids = second.mm_token_type_ids, second.interaction_ids
    wrong = train(tiny.adapted(), [first], tiny)
    assert max((right[name] - wrong[name]).abs().max() for name in right) > 1e-2


@REENTRANT
def test_ids_of_a_block_that_is_closed_before_backward(tiny, reentrant):
    batches = forwards(tiny)
    expected = train(tiny.adapted(), batches, tiny)
    model = checkpointed(tiny.adapted(), reentrant).train()
    losses = []
    for batch in batches:
        with moka.routing(model, **batch.ids):
            losses.append(model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss)
    (losses[0] + 2 * losses[1]).backward()
    equal(tiny.gradients(model), expected)


@REENTRANT
def test_generating_between_forward_and_backward_changes_no_gradient(tiny, reentrant):
    first, second = forwards(tiny)
    expected = train(tiny.adapted(), [first], tiny)
    model = checkpointed(tiny.adapted(), reentrant).train()
    loss = model(**first.kwargs(), labels=first.input_ids, use_cache=False).loss
    model.eval().generate(**second.kwargs(), max_new_tokens=2, do_sample=False)
    model.train()
    loss.backward()
    equal(tiny.gradients(model), expected)


@REENTRANT
def test_forward_without_routing_is_recomputed_without(tiny, reentrant):
    """Embeddings of unknown tokens are text in the recomputation also after routed forwards."""
    batch = forwards(tiny)[0]

    def run(model):
        model.train()
        model(**batch.kwargs(), labels=batch.input_ids, use_cache=False)
        embeds = model.get_input_embeddings().weight[batch.input_ids].detach().requires_grad_()
        with pytest.warns(UserWarning, match="A MokA layer ran without routing"):
            loss = model(inputs_embeds=embeds, labels=batch.input_ids, use_cache=False).loss
        loss.backward()
        return tiny.gradients(model)

    unknown = {"modality_token_ids": {}}
    equal(run(checkpointed(tiny.adapted(**unknown), reentrant)), run(tiny.adapted(**unknown)))


class Blocks(nn.Module):
    """A custom network that checkpoints its block itself, through torch or through the attribute."""

    def __init__(self, through_attribute, reentrant):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        own = functools.partial(checkpoint, use_reentrant=reentrant)
        self.own = None if through_attribute else own
        self._gradient_checkpointing_func = own if through_attribute else None

    def forward(self, x):
        return (self.own or self._gradient_checkpointing_func)(self.proj, x)


@REENTRANT
def test_custom_network_may_checkpoint_through_the_attribute(tiny, reentrant):
    torch.manual_seed(0)
    model = get_peft_model(Blocks(True, reentrant), tiny.config(target_modules=["proj"], task_type=None))
    layer = model.base_model.model.proj
    x = torch.randn(1, 6, 8, requires_grad=True)
    routes = [{"mm_token_type_ids": torch.tensor([ids])} for ids in ([0, 1, 1, 3, 0, 0], [3, 3, 0, 0, 1, 1])]
    question = torch.tensor([[0, 0, 0, 0, 1, 1]])

    def backward(run):
        total = 0
        for i, route in enumerate(routes):
            with moka.routing(model, **route, question_mask=question):
                total = total + (i + 1) * run(x).pow(2).sum()
        total.backward()
        grad = layer.moka_A["default"].weight.grad.clone()
        model.zero_grad()
        return grad

    straight = backward(lambda x: model(x))
    network = model.base_model.model
    network._gradient_checkpointing_func = lambda function, x: function(x)
    torch.testing.assert_close(straight, backward(lambda x: model(x)))
    assert straight.abs().max() > 0.01


def test_torchs_wrapper_around_a_block_gives_the_gradients_of_no_checkpointing(tiny):
    """accelerate's FSDP checkpoints with this wrapper."""
    batches = forwards(tiny)
    expected = train(tiny.adapted("llama"), batches, tiny)
    model = tiny.adapted("llama")
    blocks = model.get_base_model().model.layers
    for place, block in enumerate(blocks):
        blocks[place] = checkpoint_wrapper(block)
    wrapped = train(model, batches, tiny)
    equal({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in wrapped.items()}, expected)


@REENTRANT
def test_torch_checkpoint_of_its_own_is_an_error_and_no_silent_difference(tiny, reentrant):
    model = get_peft_model(Blocks(False, reentrant), tiny.config(target_modules=["proj"], task_type=None))
    types = torch.tensor([[0, 1, 1, 3, 0, 0]])
    with moka.routing(model, mm_token_type_ids=types, question_mask=types == 0):
        y = model(torch.randn(1, 6, 8, requires_grad=True))
        with pytest.raises(moka.MokaError, match=r"without the routing of its forward.*_gradient_checkpointing_func"):
            y.sum().backward()


def test_unload_leaves_the_backbone_s_own_checkpointing(tiny):
    model = checkpointed(tiny.adapted(), False)
    train(model, forwards(tiny), tiny)  # twice, so that a wrapper around a wrapper would show
    backbone = model.unload()
    functions = [m._gradient_checkpointing_func for m in backbone.modules() if hasattr(m, "gradient_checkpointing")]
    assert functions
    assert all(type(function) is functools.partial for function in functions)
