"""A quantised backbone: trained, resumed, loaded with and without, evaluated, merged; on the CPU, with real bitsandbytes."""

import json
import shutil
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka.adapter import MokaLinear
from moka.cli.main import main
from moka.data import Collator, EncodedDataset
from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.modeling.artifacts import load_connector
from moka.modeling.build import attach_adapter, build_for_stage_two, build_model, count_parameters
from moka.modeling.packing_isolation import check_confined
from moka.training import config_from_dict, run_training

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "int8")
LINEAR = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(scope="module")
def wide(tiny_tokenizer, tmp_path_factory):
    """Every input width a multiple of 64, which 4-bit blocks want; weights large enough to matter."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tiny_tokenizer),
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def raw(tiny_config, wide):
    """As ``tiny_config``, on the wide backbone, stage 1 through the language model."""

    def make(folder, kind=None, **changes):
        fixed = {"model__backbone": str(wide), "model__quantization": kind}
        return tiny_config(folder, **{**fixed, "alignment__objective": "language_modeling", **changes})

    return make


@pytest.fixture(scope="module")
def built(raw):
    """kind -> the composed model and its processor. To read, not to change."""
    made = {}
    for kind in (None, *KINDS):
        torch.manual_seed(0)
        made[kind] = build_model(config_from_dict(raw("unused", kind)).model)
    return made


@pytest.fixture(scope="module")
def runs(raw, tmp_path_factory):
    """kind -> the folder of a finished run of both stages. To read, not to change."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: run_training(config_from_dict(raw(folder / str(kind), kind))) for kind in (None, "nf4")}


@pytest.fixture(scope="module")
def batch(built):
    processor = built[None][1]
    rows = EncodedDataset(EmbeddedTask("audio-visual-text", "train", size=4), processor, None)
    made = Collator(processor)([rows[i] for i in range(4)])
    return {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def size(model):
    """Bytes of the parameters, and of the scales next to them."""
    scales = [b.numel() * b.element_size() for m in model.modules() for b in _scales(m)]
    return sum(p.numel() * p.element_size() for p in model.parameters()) + sum(scales)


def _scales(module):
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
        return [state.absmax, state.state2.absmax]
    scale = getattr(getattr(module, "weight", None), "SCB", None)
    return [] if scale is None else [scale]


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layers_of_the_language_model_only_are_quantised(built, kind):
    model, full = built[kind][0], built[None][0]
    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            expected = "Linear" if name == "lm_head" else LINEAR[kind]
            assert type(module).__name__ == expected, name
    for name, parameter in full.named_parameters():
        if "_proj.weight" not in name or not name.startswith("language_model."):
            assert torch.equal(dict(model.named_parameters())[name], parameter), name
    layers, full_layers = model.language_model.model.layers, full.language_model.model.layers
    assert size(layers) < {"nf4": 0.16, "int8": 0.28}[kind] * size(full_layers)
    assert count_parameters(model)["total"] == count_parameters(full)["total"]


def test_it_computes_in_the_type_of_the_model(raw):
    model = build_model(config_from_dict(raw("unused", "nf4", model__dtype="bfloat16")).model)[0]
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {m.compute_dtype for m in layers} == {torch.bfloat16}
    assert {m.weight.dtype for m in layers} == {torch.uint8}
    assert all(m.weight.quant_state.nested and m.weight.quant_state.quant_type == "nf4" for m in layers)
    assert {p.dtype for n, p in model.language_model.named_parameters() if "norm" in n} == {torch.bfloat16}
    assert {p.dtype for m in (model.encoders, model.projectors) for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 0.03, 0.35), ("int8", 0.001, 0.05)])
def test_outputs_are_close_to_those_of_full_precision(built, batch, kind, least, most):
    error = apart(logits(built[kind][0], batch), logits(built[None][0], batch))
    assert least < error < most
    loss, full = (built[k][0].eval()(**batch).loss.item() for k in (kind, None))
    assert loss == pytest.approx(full, rel=0.05)


def test_a_run_and_an_answer_on_the_cpu_next_to_a_gpu_stay_there(raw, runs, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    changes = {"model__dtype": "float32", "stages": [2], "training__use_cpu": True}
    config = config_from_dict(raw("unused", "nf4", **changes))
    places = [build_for_stage_two(config)[0], moka.load(runs["nf4"], device="cpu", dtype="float32").model]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = config_from_dict(raw("unused", "nf4", **{**changes, "training__use_cpu": False}))
    places.append(build_for_stage_two(config)[0])
    assert {tensor.device.type for model in places for tensor in model.parameters()} == {"cpu"}
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises((RuntimeError, AssertionError, ValueError)):  # there is no such GPU
        build_for_stage_two(config)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_packed_row_stay_apart(built, kind):
    check_confined(built[kind][0])
    assert {tensor.device.type for tensor in built[kind][0].parameters()} == {"cpu"}


def test_widths_that_hold_no_full_blocks_are_left_as_they_are(backbones, tiny_config, batch):
    """bitsandbytes' 4-bit kernels for the CPU compute something else for them, silently: 0.3 of the norm off."""
    changes = {"model__backbone": str(backbones["qwen2"])}
    torch.manual_seed(0)
    full = build_model(config_from_dict(tiny_config("unused", **changes)).model)[0]
    torch.manual_seed(0)
    model = build_model(config_from_dict(tiny_config("unused", **changes, model__quantization="nf4")).model)[0]
    linear = {n: m for n, m in model.language_model.named_modules() if isinstance(m, nn.Linear)}
    plain = {n for n, m in linear.items() if type(m) is nn.Linear}
    assert plain == {"lm_head", *(n for n in linear if n.endswith("down_proj"))}  # 96 wide
    for name, module in linear.items():
        original = full.language_model.get_submodule(name).weight.detach()
        if name not in plain:
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert 0.05 < apart(weight, original) < 0.12, name
    assert model.backbone_fingerprint() == full.backbone_fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_without_checkpointing(raw, batch, kind, reentrant):
    config = config_from_dict(raw("unused", kind, adapter__dropout=0.0))
    for spec in config.model.modalities.values():
        spec["encoder"]["dropout"] = 0.0
    torch.manual_seed(0)
    model = attach_adapter(build_model(config.model)[0], config.adapter).train()
    for module in model.modules():
        if isinstance(module, MokaLinear):
            nn.init.normal_(module.moka_B["default"].weight, std=0.1)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    assert all(g.any() for n, g in plain.items() if "moka_" in n or "projectors" in n)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_in_the_midst_of_training_leaves_weights_and_gradients_as_they_are(raw, batch):
    """Where the CPU can, bitsandbytes packs 4-bit weights again in evaluation: scales are rounded, gradients end there."""
    config = config_from_dict(raw("unused", "nf4", adapter__dropout=0.0))
    model = attach_adapter(build_model(config.model)[0], config.adapter)
    first = model.base_model.model.language_model.model.layers[0].self_attn.q_proj
    layer = getattr(first, "base_layer", first)
    before, kept = logits(model, batch), layer.weight.quant_state.absmax.clone()
    logits(model, batch)
    assert torch.equal(layer.weight.quant_state.absmax, kept)
    assert torch.equal(logits(model, batch), before)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "moka_" in n)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_moves_between_quantised_and_full_backbones(runs, batch, kind):
    for trained in (None, "nf4"):
        loaded = {held: moka.load(runs[trained], quantization=held) for held in (None, kind)}
        assert [loaded[held].quantization for held in loaded] == [None, kind]
        error = apart(logits(loaded[kind].model, batch), logits(loaded[None].model, batch))
        assert 0.001 < error < {"nf4": 0.35, "int8": 0.05}[kind]


def test_a_run_is_loaded_as_it_was_trained(runs, batch, tmp_path):
    described = json.loads((runs["nf4"] / "adapter/moka_model.json").read_text())
    assert described["quantization"] == "nf4"
    loaded = moka.load(runs["nf4"])
    assert loaded.quantization == "nf4"
    plain = PeftModel.from_pretrained(moka.load_base(runs["nf4"]), runs["nf4"] / "adapter")
    assert torch.equal(logits(plain, batch), logits(loaded.model, batch))
    assert moka.load(runs[None]).quantization is None
    older = tmp_path / "written before there was the key"
    shutil.copytree(runs["nf4"] / "adapter", older)
    (older / "moka_model.json").write_text(json.dumps({k: v for k, v in described.items() if k != "quantization"}))
    assert moka.load(older).quantization is None


def test_another_backbone_is_refused_for_adapter_and_connector(runs, built, raw, wide, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(wide, other)
    LlamaForCausalLM(LlamaConfig.from_pretrained(wide)).save_pretrained(other)
    for run in runs.values():
        for held in (None, "nf4"):
            with pytest.raises(MokaError, match="fingerprint"):
                moka.load(run, backbone=str(other), quantization=held)
    stranger = build_model(config_from_dict(raw("unused", "nf4", model__backbone=str(other))).model)[0]
    for run in runs.values():
        with pytest.raises(MokaError, match="backbone_fingerprint"):
            load_connector(stranger, run / "connector")


def test_connectors_move_between_quantised_and_full_backbones(runs, raw):
    for trained in (None, "nf4"):
        saved = load_file(runs[trained] / "connector/connector.safetensors")
        for held in (None, "int8"):
            model = build_model(config_from_dict(raw("unused", held)).model)[0]
            parts = load_connector(model, runs[trained] / "connector")
            assert len(parts) == 4
            assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in saved.items())


def test_training_follows_that_of_full_precision(runs, losses):
    ours, theirs = (losses(runs[kind]) for kind in ("nf4", None))
    assert Counter(stage for stage, _ in theirs) == {1: 6, 2: 6}
    assert ours == pytest.approx(theirs, rel=0.05)
    for stage in (1, 2):  # it was quantised
        assert any(abs(ours[at] / theirs[at] - 1) > 1e-6 for at in theirs if at[0] == stage)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_fall(raw, tmp_path, kind, losses, train):
    changes = {
        **{"stages": [2], "data__train_size": 4, "data__validation": None, "adapter__dropout": 0.0},
        **{"training__max_steps": 12, "training__learning_rate": 1e-2, "training__save_strategy": "no"},
        **{"training__eval_strategy": "no", "training__activation_checkpointing": True},
    }
    run = train(raw(tmp_path / "run", kind, **changes))
    made = losses(run)
    assert made[2, 12] < 0.8 * made[2, 1]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_of_8_bits_train(raw, tmp_path, optimizer, train):
    changes = {
        **{"stages": [2], "data__validation": None, "training__optim": optimizer, "training__max_steps": 3},
        **{"adapter__r": 32},  # bitsandbytes keeps states of fewer than 4096 numbers in 32 bits
        **{"training__eval_strategy": "no", "training__save_strategy": "steps", "training__save_steps": 3},
    }
    run = train(raw(tmp_path / "run", "nf4", **changes))
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith("moka_B"))
    (saved,) = (run / "checkpoints/stage2").glob("checkpoint-3/optimizer.pt")
    state = torch.load(saved, weights_only=False)["state"]
    assert any("qmap1" in one["__bnb_optimizer_quant_state__"] for one in state.values())  # states of 8 bits


def test_a_resumed_run_is_the_uninterrupted_one(runs, raw, train, tmp_path, losses, killed, same_adapter):
    """With an evaluation before the checkpoint and another after it."""
    folder = killed(runs["nf4"], tmp_path / "run", 4)
    train(raw(folder, "nf4"), resume=True)
    assert losses(folder) == losses(runs["nf4"])
    same_adapter(folder, runs["nf4"])


def test_the_command_line_trains_evaluates_asks_and_merges(raw, write_yaml, tmp_path, batch, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    config = write_yaml(tmp_path / "run.yaml", raw(run, stages=[2], training__learning_rate=1e-2))
    assert main(["train", str(config), "model.quantization=nf4"]) == 0
    assert "quantization: nf4" in (run / "config.yaml").read_text()
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["quantization"] == "nf4"
    assert main(["eval", str(run), "--quantization", "none", "--no-blank"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["quantization"] == "none"
    assert main(["generate", str(run), "Which?", "--max-new-tokens", "2", "--quantization", "int8"]) == 0
    capsys.readouterr()
    assert main(["merge", str(run), "--output", str(merged)]) == 0
    assert "not the nf4 ones of training" in capsys.readouterr().out
    assert json.loads((merged / "adapter/moka_model.json").read_text())["quantization"] is None
    live = {held: logits(moka.load(run, quantization=held).model, batch) for held in (None, "nf4")}
    folded = logits(moka.load(merged).model, batch)
    assert apart(folded, live[None]) < 1e-4
    assert 0.01 < apart(folded, live["nf4"]) < 0.35


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["tiny:llama-3", "tiny:qwen2", "tiny:qwen2.5-vl"])
def test_tiny_stand_ins_are_quantised_too(tiny_config, tmp_path, backbone, kind):
    changes = {"model__tiny": True, "model__backbone": backbone, "model__chat_template": None}
    config = config_from_dict(tiny_config(tmp_path / "run", **changes, stages=[2], model__quantization=kind))
    model = build_model(config.model)[0]
    assert any(type(m).__name__ == LINEAR[kind] for m in model.language_model.modules())
    config.model.quantization = None
    assert build_model(config.model)[0].backbone_fingerprint() == model.backbone_fingerprint()


def test_plain_lora_trains_on_it(raw, tmp_path, train):
    changes = {
        **{"stages": [2], "adapter__method": "lora", "data__validation": None, "training__eval_strategy": "no"},
        **{"training__max_steps": 3, "training__save_strategy": "no"},
    }
    run = train(raw(tmp_path / "run", "nf4", **changes))
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    adapted = [m for m in moka.load(run).model.modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 4
    assert all(isinstance(m.base_layer, bnb.nn.Linear4bit) for m in adapted)


def test_bad_settings_are_refused(raw, runs, wide, tmp_path, monkeypatch, train):
    with pytest.raises(MokaError, match="'int4' is not one of nf4, int8, or null for none"):
        moka.load(runs[None], quantization="int4")
    quantised = tmp_path / "quantised"
    shutil.copytree(wide, quantised)
    described = json.loads((quantised / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(described))
    with pytest.raises(MokaError, match=r"is quantised already; set model.quantization: null"):
        build_model(config_from_dict(raw("unused", "nf4", model__backbone=str(quantised))).model)
    monkeypatch.setattr("moka.modeling.quantization.is_bitsandbytes_available", lambda version: False)
    with pytest.raises(MokaError, match=r"needs the package bitsandbytes.*pip install 'moka-peft\[quant\]'"):
        train(raw(tmp_path / "run", "nf4"))
    assert not (tmp_path / "run").exists()


def test_fsdp_of_a_quantised_backbone_is_refused(raw, tmp_path, monkeypatch, train):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MokaError, match=r"nf4 does not go with FSDP.*Use DDP or ZeRO-2"):
        train(raw(tmp_path / "run", "nf4", stages=[2]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_zero_3_of_a_quantised_backbone_is_refused(raw, tmp_path, launch, write_yaml, write_zero):
    raw_config = raw(tmp_path / "run", "nf4", stages=[2], training__deepspeed=str(write_zero(tmp_path, "zero3")))
    done = launch("torchrun", "train", write_yaml(tmp_path / "run.yaml", raw_config))
    assert done.returncode != 0
    assert done.stderr.count("moka: error: model.quantization: nf4 does not go with ZeRO-3") == 1, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2"])
def test_two_processes_train_as_one(raw, tmp_path, launch, write_yaml, write_zero, engine, losses, train):
    same = {
        **{"adapter__dropout": 0.0, "alignment__global_batch_size": 8, "training__global_batch_size": 4},
        **{f"model__modalities__{name}__encoder__dropout": 0.0 for name in ("visual", "audio")},
        **{"alignment__max_steps": 3, "training__max_steps": 20, "training__eval_strategy": "no"},
        **{"alignment__save_strategy": "no", "training__save_strategy": "no"},
        # Adam divides a gradient near zero by its own size, and so makes much of its rounding.
        **{"alignment__optim": "sgd", "training__optim": "sgd", "training__learning_rate": 0.05},
    }
    one = train(raw(tmp_path / "one", "nf4", **same))
    halves = {"alignment__per_device_train_batch_size": 4, "training__per_device_train_batch_size": 2}
    config = raw(tmp_path / "two", "nf4", **same, **halves)
    if engine == "ZeRO-2":
        for section in ("alignment", "training"):
            settings = write_zero(tmp_path, "zero2", zero_allow_untested_optimizer=True)
            config[section]["deepspeed"] = str(settings)
    done = launch("torchrun", "train", write_yaml(tmp_path / "two.yaml", config), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    ran = summary["engines"]["2"]
    assert ran["processes"] == 2
    expected = {"DDP": ("MULTI_CPU", "DistributedDataParallel", None), "ZeRO-2": ("DEEPSPEED", "DeepSpeedEngine", 2)}
    assert (ran["distributed_type"], ran["wrapper"], ran["zero_stage"]) == expected[engine]
    assert Counter(stage for stage, _ in losses(one)) == {1: 3, 2: 20}
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)
    ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (tmp_path / "two", one))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    described = json.loads((tmp_path / "two/adapter/moka_model.json").read_text())
    assert described["quantization"] == "nf4"
