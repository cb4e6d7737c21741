"""The peft citizen: every verb that works for LoRA works for MokA."""

import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import moka

LAYERS = 14
installed = Version(peft.__version__)


def test_parameters_are_stacked_and_nothing_else_is_saved(model, tiny):
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    assert isinstance(layer.moka_A, nn.ModuleDict)
    assert layer.moka_A["default"].weight.shape == (3, 4, 64)
    assert layer.moka_B["default"].weight.shape == (32, 4)
    apart = tiny.adapted(share_b=False).base_model.model.model.layers[0].self_attn.k_proj
    assert apart.moka_B["default"].weight.shape == (3, 32, 4)
    new = {name for name in model.state_dict() if ".base_layer." not in name}
    own = {f"base_model.model.{name}" for name in tiny.backbone().state_dict()}
    assert {name.split(".")[-3:][0] for name in new - own} == {"moka_A", "moka_B"}
    assert all(name.endswith(".default.weight") for name in new - own)
    attributes = set(vars(layer)) | set(layer._modules) | set(layer._parameters)
    others = set(vars(nn.Linear(1, 1))) | {"base_layer", "in_features", "out_features", "kwargs"}
    others |= {"_disable_adapters", "merged_adapters", "quantization_backend", "_active_adapter"}  # peft's own
    assert {name for name in attributes - others if not name.startswith("moka_")} == set()


def test_trainable_parameters(model):
    ours = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ours == {name for name, _ in model.named_parameters() if "moka_" in name}
    per_layer = 3 * 4 * 64 + 4 * 64  # q, o
    expected = 2 * (2 * per_layer + 2 * (3 * 4 * 64 + 4 * 32) + 2 * (3 * 4 * 64 + 4 * 96) + 3 * 4 * 96 + 4 * 64)
    trainable, everything = model.get_nb_trainable_parameters()
    assert (trainable, everything) == (expected, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("name", ["default", "mine", "moka", "q_proj", "a-b_c"])
@pytest.mark.parametrize("lean", [False, True], ids=["", "low_cpu_mem_usage"])
def test_save_and_load_under_any_name(model, tiny, batch, tmp_path, name, lean):
    model.save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), moka.MokaConfig)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * LAYERS
    assert all(key.endswith((".moka_A.weight", ".moka_B.weight")) for key in saved)
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path, adapter_name=name, low_cpu_mem_usage=lean)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    kept = get_peft_model_state_dict(loaded, adapter_name=name)
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[key], saved[key]) for key in saved)


def test_several_adapters(model, tiny, batch, tmp_path):
    model.save_pretrained(tmp_path)
    first = tiny.logits(model, batch)
    # Another rank, other layers, other settings: the routing must serve each.
    model.add_adapter(
        "second", tiny.config(r=2, target_modules=["o_proj"], interaction="mean", adapt=["audio", "text"])
    )
    tiny.strong_(model, seed=5)
    assert torch.equal(tiny.logits(model, batch), tiny.logits(model, batch))
    assert model.active_adapters == ["default"]
    model.load_adapter(str(tmp_path), "third")
    model.set_adapter("third")
    torch.testing.assert_close(tiny.logits(model, batch), first)
    model.set_adapter("second")
    second = tiny.logits(model, batch)
    own = tiny.config(r=2, target_modules=["o_proj"], interaction="mean", adapt=["audio", "text"])
    other = get_peft_model(tiny.backbone(), own)
    state = {k.replace(".second.", ".default."): v for k, v in model.state_dict().items() if ".second." in k}
    other.load_state_dict(state, strict=False)
    torch.testing.assert_close(tiny.logits(other.eval(), batch), second)
    assert (second - first).abs().max() > 0.05
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    model.set_adapter("third")
    torch.testing.assert_close(tiny.logits(model, batch), first)
    status = model.get_model_status()
    assert (status.active_adapters, sorted(status.available_adapters)) == (["third"], ["default", "third"])
    assert (status.num_adapter_layers, status.enabled, status.peft_types["third"]) == (LAYERS, True, "MOKA")


@pytest.mark.skipif(installed < Version("0.21"), reason="peft before 0.21 does not save trained biases")
def test_biases_are_trained_and_saved_when_asked(tiny, batch, tmp_path):
    model = tiny.adapted("qwen2", bias="moka_only")
    biases = {name for name, p in model.named_parameters() if p.requires_grad and "moka_" not in name}
    assert len(biases) == 6
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).add_(0.2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.backbone("qwen2"), tmp_path)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


@pytest.mark.skipif(installed >= Version("0.21"), reason="peft 0.21 saves trained biases")
@pytest.mark.parametrize("bias", ["moka_only", "all"])
def test_biases_that_would_not_be_saved_are_refused(tiny, bias):
    backbone = tiny.backbone("qwen2")
    before = [(name, type(module)) for name, module in backbone.named_modules()]
    with pytest.raises(moka.MokaError, match=f"bias.*{bias}.*0.21"):
        get_peft_model(backbone, tiny.config(bias=bias))
    assert [(name, type(module)) for name, module in backbone.named_modules()] == before


def test_rank_and_alpha_patterns(tiny, batch, tmp_path):
    model = tiny.adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.moka_A["default"].weight.shape == (3, 2, 64)
    assert attention.q_proj.moka_scaling["default"] == pytest.approx(3 / 2**0.5)
    assert attention.k_proj.moka_scaling["default"] == 8 / 4**0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(
        tiny.logits(PeftModel.from_pretrained(tiny.backbone(), tmp_path), batch), tiny.logits(model, batch)
    )


def loaded_by_transformers(tiny, model, folder):
    """A plain transformers model into which ``model``'s adapter was loaded."""
    model.save_pretrained(folder)
    plain = tiny.backbone()
    plain.load_adapter(str(folder), adapter_name="mine")
    return plain


def test_transformers_own_load_adapter(model, tiny, batch, tmp_path):
    plain = loaded_by_transformers(tiny, model, tmp_path)
    assert torch.equal(tiny.logits(plain, batch), tiny.logits(model, batch))
    with moka.routing(
        plain, **batch.kwargs("mm_token_type_ids", "interaction_ids")
    ):  # its own generate does not know these arguments
        new = plain.generate(**batch.text, max_new_tokens=3)
    assert torch.equal(new, model.generate(**batch.kwargs(), max_new_tokens=3))


@pytest.mark.skipif(
    installed < Version(MIN_PEFT_VERSION), reason=f"transformers' other own verbs need peft {MIN_PEFT_VERSION}"
)
def test_transformers_own_adapter_verbs(model, tiny, batch, tmp_path):
    """On a plain transformers model, which is saved and loaded again."""
    bare = tiny.backbone()(batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = loaded_by_transformers(tiny, model, tmp_path / "peft")
    expected = tiny.logits(plain, batch)
    plain.disable_adapters()
    assert torch.equal(tiny.logits(plain, batch), bare)
    plain.enable_adapters()
    plain.add_adapter(tiny.config(), adapter_name="second")
    assert plain.active_adapters() == ["second"]
    tiny.strong_(plain, seed=6)
    second = tiny.logits(plain, batch)
    assert not torch.allclose(second, expected, atol=1e-2)
    plain.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(tiny.backbone(), tmp_path / "own")
    assert torch.equal(tiny.logits(again, batch), second)
    plain.delete_adapter("second")
    plain.delete_adapter("mine")
    assert torch.equal(tiny.logits(plain, batch), bare)


class Seeing(nn.Module):
    """A network with a part that is trained in full and has no weight of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(self.encoder(x))


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
def test_unloading_keeps_a_full_encoder_of_modules_to_save(tiny, verb):
    settings = {"target_modules": ["proj"], "modules_to_save": ["encoder"], "modalities": {"text": [0]}}
    model = get_peft_model(Seeing(), tiny.config(task_type=None, modality_token_ids=None, **settings)).eval()
    with torch.no_grad():
        model.base_model.model.encoder.modules_to_save["default"][0].weight.add_(0.5)
        x = torch.randn(2, 5, 8)
        expected = model(x)
        bare = getattr(model, verb)()
        assert type(bare.encoder) is nn.Sequential
        if verb == "merge_and_unload":
            torch.testing.assert_close(bare(x), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, folder, config: PeftModel.from_pretrained(model, folder),
        lambda model, folder, config: PeftModel.from_pretrained(model, folder, adapter_name="second"),
        lambda model, folder, config: get_peft_model(model, config),
        lambda model, folder, config: get_peft_model(model.base_model, config),
    ],
    ids=["from_pretrained", "under another name", "get_peft_model", "over the tuner"],
)
def test_a_model_that_is_wrapped_twice(model, tiny, batch, tmp_path, wrap):
    model.save_pretrained(tmp_path)
    before = model(**batch.kwargs()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of a second adapter
        with pytest.raises(moka.MokaError, match=r"model.*PeftModel.*load_adapter.*get_base_model"):
            wrap(model, tmp_path, tiny.config(task_type=None))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch.kwargs()).logits, before)


def test_a_configuration_completed_for_another_model(tiny):
    """Its placeholder ids are those of the first; the media of the second would be text."""
    config = tiny.config(modality_token_ids=None)
    for image in (tiny.IMAGE, tiny.IMAGE):
        backbone = tiny.backbone()
        backbone.config.image_token_id = image
        get_peft_model(backbone, config)
    backbone = tiny.backbone()
    backbone.config.image_token_id = 99
    with pytest.raises(moka.MokaError, match=r"modality_token_ids.*126.*99"):
        get_peft_model(backbone, config)
    with pytest.warns(UserWarning, match=r"modality_token_ids: 'visual' has \[126\].*\[99\]"):
        get_peft_model(backbone, tiny.config(modality_token_ids={"visual": [tiny.IMAGE]}))
