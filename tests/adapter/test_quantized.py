"""bitsandbytes 8-bit and 4-bit backbones, on the CPU: forward, backward, merging if it is asked for by name."""

import copy
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import moka
from moka.adapter import MokaLinear

bitsandbytes = pytest.importorskip("bitsandbytes")

without_merging = Version(peft.__version__) < Version("0.20")
merging = pytest.mark.skipif(without_merging, reason="with peft 0.19 there is no merging into quantised weights")

KINDS = {
    "8-bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Widths that are multiples of 64, as bitsandbytes' 4-bit kernel for the CPU wants them."""
    folder = tmp_path_factory.mktemp("backbone")
    config = copy.deepcopy(tiny.backbone().config)
    config.intermediate_size, config.num_key_value_heads = 128, 4
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def backbones(request, folder):
    """A function that gives a fresh quantised backbone."""
    settings = BitsAndBytesConfig(**KINDS[request.param])

    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"}).eval()

    return make


def near(a, b):
    """bitsandbytes rounds 4-bit scales to bfloat16 when it packs weights for inference on a CPU."""
    assert (a - b).norm() < 0.02 * b.norm()


def stored(model):
    """Quantised weights in their own order: bitsandbytes packs them otherwise for inference."""
    return {n: m.state_dict()["weight"].clone() for n, m in model.named_modules() if n.endswith("base_layer")}


def test_outputs_are_those_of_the_dequantised_backbone(tiny, backbones, batch):
    quantised = tiny.adapted(backbone=backbones())
    layers = [m for m in quantised.modules() if isinstance(m, MokaLinear)]
    assert len(layers) == 14
    assert all(type(m.get_base_layer()).__module__.startswith("bitsandbytes") for m in layers)
    plain = tiny.adapted(backbone=backbones().dequantize().float())
    out, expected = tiny.logits(quantised, batch), tiny.logits(plain, batch)
    real = batch.attention_mask.bool()
    bare = plain.unload()(batch.input_ids, attention_mask=batch.attention_mask).logits
    error = (out - expected)[real].abs().mean()
    assert error < 0.1 * (expected - bare)[real].abs().mean()


def test_training_moves_the_adapter_and_nothing_else(tiny, backbones, batch):
    model = prepare_model_for_kbit_training(backbones(), use_gradient_checkpointing=False)
    model = tiny.adapted(backbone=model).train()
    before = stored(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch.kwargs(), labels=batch.input_ids).loss
        loss.backward()
        norms = [p.grad[row].norm() for n, p in model.named_parameters() if "moka_A" in n for row in range(3)]
        assert min(norms) > 0  # every modality, in every layer
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in stored(model).items())


def test_save_and_load(tiny, backbones, batch, tmp_path):
    model = tiny.adapted(backbone=backbones())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbones(), tmp_path)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_unless_asked_for_by_name(tiny, backbones, batch, verb):
    model = tiny.adapted(backbone=backbones())
    before, expected = stored(model), tiny.logits(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning of losses if nothing was merged
        with pytest.raises(moka.MokaError, match=r"Linear\dbit" if without_merging else r"bnb \dbit.*requantize=True"):
            getattr(model, verb)()
    assert all(torch.equal(weight, before[name]) for name, weight in stored(model).items())
    near(tiny.logits(model, batch), expected)


@merging
def test_merging_by_name_warns_of_the_error_and_can_be_undone(tiny, backbones, batch):
    model = tiny.adapted(backbone=backbones())
    before, expected = stored(model), tiny.logits(model, batch)
    stored(model)  # unpacks what the forward packed, so that get_base_weight reads it right
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MokaLinear)}
    wanted = {name: m.get_base_weight().float() + m.get_delta_weight("default") for name, m in layers.items()}
    with pytest.warns(UserWarning, match=r"14 bnb \dbit weights.*weight: mean .* %") as warned:
        model.merge_adapter(requantize=True)
    share = float(str(warned[-1].message).partition("weight: mean ")[2].partition(" %")[0])
    assert 0.1 < share < 15  # 8-bit about 0.5 %, nf4 about 9 %
    assert not all(torch.equal(weight, before[name]) for name, weight in stored(model).items())
    for name, layer in layers.items():
        error = layer.get_base_weight().float() - wanted[name]
        assert error.norm() < 0.12 * wanted[name].norm()
    assert not torch.equal(tiny.logits(model, batch), expected)
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in stored(model).items())
    near(tiny.logits(model, batch), expected)


def test_dequantised_first_merges_exactly(tiny, backbones, batch):
    model = tiny.adapted(backbone=backbones().dequantize().float())
    expected = tiny.logits(model, batch)
    model.merge_adapter()
    tiny.same(tiny.logits(model, batch), expected)


@merging
def test_copies_of_a_merged_model_unmerge_as_well(tiny, backbones, batch):
    model = tiny.adapted(backbone=backbones())
    expected = tiny.logits(model, batch)
    with pytest.warns(UserWarning, match="14 bnb"):
        model.merge_adapter(requantize=True)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    near(tiny.logits(twin, batch), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients_through_8_bit_layers_are_those_of_plain_operators(tiny, batch, kind, training, threshold):
    """bitsandbytes gives a view of its own function's result, on a GPU always and on a CPU in evaluation mode."""
    backbone = tiny.backbone(kind)
    for name, module in list(backbone.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            quantised = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, module.bias is not None, False, threshold=threshold
            )
            quantised.load_state_dict(module.state_dict())
            backbone.model.layers.set_submodule(name, quantised.to("cpu"))
    model = tiny.adapted(backbone=backbone).train(training)

    def gradients():
        model.zero_grad()
        model(**batch.kwargs(), labels=batch.input_ids).loss.backward()
        return tiny.gradients(model)

    ours = gradients()
    with tiny.plain_layers(batch):
        theirs = gradients()
    assert len(ours) == 28
    for name, grad in ours.items():
        near(grad, theirs[name])
