"""``PeftType.MOKA`` is there after an import, once, in any process; adapted models travel between processes."""

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import types
import weakref

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import moka
from moka.adapter import MokaModel


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_registration():
    assert PeftType("MOKA") is PeftType.MOKA
    assert PeftType.MOKA in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOKA] is moka.MokaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOKA] is MokaModel


def test_registration_is_idempotent_after_reload_and_reimport():
    out = in_a_fresh_process(
        """
        import importlib, pickle, sys
        import moka, peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        before = list(peft.PeftType)
        importlib.reload(moka.adapter)
        importlib.reload(moka.adapter._register)
        importlib.reload(moka)
        for name in [name for name in sys.modules if name.split(".")[0] == "moka"]:
            del sys.modules[name]
        import moka as again
        assert again is not moka and again.MokaConfig is not moka.MokaConfig
        assert list(peft.PeftType) == before and before[-1] == "MOKA", before
        assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.MOKA] is again.MokaConfig
        assert pickle.loads(pickle.dumps(peft.PeftType.MOKA)) is peft.PeftType.MOKA
        import torch
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = peft.get_peft_model(net, again.MokaConfig(target_modules=["0"]))
        assert isinstance(model.base_model, again.adapter.MokaModel)
        with again.routing(model, mm_token_type_ids=torch.tensor([[0, 1]]), question_mask=torch.tensor([[1, 0]])):
            print(tuple(model(torch.ones(1, 2, 4)).shape))
        """
    )
    assert "".join(out) == "(1,2,4)"


def test_a_copy_made_inside_a_block_is_not_in_the_block(tiny, model, batch):
    with moka.routing(model, **batch.ids):
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    row = batch.row(0)
    for one in (twin, again):
        assert torch.equal(tiny.logits(one, row), tiny.logits(model, row))
        assert torch.equal(one(row.input_ids).logits, model(row.input_ids).logits)


def test_pickle_in_a_process_that_has_not_imported_moka(tiny, model, batch, tmp_path):
    model.train()
    model(**batch.kwargs(), labels=batch.input_ids).loss.backward()
    model.zero_grad()
    model.eval()
    expected = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(pickle.loads(pickle.dumps(model)), batch), expected)
    torch.save({"model": model, "ids": batch.kwargs(), "expected": expected}, tmp_path / "full.pt")
    in_a_fresh_process(
        f"""
        import torch
        saved = torch.load({str(tmp_path / "full.pt")!r}, weights_only=False)
        with torch.no_grad():
            assert torch.equal(saved["model"](**saved["ids"]).logits, saved["expected"])
        """
    )


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
    tiny.same_gradients(theirs, tiny.gradients(model))
