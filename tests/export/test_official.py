"""The authors' checkpoints: read, loaded with peft, compared with their layer's outputs, and written back bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moka
from moka.adapter.checks import read_tensors
from moka.export.official import convert
from moka.modeling.projectors import build_projector

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {
    "avt": {"A_text": "lora_A0", "A_visual": "lora_A1", "A_audio": "lora_A2", "B": "lora_B0"},
    "vt": {"A_text": "lora_A.text", "A_visual": "lora_A.image", "B": "lora_B.text"},
}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def golden(variant):
    return load_file(GOLDEN / f"moka_layer_official_{variant}.safetensors")


def official(variant, ending=".weight"):
    g = golden(variant)
    return {f"{MODULE}.{theirs}{ending}": g[ours] for ours, theirs in NAMES[variant].items()}


def projector(prefix="base_model.model.model.", kind="visual", pre="vl"):
    weights = load_file(GOLDEN / "official_qformer_projector_small.safetensors")
    names = {
        key.removeprefix("state.").replace("visual_", f"{kind}_"): w for key, w in weights.items() if "state." in key
    }
    return {f"{prefix}{pre}_projector.{key}": value for key, value in names.items()}


def write(folder, tensors, settings=SETTINGS, others=None, suffix="bin"):
    folder.mkdir(exist_ok=True)
    save = torch.save if suffix == "bin" else save_file
    save(tensors, folder / f"adapter_model.{suffix}")
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    if others is not None:
        save(others, folder / f"non_lora_trainables.{suffix}")
    return folder


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


@pytest.fixture
def backbone(tmp_path):
    """A folder that AutoModelForCausalLM reads; its q_proj is 64 -> 48, as the golden layer is."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("ending", [".weight", ".default.weight", ""])
@pytest.mark.parametrize("variant", ["avt", "vt"])
def test_converted_layer_computes_what_the_authors_layer_does(tmp_path, backbone, variant, ending, suffix):
    g = golden(variant)
    tensors = official(variant, ending)
    source = write(tmp_path / "source", tensors, suffix=suffix)
    summary = convert(source, tmp_path / "out", backbone=str(backbone))
    assert (summary.layers, summary.rank, summary.mapped, summary.aside) == (1, 4, len(tensors), [])

    base = AutoModelForCausalLM.from_pretrained(backbone)
    base.model.layers[0].self_attn.q_proj.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(backbone)
    types = torch.tensor([0, 1, 3])[g["modality"].clamp(min=0)]
    with moka.routing(model, mm_token_type_ids=types, question_mask=g["question"], attention_mask=g["modality"] >= 0):
        y = model.base_model.model.model.layers[0].self_attn.q_proj(g["x"])
    valid = g["modality"] >= 0  # their code leaves padding without an adapter; here it is text
    torch.testing.assert_close(y[valid], g["y"][valid], atol=1e-5 * g["y"].abs().max().item(), rtol=0)

    convert(tmp_path / "out", tmp_path / "back", to=f"official-{variant}")
    same(read_tensors(tmp_path / "back" / "adapter_model.bin"), tensors)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == SETTINGS
    assert not (tmp_path / "back" / "non_lora_trainables.bin").exists()


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.", "model.", ""])
def test_projectors_come_under_our_names_and_everything_goes_back(tmp_path, prefix):
    others = projector(prefix) | projector(prefix, "audio", "al")
    others |= {"base_model.model.model.mm_projector.0.weight": torch.randn(3, 2).bfloat16(), "steps": torch.tensor(7)}
    tensors = {key: value.bfloat16() for key, value in official("avt").items()}
    summary = convert(write(tmp_path / "source", tensors, others=others), tmp_path / "out")
    state = load_file(tmp_path / "out" / "projectors.safetensors")
    extra = load_file(tmp_path / "out" / "extra.safetensors")
    assert len(state) + len(extra) == len(others) == summary.projectors + len(summary.aside)
    assert {"steps", "base_model.model.model.mm_projector.0.weight"} <= extra.keys()
    assert any("intermediate.dense" in key for key in extra)  # the text half, unused by queries
    for kind in ("visual", "audio"):
        start = f"projectors.{kind}."
        config = {"type": "qformer", "queries": 6, "hidden_size": 48, "heads": 4, "intermediate_size": 96}
        build_projector(config, 16, 40, 56).load_state_dict(
            {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        )
    convert(tmp_path / "out", tmp_path / "back", to="official-avt")
    same(read_tensors(tmp_path / "back" / "adapter_model.bin"), tensors)
    same(read_tensors(tmp_path / "back" / "non_lora_trainables.bin"), others)


def test_settings_are_taken_from_their_file_or_said(tmp_path):
    # Their extra fields are kept for the way back.
    settings = {**SETTINGS, "r": [4, 4, 4], "lora_alpha": 8, "lora_dropout": 0.1, "lora_nums": 3}
    convert(write(tmp_path / "a", official("avt"), settings), tmp_path / "out")
    config = moka.MokaConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.alpha, config.dropout, config.target_modules) == (4, 8, 0.1, {"q_proj"})
    convert(tmp_path / "out", tmp_path / "back", to="official-avt")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == settings

    summary = convert(write(tmp_path / "b", official("vt"), None), tmp_path / "out", overwrite=True)
    config = moka.MokaConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.alpha, config.interaction_weight) == (4, 16, 0.05)
    assert "alpha 16" in "\n".join(summary.lines())


def test_an_adapter_of_ours_is_written_in_their_layout(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=2))
    from peft import get_peft_model

    config = moka.MokaConfig.preset("official-vt", r=2, task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "ours")
    before = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    with pytest.raises(
        moka.MokaError, match=r"modalities is \['text', 'visual'\].*settings are those of --to official-vt"
    ):
        convert(tmp_path / "ours", tmp_path / "theirs", to="official-avt")
    convert(tmp_path / "ours", tmp_path / "theirs", to="official-vt")
    convert(tmp_path / "theirs", tmp_path / "again")
    same(load_file(tmp_path / "again" / "adapter_model.safetensors"), before)


def test_other_computations_are_not_written_as_theirs(tmp_path):
    convert(write(tmp_path / "a", official("avt")), tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_position": "output"}))
    with pytest.raises(moka.MokaError, match=r"scale_position is 'output'.*has 'input'.*compute something else"):
        convert(tmp_path / "out", tmp_path / "back", to="official-avt")


def edited(change, variant="avt"):
    tensors = official(variant)
    change(tensors)
    return tensors


def set_(name, value):
    return lambda t: t.update({f"{MODULE}.{name}.weight": value})


BAD = {
    "unknown": (
        edited(set_("lora_C", torch.ones(1))),
        r"q_proj\.lora_C\.weight is not known.*lora_A0, lora_A1, lora_A2",
    ),
    "fourth": (edited(set_("lora_A3", torch.ones(4, 64))), r"lora_A3\.weight is not known"),
    "lost": (
        edited(lambda t: t.pop(f"{MODULE}.lora_A1.weight")),
        r"q_proj lacks lora_A1\.",
    ),
    "shape": (edited(set_("lora_A1", torch.ones(4, 60))), r"shapes of .*q_proj do not belong together: .*\[4, 60\]"),
    "rank of B": (edited(set_("lora_B0", torch.ones(48, 5))), r"do not belong together: .*\[48, 5\]"),
    "empty": (edited(set_("lora_B0", torch.ones(0))), r"do not belong together.*ZeRO-3"),
    "nan": (edited(set_("lora_A1", torch.full((4, 64), float("nan")))), r"not finite \(.*lora_A1"),
    "dtype": (edited(set_("lora_A1", torch.ones(4, 64).half())), r"dtypes .*float16.*float32.*one floating"),
    "twice": (edited(set_("lora_A1.default", torch.ones(4, 64))), r"lora_A1 of .*q_proj is there twice"),
    "both": (official("avt") | official("vt"), "mixes the layouts official-avt and official-vt"),
    "lora": (
        {f"{MODULE}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
        r"plain LoRA adapter .*allowed: lora_A0.*peft",
    ),
    "other": ({"x.weight": torch.ones(1)}, r"has other tensors \(x.weight\); allowed: lora_A0"),
    "none": ({}, "has no tensors"),
    "list": ([torch.ones(1)], "objects other than named tensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors_are_named_and_nothing_is_written(tmp_path, kind):
    tensors, message = BAD[kind]
    with pytest.raises(moka.MokaError, match=message):
        convert(write(tmp_path / "a", tensors), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "r is 8, but the tensors have rank 4"),
        ({"r": [4, 8, 4]}, r"r is \[4, 8, 4\]; allowed: int"),
        ({"r": "four"}, "r is 'four'; allowed: int"),
        ({"lora_alpha": None, "lora_dropout": "x"}, "lora_dropout.* is 'x'; allowed: finite float"),
        ({"target_modules": ["v_proj"]}, r"target_modules \['v_proj'\] leaves out model.layers.0.self_attn.q_proj"),
        ({"target_modules": "(("}, r"target_modules '\(\('.*missing"),
        ({"target_modules": [1, 2]}, r"target_modules is \[1, 2\]; allowed: .*list\[str\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .*one r"),
        ({"peft_type": "MOKA"}, "has a moka adapter already.*--to official-avt or --to official-vt"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(moka.MokaError, match=message):
        convert(write(tmp_path / "a", official("avt"), {**SETTINGS, **change}), tmp_path / "out")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["adapter", "others"])
def test_code_in_a_pickle_is_not_executed(tmp_path, place, legacy):
    run = tmp_path / "executed"
    bad = {"x": Payload(run)}
    source = write(tmp_path / "a", official("avt"), others={})
    file = source / ("adapter_model.bin" if place == "adapter" else "non_lora_trainables.bin")
    torch.save(bad, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(moka.MokaError, match=r"code or objects other than tensors.*system.*it was not executed"):
        convert(source, tmp_path / "out")
    assert not run.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)  # the payload is a real one
    assert run.exists()


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    source = write(tmp_path / "a", official("avt"))
    full = write(tmp_path / "full", official("avt"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").touch()
    for arguments, message in [
        ((tmp_path / "nowhere", tmp_path / "out"), "nowhere does not exist; give the folder"),
        ((tmp_path / "file", tmp_path / "out"), "file is a file; give the folder"),
        ((tmp_path / "empty", tmp_path / "out"), "neither adapter_model.bin nor .*; found: nothing"),
        ((source, source), f"--output: {source} is {source}"),
        ((source, tmp_path), f"--output: {tmp_path} is {source}, has it"),
        ((source, source / "sub"), "--output: .*sub is .*or is inside it"),
        ((source, tmp_path / "file" / "x"), "--output: .*file is a file"),
        ((source, full), "--output: .*is not empty .*--overwrite"),
        ((source, tmp_path / "file"), "--output: .*file is a file"),
    ]:
        with pytest.raises(moka.MokaError, match=message):
            convert(*arguments)
    with pytest.raises(moka.MokaError, match=r"docs is not empty and has no earlier result"):
        convert(source, tmp_path / "docs", overwrite=True)
    with pytest.raises(moka.MokaError, match="has a LORA adapter; --to takes a moka adapter folder"):
        convert(source, tmp_path / "out", to="official-avt")
    with pytest.raises(moka.MokaError, match=r"--to: 'official-av' is not one of.*Did you mean 'official-avt'"):
        convert(source, tmp_path / "out", to="official-av")
    with (source / "adapter_config.json").open("w") as file:
        file.write("{")
    with pytest.raises(moka.MokaError, match=r"adapter_config.json cannot be read as JSON"):
        convert(source, tmp_path / "out")
