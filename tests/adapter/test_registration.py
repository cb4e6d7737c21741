"""``PeftType.MOKA`` is there after an import, once, in any process; adapted models travel between processes."""

import copy
import pickle
import subprocess
import sys
import textwrap

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import moka
from moka.adapter import MokaModel

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.kwargs(*ROUTED)).logits


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


def test_peft_stays_as_it_is_without_moka():
    assert in_a_fresh_process("import peft; print('MOKA' in peft.PeftType.__members__)") == ["False"]


def test_deepcopy_is_independent(model, tiny, batch):
    before = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), before)
    tiny.strong_(model, seed=9)
    assert torch.equal(logits(twin, batch), before)
    assert not torch.equal(logits(model, batch), before)
    ids = batch.kwargs(*ROUTED)
    twin.delete_adapter("default")  # its hooks and layers are its own
    tiny.strong_(model)
    assert torch.equal(logits(model, batch), before)
    again = copy.deepcopy(model)
    assert torch.equal(again.generate(**ids, max_new_tokens=4), model.generate(**ids, max_new_tokens=4))
    model.unload()
    assert torch.equal(logits(again, batch), before)


def test_a_copy_made_inside_a_block_is_not_in_the_block(model, batch):
    with moka.routing(model, **batch.kwargs(*ROUTED[1:])):
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    row = batch.row(0)
    for one in (twin, again):
        assert torch.equal(logits(one, row), logits(model, row))
        assert torch.equal(one(row.input_ids).logits, model(row.input_ids).logits)


def test_pickle_in_a_process_that_has_not_imported_moka(model, batch, tmp_path):
    model.train()
    model(**batch.kwargs(*ROUTED), labels=batch.input_ids).loss.backward()
    model.zero_grad()
    model.eval()
    expected = logits(model, batch)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), expected)
    torch.save({"model": model, "ids": batch.kwargs(*ROUTED), "expected": expected}, tmp_path / "full.pt")
    in_a_fresh_process(
        f"""
        import torch
        saved = torch.load({str(tmp_path / "full.pt")!r}, weights_only=False)
        with torch.no_grad():
            assert torch.equal(saved["model"](**saved["ids"]).logits, saved["expected"])
        """
    )
