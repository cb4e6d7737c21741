"""The state of an adapted model, what keeps it alive, and copies of it."""

import copy
import gc
import types
import weakref

import pytest
import torch


def test_ids_that_are_remembered_keep_no_model_alive(tiny, batch):
    model = tiny.adapted()
    ref = weakref.ref(model.get_base_model())
    model.get_input_embeddings()(batch.input_ids)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("name", ["forward", "generate"])
def test_a_method_of_the_instance_is_called_and_stays_after_unload(tiny, batch, name):
    base = tiny.backbone()
    calls = []

    def own(self, *args, **kwargs):
        calls.append(kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    method = types.MethodType(own, base)
    setattr(base, name, method)
    model = tiny.adapted(backbone=base)
    run = model if name == "forward" else model.generate
    with torch.no_grad():
        run(**batch.kwargs())
    assert len(calls) == 1
    assert vars(model.unload())[name] is method


def test_a_copy_of_a_part_does_not_copy_the_model(tiny, batch):
    """peft copies embeddings that an adapter trains; of a second adapter's, they have the hooks of the first's."""
    model = tiny.adapted()
    base = model.get_base_model()

    def alive():
        gc.collect()
        return sum(type(found) is type(base) for found in gc.get_objects())

    before = alive()
    parts = copy.deepcopy(base.model.layers[0]), copy.deepcopy(base.get_input_embeddings())
    model.add_adapter("trained", tiny.config(modules_to_save=["embed_tokens"]))
    assert alive() == before
    model.set_adapter("trained")
    with torch.no_grad():
        embeds = base.get_input_embeddings()(batch.input_ids)
        found = model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(found, expected)
    del parts


def through_file(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize("after", ["attaching", "a forward", "training with checkpointing"])
@pytest.mark.parametrize("duplicate", [lambda model, _: copy.deepcopy(model), through_file], ids=["deepcopy", "file"])
def test_a_copy_of_the_model_is_complete_and_independent(model, tiny, batch, tmp_path, duplicate, after):
    labels = torch.where(batch.mm_token_type_ids == 0, batch.input_ids, -100)
    if after == "training with checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
        model(**batch.kwargs(), labels=labels, use_cache=False).loss.backward()
        model.zero_grad()
        model.get_base_model().disable_input_require_grads()  # a local function of transformers', which no pickle takes
    with torch.no_grad():
        expected = None if after == "attaching" else model.eval()(**batch.kwargs()).logits
        other = duplicate(model, tmp_path)
        expected = model(**batch.kwargs()).logits if expected is None else expected
        assert torch.equal(other(**batch.kwargs()).logits, expected)
        # Each knows its own settings and layers only.
        other.base_model.merge_adapter()
        for parameter in other.parameters():
            parameter.zero_()
        assert other(**batch.kwargs()).logits.abs().max() == 0
        assert torch.equal(model(**batch.kwargs()).logits, expected)
        with other.disable_adapter():
            assert torch.equal(model(**batch.kwargs()).logits, expected)
    # A copy trains with its own checkpointing, and leaves the original without gradients.
    other = duplicate(model, tmp_path)
    other.gradient_checkpointing_enable()
    other.train()(**batch.kwargs(), labels=labels, use_cache=False).loss.backward()
    theirs = tiny.gradients(other)
    assert theirs
    assert not tiny.gradients(model)
    model.train()(**batch.kwargs(), labels=labels, use_cache=False).loss.backward()
    for name, gradient in tiny.gradients(model).items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)
