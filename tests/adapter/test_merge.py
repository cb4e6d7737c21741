"""Merging puts the text path into the weight; no output changes, for any token."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import moka
from moka.adapter import MokaLinear
from moka.adapter.config import DEFAULT_TARGETS


def weights(model):
    return {name: p.clone() for name, p in model.named_parameters() if "moka_" not in name}


def changed(before, model):
    return sorted(name for name, p in model.named_parameters() if "moka_" not in name and not p.equal(before[name]))


@pytest.mark.parametrize("adapt", [None, ["text"], ["visual"], ["text", "audio"], ["visual", "audio"]], ids=str)
@pytest.mark.parametrize("share_b", [True, False], ids=["one B", "own B"])
def test_merge_changes_no_output_and_unmerge_restores_the_weight(tiny, batch, share_b, adapt):
    """Text, media and padding, in batches with padding and without, and the media's gradient-free residual."""
    full = batch.row(0)  # no padding
    text = tiny.rows(["t t q", "q q"])
    for position, interaction in itertools.product(("output", "input"), ("question", "none", "reversed", "mean")):
        settings = {"share_b": share_b, "adapt": adapt, "scale_position": position, "interaction": interaction}
        model = tiny.adapted(**settings)
        before = weights(model)
        plain = [tiny.logits(model, rows) for rows in (batch, full, text)]
        with model.disable_adapter():
            assert (tiny.logits(model, batch) - plain[0]).abs().max() > 0.05
        model.merge_adapter()
        assert len(changed(before, model)) == (0 if adapt and "text" not in adapt else 14)
        for rows, expected in zip((batch, full, text), plain, strict=True):
            torch.testing.assert_close(tiny.logits(model, rows), expected, atol=1e-4, rtol=1e-4, msg=str(settings))
        model.unmerge_adapter()
        for name, weight in before.items():
            torch.testing.assert_close(model.get_parameter(name), weight, atol=1e-6, rtol=1e-6)
        tiny.same(tiny.logits(model, batch), plain[0])


def test_text_merged_adapter_on_its_backbone_equals_the_live_one(tiny, batch):
    """The two parts that `moka merge` writes: the backbone with the text path, and the adapter that knows of it."""
    live = tiny.adapted(dropout=0.5)
    expected = tiny.logits(live, batch)
    with pytest.warns(UserWarning, match="merge_and_unload"):
        backbone = copy.deepcopy(live).merge_and_unload()
    model = tiny.adapted(backbone=backbone, text_merged=True, dropout=0.5)
    for rows in (batch, batch.row(0), tiny.rows(["t t q", "q q"])):
        tiny.same(tiny.logits(model, rows), tiny.logits(live, rows))
    before = weights(model)
    model.merge_adapter()
    assert changed(before, model) == []
    tiny.same(tiny.logits(model, batch), expected)
    model.unmerge_adapter()
    assert changed(before, model) == []


def test_merged_outputs_know_no_dropout(tiny, batch):
    """The merged text path has none, so the residual that media tokens keep must not have any either."""
    model = tiny.adapted(dropout=0.5)
    before = tiny.logits(model, batch)
    model.merge_adapter()
    tiny.same(tiny.logits(model.train(), batch), before)


def test_merge_and_unload_keeps_the_text_path_and_names_what_is_lost(model, tiny):
    text, media = tiny.rows(["t t q q q", "q t"]), tiny.rows(["i i q q"])  # with padding, which is text
    with_text, with_media = tiny.logits(model, text), tiny.logits(model, media)
    with pytest.warns(UserWarning, match="merge_and_unload.*'default'.*visual, audio"):
        bare = model.merge_and_unload()
    assert_bare(bare)
    ids = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    tiny.same(bare(**ids).logits, with_text)
    assert (bare(media.input_ids).logits - with_media).abs().max() > 0.05


def assert_bare(backbone):
    assert not any(isinstance(module, MokaLinear) for module in backbone.modules())
    for module in backbone.modules():
        assert not any(name.startswith("moka") or name in ("forward", "generate") for name in vars(module))
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert "moka" not in repr(backbone)
    assert not hasattr(backbone, "peft_config")


def test_merge_and_unload_of_a_text_adapter_is_silent(tiny):
    for settings in ({"modalities": {"text": [0]}, "modality_token_ids": {}}, {"adapt": ["text"]}):
        model = tiny.adapted(**settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.merge_and_unload()


def test_unload_gives_the_backbone_back(model, tiny, batch):
    original = tiny.backbone()
    backbone = model.unload()
    assert_bare(backbone)
    assert all(p.equal(original.get_parameter(name)) for name, p in backbone.named_parameters())
    again = tiny.adapted(backbone=backbone)
    assert torch.equal(tiny.logits(again, batch), tiny.logits(tiny.adapted(), batch))


def test_disabling_a_merged_adapter_gives_the_backbone(model, tiny, batch):
    ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    bare = tiny.backbone()(**ids).logits
    model.merge_adapter()
    with model.disable_adapter():
        tiny.same(tiny.logits(model, batch), bare)


def test_a_merged_adapter_that_is_not_active_keeps_its_residual(model, tiny, batch):
    """Merging fixes what the model computes; media tokens must not lose their part of it."""
    model.add_adapter("other", tiny.config(target_modules=["down_proj"]))
    tiny.strong_(model, seed=8)
    model.set_adapter("other")
    expected = tiny.logits(model, batch)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["other"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.merged_adapters == ["other"]
    # down_proj runs only "other", the rest runs "default": turn that off to compare.
    for module in model.modules():
        if isinstance(module, MokaLinear) and not module.merged:
            module.set_adapter([])
    tiny.same(tiny.logits(model, batch), expected)


@pytest.mark.parametrize("way", ["load_adapter", "load_state_dict"])
def test_loading_into_a_merged_adapter_is_refused(model, tiny, batch, tmp_path, way):
    """Unmerging would take the new text path out of weights that contain the old one (peft#3581)."""
    other = tiny.strong_(tiny.adapted(), seed=9)
    other.save_pretrained(tmp_path)
    before, expected = weights(model), tiny.logits(model, batch)
    model.merge_adapter()
    with pytest.raises(moka.MokaError, match=r"'default'.*unmerge_adapter"):
        model.load_adapter(tmp_path, "default") if way == "load_adapter" else model.load_state_dict(other.state_dict())
    tiny.same(tiny.logits(model, batch), expected)
    model.unmerge_adapter()
    for name, weight in before.items():
        torch.testing.assert_close(model.get_parameter(name), weight, atol=1e-6, rtol=1e-6)
    model.load_adapter(tmp_path, "default")
    tiny.same(tiny.logits(model, batch), tiny.logits(other, batch))
    assert not torch.allclose(tiny.logits(other, batch), expected, atol=0.1)


def test_merging_twice_changes_nothing_more(model, batch):
    model.merge_adapter()
    merged = weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert changed(merged, model) == []


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=64, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("share_b", [True, False])
def test_conv1d(gpt2, tiny, batch, share_b):
    """GPT-2's layers have their weight transposed, in x out."""
    settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "share_b": share_b}
    model = tiny.adapted(backbone=copy.deepcopy(gpt2), **settings)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer.base_layer, Conv1D)
    assert layer.moka_A["default"].weight.shape == (3, 4, 32)
    assert layer.moka_B["default"].weight.shape[-2:] == (96, 4)
    before = tiny.logits(model, batch)
    assert (before - gpt2(batch.input_ids, attention_mask=batch.attention_mask).logits).abs().max() > 0.05
    model.merge_adapter()
    tiny.same(tiny.logits(model, batch), before)
    model.unmerge_adapter()
    for name, weight in gpt2.named_parameters():
        head, _, leaf = name.rpartition(".")
        module = model.base_model.model.get_submodule(head)
        ours = module.get_base_layer() if isinstance(module, MokaLinear) else module
        torch.testing.assert_close(getattr(ours, leaf), weight)


def lora_twin(tiny, model):
    """peft's LoRA with the text path's numbers, on the same backbone."""
    twin = get_peft_model(tiny.backbone(), LoraConfig(r=4, lora_alpha=8, target_modules=sorted(DEFAULT_TARGETS)))
    state = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MokaLinear):
            state[f"base_model.model.{name}.lora_A.default.weight"] = layer.moka_A["default"].weight[0].detach()
            state[f"base_model.model.{name}.lora_B.default.weight"] = layer.moka_B["default"].weight.detach()
    assert not twin.load_state_dict(state, strict=False).unexpected_keys
    return twin.eval()


def test_weights_after_unmerging_are_bit_for_bit_those_of_lora(tiny):
    """(W + d) - d is not W in floating point; it is what peft's LoRA gives, in every bit, merged and unmerged."""
    model = tiny.adapted()
    twin = lora_twin(tiny, model)
    for verb in ("merge_adapter", "unmerge_adapter"):
        getattr(model, verb)()
        getattr(twin, verb)()
        ours, theirs = weights(model), {n: p for n, p in twin.named_parameters() if "lora_" not in n}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_merged_equals_live_within_the_dtypes_rounding(tiny, batch, kind, dtype, tolerance):
    """With an adapter as strong as the backbone; in bfloat16 both are as far (1.1e-2) from the result without rounding."""
    model = tiny.adapted(kind, backbone=tiny.backbone(kind).to(dtype), alpha=4)
    live = tiny.logits(model, batch).float()
    with model.disable_adapter():
        assert relative(tiny.logits(model, batch).float(), live) > 0.5
    model.merge_adapter()
    assert relative(tiny.logits(model, batch).float(), live) < tolerance
