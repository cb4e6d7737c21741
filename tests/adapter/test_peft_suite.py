"""The behaviours that peft's own suite tests for every tuner, here for MokA: custom networks, and tiny decoders."""

import copy
import io
import json
import pickle
import warnings
from collections import OrderedDict

import peft
import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

import moka
from moka.adapter import MokaLinear
from moka.errors import MokaError

TEXT = {"text": [0]}


class Net(nn.Module):
    """[batch, seq, 10] (or token ids, with an embedding) -> [batch, seq, 5]."""

    def __init__(self, kind="mlp"):
        super().__init__()
        self.emb = nn.Embedding(50, 10) if kind == "embedding" else nn.Identity()
        self.lin0 = Conv1D(20, 10) if kind == "conv1d" else nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20) if kind == "layernorm" else nn.Identity()
        self.lin1 = nn.Linear(20, 20, bias=kind != "no bias")
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.emb(x)
        x = x.to(next(self.lin1.parameters()).dtype)
        return self.head(torch.relu(self.lin1(self.norm(torch.relu(self.lin0(x))))))


class Deep(nn.Module):
    """Blocks under a name that no transformers model uses."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(OrderedDict(proj=nn.Linear(10, 10), act=nn.Tanh())) for _ in range(3)]
        self.stages = nn.ModuleList(blocks)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


TRANSFORMERS = {  # the model, its task, the head that is trained in full
    "llama": (tf.LlamaForCausalLM, "CAUSAL_LM", "lm_head"),
    "qwen2": (tf.Qwen2ForCausalLM, "CAUSAL_LM", "lm_head"),
    "gpt2": (tf.GPT2LMHeadModel, "CAUSAL_LM", "lm_head"),
    "features": (tf.LlamaModel, "FEATURE_EXTRACTION", None),
    "bert": (tf.BertModel, "FEATURE_EXTRACTION", None),
    "classes": (tf.LlamaForSequenceClassification, "SEQ_CLS", "score"),
    "token classes": (tf.Qwen2ForTokenClassification, "TOKEN_CLS", "score"),
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = {"gpt2": 8, "bert": 12}  # 14 in the other decoders, 2 in the custom networks
KINDS = ["mlp", "no bias", "conv1d", "layernorm", "embedding", *TRANSFORMERS]


def net(kind="mlp", seed=0):
    torch.manual_seed(seed)
    if kind not in TRANSFORMERS:
        return Net(kind).eval()
    model_class = TRANSFORMERS[kind][0]
    settings = {"vocab_size": 50, "pad_token_id": 0, "initializer_range": 0.2, "tie_word_embeddings": False}
    settings |= {"num_key_value_heads": 2, "num_labels": 3}
    return model_class(model_class.config_class(**SIZES, **settings)).eval()


def inputs(kind="mlp"):
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding" or kind in TRANSFORMERS:
        return torch.randint(0, 50, (2, 6), generator=generator)
    return torch.randn(2, 6, 10, generator=generator)


def config(**overrides):
    values = {"r": 4, "alpha": 8, "dropout": 0.0, "init_weights": False, "target_modules": ["lin0", "lin1"]}
    return moka.MokaConfig(**{**values, "modalities": TEXT, **overrides})


def config_of(kind, **overrides):
    """Return the settings for one row of the table."""
    if kind not in TRANSFORMERS:
        return config(**overrides)
    return config(**{"target_modules": None, "task_type": TRANSFORMERS[kind][1], **overrides})


def wrap(tiny, kind="mlp", **overrides):
    return tiny.strong_(get_peft_model(net(kind), config_of(kind, **overrides))).eval()


def forward(model, kind="mlp"):
    result = model(inputs(kind))
    return result[0] if kind in TRANSFORMERS else result


def out(model, kind="mlp"):
    with torch.no_grad():
        return forward(model, kind)


def heads(kind):
    """Return what ``modules_to_save`` names in this row."""
    head = TRANSFORMERS[kind][2] if kind in TRANSFORMERS else "head"
    return None if head is None else [head]


def step(model, kind="mlp"):
    """One step of plain SGD over the trainable parameters."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    forward(model, kind).float().pow(3).mean().backward()  # a sum of squares is constant after a norm
    optimizer.step()
    model.eval()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def close(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_survives_dict_json_and_folder(tmp_path):
    given = config(
        exclude_modules=["head"],
        modalities={"text": [0], "point": [4]},
        interaction_weight={"point": 0.5},
        rank_pattern={"lin0": 2},
        modules_to_save=["head"],
        task_type="FEATURE_EXTRACTION",
        revision="abc",
    )
    assert moka.MokaConfig.from_peft_type(**json.loads(json.dumps(given.to_dict(), default=list))) == given
    given.save_pretrained(tmp_path)
    raw = moka.MokaConfig.from_json_file(tmp_path / "adapter_config.json")
    assert set(raw["target_modules"]) == {"lin0", "lin1"}
    for read in (PeftConfig, moka.MokaConfig):
        assert read.from_pretrained(tmp_path).to_dict() == given.to_dict()
    assert copy.deepcopy(given) == given
    assert pickle.loads(pickle.dumps(given)) == given


def test_unknown_fields_of_a_config_are_left_out_with_a_warning(tmp_path):
    config().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_the_future": 3}))
    with pytest.warns(UserWarning, match="of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == moka.MokaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "lin.*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": "lin.*", "layers_pattern": "stages"}, "layers_pattern"),
        ({"layers_pattern": "stages"}, "layers_pattern"),
        ({"target_modules": ["emb"]}, "Embedding"),
        ({"target_modules": ["norm"]}, "LayerNorm|Identity"),
        ({"target_modules": []}, "target_modules"),
        ({"exclude_modules": ["lin0", "lin1"]}, "exclude"),
        ({"target_modules": ["lin0", "emb"]}, "Embedding"),
        ({"modules_to_save": ["haed"]}, "haed"),
        ({"target_modules": None}, "target_modules"),
    ],
)
def test_settings_that_cannot_work_leave_the_network_as_it_was(settings, message):
    base = net("embedding")
    with pytest.raises(MokaError, match=message):
        get_peft_model(base, config(**settings))
    assert not any(isinstance(m, MokaLinear) for m in base.modules())
    assert not any(m._forward_pre_hooks for m in base.modules())
    get_peft_model(base, config())


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
def test_save_and_load(tiny, tmp_path, kind, lean):
    model = wrap(tiny, kind, modules_to_save=heads(kind))
    step(model, kind)
    expected = out(model, kind)
    assert (expected - out(net(kind), kind)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(kind), tmp_path, low_cpu_mem_usage=lean)
    assert torch.equal(out(loaded, kind), expected)
    other = {"r": 2} if kind in TRANSFORMERS else {"target_modules": ["lin0"]}
    loaded = get_peft_model(net(kind), config_of(kind, **other), adapter_name="first")
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=lean)
    loaded.set_adapter("second")
    assert torch.equal(out(loaded.eval(), kind), expected)


def test_save_selected_adapters_and_only_on_the_main_process(tiny, tmp_path):
    model = wrap(tiny)
    model.add_adapter("b", config(r=2))
    model.add_adapter("c", config(r=3))
    model.save_pretrained(tmp_path / "some", selected_adapters=["default", "c"])
    files = {str(f.relative_to(tmp_path / "some")) for f in (tmp_path / "some").rglob("adapter_model.safetensors")}
    assert files == {"adapter_model.safetensors", "c/adapter_model.safetensors"}
    assert PeftConfig.from_pretrained(tmp_path / "some" / "c").r == 3
    with pytest.raises(ValueError, match="unknown"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["unknown"])
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not list((tmp_path / "rank1").rglob("adapter_model*"))
    assert check_if_peft_model(str(tmp_path / "some"))


def test_loading_torch_files_as_lora_does(tiny, tmp_path):
    model = wrap(tiny)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(out(PeftModel.from_pretrained(net(), tmp_path)), out(model))


def test_full_model_through_pickle_torch_save_and_deepcopy(tiny):
    model = wrap(tiny)
    model.add_adapter("b", config(r=2))
    expected = out(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(out(again), expected)
        again.merge_and_unload()
        assert torch.equal(out(model), expected)


def test_state_dicts(tiny, tmp_path):
    model = wrap(tiny)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    fresh = get_peft_model(net(seed=5), config()).eval()
    fresh.load_state_dict(torch.load(tmp_path / "all.pt"))
    assert torch.equal(out(fresh), out(model))
    own = get_peft_model_state_dict(model)
    assert len(own) == 4
    other = get_peft_model(net(), config(), adapter_name="other").eval()
    result = set_peft_model_state_dict(other, own, adapter_name="other")
    assert result.unexpected_keys == []
    assert not any("moka_" in key for key in result.missing_keys)
    assert torch.equal(out(other), out(model))


def test_inject_by_state_dict(tiny):
    model = wrap(tiny, target_modules=["lin0"])
    own = {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(model).items()}
    plain = net()
    with pytest.warns(RuntimeWarning, match="lin1"):
        inject_adapter_in_model(config(), plain, state_dict=own)
    assert [name for name, m in plain.named_modules() if isinstance(m, MokaLinear)] == ["lin0"]
    set_peft_model_state_dict(plain, own)
    assert torch.equal(out(plain), out(model))


def test_embedding_layers_are_saved_when_asked(tiny, batch, tmp_path):
    model = tiny.adapted()
    model.get_base_model().resize_token_embeddings(140)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
        expected = model(**batch.kwargs()).logits
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    backbone = tiny.backbone()
    backbone.resize_token_embeddings(140)
    with torch.no_grad():
        got = PeftModel.from_pretrained(backbone, tmp_path)(**batch.kwargs()).logits
    assert torch.equal(got, expected)


def test_lean_and_meta_construction(tiny):
    lean = get_peft_model(net(), config(), low_cpu_mem_usage=True)
    adapter = {name: p for name, p in lean.named_parameters() if "moka_" in name}
    assert {p.device.type for p in adapter.values()} == {"meta"}
    set_peft_model_state_dict(lean, get_peft_model_state_dict(wrap(tiny)), low_cpu_mem_usage=True)
    assert torch.equal(out(lean.eval()), out(wrap(tiny)))
    with torch.device("meta"):
        empty = get_peft_model(Net(), config())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(wrap(tiny).state_dict())
    assert torch.equal(out(empty.eval()), out(wrap(tiny)))


def test_verbs_for_lora_only_are_refused(tiny, tmp_path):
    model = wrap(tiny)
    model.save_pretrained(tmp_path)
    before = out(model)
    with pytest.raises(ValueError, match="only supports LORA but MOKA"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(ValueError, match="MOKA"):
        get_peft_model(net(), config(), mixed=True)
    with pytest.raises(MokaError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert not model.supports_lora_conversion()
    assert torch.equal(out(model), before)


# --- several adapters ------------------------------------------------------------------------------------------------


def test_deleting_adapters(tiny):
    model = wrap(tiny)
    default = out(model)
    model.add_adapter("b", config(r=2))
    model.add_adapter("c", config(target_modules=["lin0"]))
    tiny.strong_(model, seed=4)
    model.set_adapter("c")
    only_c = out(model)
    model.delete_adapter("b")
    assert torch.equal(out(model), only_c)
    assert not any(".b." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="b does not exist"):
        model.delete_adapter("b")
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("b")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("c")
    assert model.active_adapters == ["default"]
    assert (out(model) - only_c).abs().max() > 1e-3
    assert not torch.equal(out(model), default)  # strong_ drew other values
    model.delete_adapter("default")
    # peft's own wrapper asks for the active adapter, as for LoRA.
    assert torch.equal(out(model.base_model.model), out(net()))
    model.add_adapter("default", config())
    model.set_adapter("default")
    tiny.strong_(model)
    assert torch.equal(out(model), default)


def test_a_second_adapter_that_fails_changes_nothing(tiny):
    model = wrap(tiny)
    before, names = out(model), set(model.state_dict())
    for bad in (config(target_modules=["nope"]), config(target_modules=["emb"]), config(target_modules=["norm"])):
        with pytest.raises(MokaError):
            model.add_adapter("bad", bad)
        assert set(model.peft_config) == {"default"}
    assert set(model.state_dict()) == names
    assert all(set(m.moka_A) == {"default"} for m in model.modules() if isinstance(m, MokaLinear))
    assert torch.equal(out(model), before)
    model.add_adapter("good", config())


def test_mixed_batches_of_adapters_are_refused(tiny):
    model = wrap(tiny)
    with pytest.raises(MokaError, match="adapter_names"):
        model(inputs(), adapter_names=["default", "__base__"])


def test_adapters_on_different_layers(tiny):
    model = wrap(tiny, target_modules=["lin0"])
    model.add_adapter("b", config(target_modules=["lin1"]))
    tiny.strong_(model)
    status = {layer.name: layer.available_adapters for layer in model.get_layer_status()}
    assert status == {"model.lin0": ["default"], "model.lin1": ["b"]}
    first = out(model)
    model.set_adapter("b")
    second = out(model)
    assert (first - second).abs().max() > 1e-3
    merged = copy.deepcopy(model)
    merged.merge_adapter(["default", "b"])
    model.base_model.set_adapter(["default", "b"])
    close(out(merged), out(model))


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merge_unmerge_unload_after_training(tiny, kind, safe):
    model = wrap(tiny, kind)
    step(model, kind)
    expected, before = out(model, kind), weights(model)
    model.merge_adapter(safe_merge=safe)
    adapted = {name for name, module in model.named_modules() if isinstance(module, MokaLinear)}
    assert len(adapted) == LAYERS.get(kind, 2 if kind not in TRANSFORMERS else 14)
    assert changed(before, model.state_dict()) == {f"{name}.base_layer.weight" for name in adapted}
    close(out(model, kind), expected)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        close(tensor, before[name], 1e-5)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert type(merged) is type(net(kind))
    assert set(merged.state_dict()) == set(net(kind).state_dict())
    close(out(merged, kind), expected)
    bare = model.unload()
    fresh = net(kind)
    if kind in ("classes", "token classes"):  # unload keeps the trained head, which peft adds to modules_to_save
        fresh.score.load_state_dict(bare.score.state_dict())
    close(out(bare, kind), out(fresh, kind), 1e-5)
    assert not any(isinstance(m, MokaLinear) for m in bare.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_of_a_broken_adapter_leaves_every_weight(tiny, verb, value):
    """The last layer is the broken one: the first must not be merged either."""
    model = wrap(tiny)
    with torch.no_grad():
        model.base_model.model.lin1.moka_A["default"].weight[0, 0, 0] = value
    before = weights(model)
    with pytest.raises(MokaError, match="not finite"):
        getattr(model, verb)(safe_merge=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(torch.nan_to_num(after[name]), torch.nan_to_num(before[name])) for name in before)
    assert model.get_model_status().merged_adapters == []


def test_safe_merge_sees_a_float16_weight_overflow():
    model = get_peft_model(net().half(), config(), autocast_adapter_dtype=False)
    layer = model.base_model.model.lin1
    with torch.no_grad():
        layer.base_layer.weight.fill_(6e4)
        layer.moka_A["default"].weight.fill_(1e2)
        layer.moka_B["default"].weight.fill_(1e2)
    with pytest.raises(MokaError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert (layer.base_layer.weight == 6e4).all()


def test_merging_several_adapters_and_some_of_them(tiny):
    model = wrap(tiny)
    for name in ("b", "c"):
        model.add_adapter(name, config())
    tiny.strong_(model)
    for names in (["default", "b"], ["c"], ["b", "c"]):
        model.base_model.set_adapter(names)
        expected = out(model)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        close(out(merged), expected)
    model.merge_adapter(["b", "c"])
    assert sorted(model.get_model_status().merged_adapters) == ["b", "c"]
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("b")


def test_disabling_nests_and_covers_merged_adapters(tiny):
    model, bare = wrap(tiny), out(net())
    model.add_adapter("b", config())
    tiny.strong_(model)
    expected = out(model)
    with model.disable_adapter():
        assert torch.equal(out(model), bare)
        with model.disable_adapter():
            assert torch.equal(out(model), bare)
    assert torch.equal(out(model), expected)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(out(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        close(out(model), bare)
    close(out(model), expected)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "inference_mode"])
def test_only_the_adapter_moves(tiny, kind, frozen):
    model = wrap(tiny, kind, modules_to_save=None if frozen else heads(kind), inference_mode=frozen)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if frozen:
        assert trainable == set()
        return
    before = weights(model)
    step(model, kind)
    moved = changed(before, model.state_dict())
    assert moved == trainable
    assert all(".moka_" in name or ".modules_to_save." in name for name in moved)
    assert any(".modules_to_save." in name for name in moved) == bool(heads(kind))


def test_trainability_follows_the_verbs(tiny, tmp_path):
    model = wrap(tiny)
    model.save_pretrained(tmp_path)

    def trained():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    model.load_adapter(tmp_path, "frozen")
    assert trained() == {"default"}
    model.load_adapter(tmp_path, "live", is_trainable=True)
    model.set_adapter("live")
    assert trained() == {"live"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    model.base_model.set_requires_grad(["default", "live"])
    assert trained() == {"default", "live"}
    model.set_requires_grad("live", requires_grad=False)
    assert trained() == {"default"}
    status = model.get_model_status()
    assert status.requires_grad == {"default": True, "frozen": False, "live": False}
    with model.disable_adapter():
        assert trained() == set()
    assert trained() == {"default"}


@pytest.mark.parametrize("verb", ["enable_input_require_grads", "kbit", "plain"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradient_checkpointing_setups_of_peft(tiny, batch, kind, verb):
    """The three ways in which users prepare a backbone: the gradients are those of no checkpointing."""

    def run(checkpointing):
        backbone = tiny.backbone(kind)
        if checkpointing and verb == "kbit":
            backbone = prepare_model_for_kbit_training(backbone)
        model = tiny.strong_(get_peft_model(backbone, tiny.config())).train()
        if checkpointing:
            if verb == "enable_input_require_grads":
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": verb != "plain"})
        model(**batch.kwargs()).logits.float().pow(2).mean().backward()
        return tiny.gradients(model)

    plain, checked = run(False), run(True)
    assert plain.keys() == checked.keys()
    for name in plain:
        close(checked[name], plain[name], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", [True, False], ids=["cast", ""])
def test_dtypes(tiny, dtype, cast):
    model = tiny.strong_(get_peft_model(net().to(dtype), config(), autocast_adapter_dtype=cast))
    wanted = torch.float32 if cast else dtype
    assert {p.dtype for name, p in model.named_parameters() if "moka_" in name} == {wanted}
    step(model)
    expected = out(model)
    assert expected.dtype == dtype
    assert torch.isfinite(expected).all()
    model.merge_adapter(safe_merge=True)
    merged = out(model)
    assert merged.dtype == dtype
    close(merged, expected, 5e-2 if dtype != torch.float32 else 1e-4)
    model.add_adapter("b", config(), autocast_adapter_dtype=cast)
    assert model.base_model.model.lin0.moka_A["b"].weight.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(tiny, dtype):
    model = wrap(tiny)
    with torch.autocast("cpu", dtype=dtype):
        y = model(inputs())
    assert y.dtype == dtype
    close(y.float(), out(model), 5e-2)
    y.float().pow(2).mean().backward()
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in tiny.gradients(model).values())
    assert len(tiny.gradients(model)) == 4


# --- choice of layers, status ----------------------------------------------------------------------------------------

pattern_first = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="peft before 0.21 finds no layers_pattern that begins a name"
)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        pytest.param({"layers_to_transform": 1, "layers_pattern": "stages"}, {1}, marks=pattern_first),
        pytest.param({"layers_to_transform": [0, 2], "layers_pattern": ["stages"]}, {0, 2}, marks=pattern_first),
        pytest.param({"layers_to_transform": [2], "layers_pattern": ["blocks", "stages"]}, {2}, marks=pattern_first),
        ({"exclude_modules": ["stages.1.proj"]}, {0, 2}),
        ({"exclude_modules": r"stages\.[01]\.proj"}, {2}),
        ({"target_modules": r"stages\.2\..*"}, None),
    ],
)
def test_layer_indexing(settings, wanted):
    settings = {"target_modules": ["proj"], **settings}
    if wanted is None:  # the activation matches as well
        with pytest.raises(MokaError, match="Tanh"):
            get_peft_model(Deep(), config(**settings))
        return
    model = get_peft_model(Deep(), config(**settings))
    assert {int(n.split(".")[-2]) for n, m in model.named_modules() if isinstance(m, MokaLinear)} == wanted


def test_layer_index_out_of_range_is_named():
    with pytest.raises(MokaError, match="layers_to_transform"):
        get_peft_model(Deep(), config(target_modules=["proj"], layers_to_transform=[7], layers_pattern="stages"))


def test_counts_and_status(tiny, capsys):
    model = wrap(tiny, target_modules="all-linear", exclude_modules=None)
    assert model.peft_config["default"].target_modules == {"lin0", "lin1", "head"}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 4 * (10 + 20) + 4 * (20 + 20) + 4 * (20 + 5)
    assert total == trainable + sum(p.numel() for p in net().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("Net", "MokaModel")
    assert (status.trainable_params, status.total_params, status.num_adapter_layers) == (trainable, total, 3)
    assert all(layer.module_type.endswith("MokaLinear") for layer in model.get_layer_status())


class Namesake(nn.Module):
    """A network that uses the adapter's prefix for a layer of its own."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(10, 10))
        self.lin0 = nn.Linear(10, 10)

    def forward(self, x):
        return self.lin0(next(self.children())(x))


def test_a_layer_of_the_network_called_like_ours(tmp_path):
    """As with LoRA and a layer called ``lora_A``: peft does the same to both."""

    def trained(settings, name):
        model = get_peft_model(Namesake(name), settings)
        model.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(Namesake(name), tmp_path / name)
        again.merge_and_unload()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name.replace("lora_", "moka_") for name in names}

    ours = trained(config(target_modules=["lin0"]), "moka_A")
    assert ours == trained(LoraConfig(target_modules=["lin0"]), "lora_A")


def test_routing_of_custom_networks(tiny):
    """Text rows equal the text-only adapter; media rows do not; the block reaches merged layers too."""
    model = wrap(tiny, modalities={"text": [0], "visual": [1]})
    types = torch.tensor([[0, 1, 1, 0, 0, 0], [0] * 6])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A MokA layer ran without routing")
        plain = out(model)
    with moka.routing(model, mm_token_type_ids=types):
        routed = out(model)
        model.merge_adapter()
        close(out(model), routed)
    close(routed[types == 0], plain[types == 0])
    assert (routed - plain)[types == 1].abs().amax(-1).min() > 1e-3
