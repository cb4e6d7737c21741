"""MokA and LoRA on one backbone, one after the other and nested."""

import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from moka.adapter import MokaLinear
from moka.errors import MokaError


def lora(**overrides):
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**values, **overrides})


def bare_logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lora_model(tiny):
    torch.manual_seed(11)
    return get_peft_model(tiny.backbone(), lora())


@pytest.mark.parametrize("ending", ["merge_and_unload", "unload"])
def test_lora_then_moka(tiny, batch, ending):
    backbone = getattr(lora_model(tiny), ending)()
    before = bare_logits(backbone, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing of LoRA is left that peft could warn of
        model = tiny.adapted(backbone=backbone)
    assert (tiny.logits(model, batch) - before).abs().max() > 0.05
    assert not any("lora" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, batch), before)
    assert (before - bare_logits(tiny.backbone(), batch)).abs().max() < (1e-6 if ending == "unload" else 10)


@pytest.mark.parametrize("ending", ["delete and unload", "unload", "merge_and_unload"])
def test_moka_then_a_saved_lora(tiny, batch, tmp_path, quiet, ending):
    other = lora_model(tiny)
    other.save_pretrained(tmp_path)
    model = tiny.adapted()
    if ending == "delete and unload":
        model.delete_adapter("default")
    backbone = model.merge_and_unload() if ending == "merge_and_unload" else model.unload()
    assert not any(isinstance(m, MokaLinear) for m in backbone.modules())
    assert "forward" not in vars(backbone)
    bare = bare_logits(backbone, batch)
    loaded = PeftModel.from_pretrained(backbone, tmp_path)
    with_lora = bare_logits(loaded, batch)
    assert (with_lora - bare).abs().max() > 0.05
    if ending != "merge_and_unload":
        assert torch.equal(with_lora, bare_logits(other, batch))


def test_one_peft_model_has_one_kind(tiny, batch, model):
    before = tiny.logits(model, batch)
    with pytest.raises(ValueError, match="Cannot combine"):
        model.add_adapter("lora", lora())
    assert set(model.peft_config) == {"default"}
    assert torch.equal(tiny.logits(model, batch), before)
    other = lora_model(tiny)
    with pytest.raises(ValueError, match="Cannot combine"):
        other.add_adapter("moka", tiny.config())
    assert not any(isinstance(m, MokaLinear) for m in other.modules())


own_verbs = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own verbs need peft {MIN_PEFT_VERSION}",
)
LAST = {"target_modules": ["layers.1.mlp.down_proj"]}


def nested(tiny, order):
    """Both on the last linear layer before the norm, where updates add up exactly."""
    plain = tiny.backbone()
    torch.manual_seed(11)
    for kind in order:
        plain.add_adapter(lora(**LAST) if kind == "lora" else tiny.config(**LAST), adapter_name=kind)
    tiny.strong_(plain)
    return plain.eval()


@own_verbs
@pytest.mark.parametrize("order", [("lora", "moka"), ("moka", "lora")], ids="-".join)
def test_nested_through_transformers(tiny, batch, order):
    plain = nested(tiny, order)
    layer, seen = plain.model.layers[1].mlp.down_proj, []
    layer.register_forward_hook(lambda m, args, y: seen.append(y))
    for names in (["lora"], ["moka"], ["lora", "moka"]):
        plain.set_adapter(names)
        tiny.logits(plain, batch)
        grads = {n for n, p in plain.named_parameters() if p.requires_grad}
        assert {"moka" if "moka_" in n else "lora" for n in grads} == set(names)
    plain.disable_adapters()
    assert torch.equal(tiny.logits(plain, batch), bare_logits(tiny.backbone(), batch))
    a, b, both, none = seen
    tiny.same(both - none, (a - none) + (b - none))
    assert min((a - none).abs().max(), (b - none).abs().max()) > 0.05
    plain.enable_adapters()

    # Merging either kind, layer by layer as peft does, and back.
    plain.set_adapter(["lora", "moka"])
    before = tiny.logits(plain, batch)
    tuners = [m for m in plain.modules() if hasattr(m, "merge") and hasattr(m, "merged_adapters")]
    assert len(tuners) == 2
    for tuner in tuners:
        tuner.merge()
    tiny.same(tiny.logits(plain, batch), before)
    for tuner in tuners:
        tuner.unmerge()
    tiny.same(tiny.logits(plain, batch), before)

    # Deleting one leaves the other.
    plain.set_adapter(["moka"])
    only_moka = tiny.logits(plain, batch)
    plain.set_adapter(["lora", "moka"])
    plain.delete_adapter("lora")
    plain.set_adapter("moka")
    tiny.same(tiny.logits(plain, batch), only_moka)
    plain.delete_adapter("moka")
    tiny.same(tiny.logits(plain, batch), bare_logits(tiny.backbone(), batch))


@own_verbs
@pytest.mark.parametrize("order", [("lora", "moka"), ("moka", "lora")], ids="-".join)
def test_nested_adapters_are_saved_one_by_one(tiny, batch, tmp_path, order):
    plain = nested(tiny, order)
    plain.set_adapter("moka")
    expected = tiny.logits(plain, batch)
    plain.save_pretrained(tmp_path)
    if order[-1] == "lora":  # as for LoRA inside another: the names say where the inner one sat
        with pytest.raises(MokaError, match="lacks"):
            PeftModel.from_pretrained(tiny.backbone(), tmp_path)
        return
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path)
    assert loaded.peft_config["default"].peft_type == "MOKA"
    tiny.same(tiny.logits(loaded, batch), expected)
