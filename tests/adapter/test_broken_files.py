"""Hostile and broken adapter folders: refused with a clear error, nothing executed, and the model is as it was.

Tensors that are missing, extra, empty, of another shape or not finite, and truncated files: test_bad_input.
"""

import json
import os
import struct

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import moka

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@pytest.fixture
def folder(tiny, tmp_path):
    path = tmp_path / "adapter"
    tiny.adapted(modules_to_save=["lm_head"]).save_pretrained(path)
    return path


def picture(model):
    """Everything of a model that a load may change."""
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "attributes": sorted(vars(model)),
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
    }


def refuse(tiny, folder, message, error=moka.MokaError):
    """By ``PeftModel.from_pretrained`` and ``load_adapter``; the models are as before, and can take a good adapter."""
    row = tiny.rows(["i i q q t"])
    backbone, adapted = tiny.backbone(), tiny.adapted(target_modules=["q_proj"])
    for model, load in [
        (backbone, lambda: PeftModel.from_pretrained(backbone, folder)),
        (adapted, lambda: adapted.load_adapter(str(folder), "second")),
    ]:
        kwargs = row.kwargs(*(ROUTED if model is adapted else ("input_ids", "attention_mask")))
        before, values, logits = picture(model), model.state_dict(), model(**kwargs).logits
        values = {key: value.clone() for key, value in values.items()}
        with pytest.raises(error, match=message):
            load()
        assert picture(model) == before
        after = model.state_dict()
        assert after.keys() == values.keys()
        assert all(torch.equal(after[key], values[key]) for key in values)
        assert torch.equal(model(**kwargs).logits, logits)
    good = folder.parent / "good"
    tiny.adapted().save_pretrained(good)
    PeftModel.from_pretrained(backbone, good)
    adapted.load_adapter(str(good), "second")
    assert sorted(adapted.peft_config) == ["default", "second"]


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(1, 1), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


KEY = PREFIX + "model.layers.0.self_attn.q_proj.moka_A"
FILES = {
    "huge header": raw({KEY: entry()}, bytes(4), length=2**62),
    "header beyond the file": raw({KEY: entry()}, bytes(4), length=5000),
    "offsets beyond the file": raw({KEY: entry((1, 25), (0, 100))}, bytes(4)),
    "overlap": raw({KEY: entry(), KEY + "x": entry()}, bytes(4)),
    "gap": raw({KEY: entry(), KEY + "x": entry(offsets=(8, 12))}, bytes(12)),
    "shape of other bytes": raw({KEY: entry((9, 9))}, bytes(4)),
    "shape that overflows": raw({KEY: entry((2**40, 2**40))}, bytes(4)),
    "negative": raw({KEY: entry((-1, -1))}, bytes(4)),
    "dtype": raw({KEY: entry(dtype="F33")}, bytes(4)),
    "no json": raw(b"{" * 40),
    "a page of html": b"<html>404 not found</html>" * 40,
    "pickle under its name": b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.",
    "one byte": b"\x00",
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_no_safetensors(tiny, folder, kind):
    (folder / WEIGHTS).write_bytes(FILES[kind])
    refuse(tiny, folder, r"adapter_model.safetensors cannot be read.*truncated or damaged. Copy it again")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_executed(tiny, folder, tmp_path, legacy):
    ran = tmp_path / "executed"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({**tensors, "x": Payload(ran)}, folder / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    refuse(tiny, folder, r"adapter_model.bin holds code / objects other than tensors.*it was not executed")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        tiny.backbone().load_adapter(str(folder), adapter_name="mine")  # transformers' own reads no pickle
    with pytest.raises(moka.MokaError, match="not executed"):
        moka.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"PK\x03\x04" + bytes(50), b"garbage" * 9])
def test_pickles_that_are_none(tiny, folder, data):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(data)
    refuse(tiny, folder, r"adapter_model.bin (cannot be read.*truncated or damaged|holds code / objects)")


def test_a_pickle_of_tensors_alone_is_loaded(tiny, folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    state = get_peft_model_state_dict(PeftModel.from_pretrained(tiny.backbone(), folder))
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    torch.save({**tensors, "x": 1}, folder / "adapter_model.bin")
    refuse(tiny, folder, "objects other than named tensors")


def renamed(rename):
    return lambda tensors: {rename(key): value for key, value in tensors.items()}


def parts(*names):
    return lambda t: {f"{PREFIX}model.layers.0.self_attn.q_proj.{name}": torch.ones(4, 4) for name in names}


LAYOUTS = {
    "authors' avt": (parts("lora_A0.weight", "lora_A1.weight", "lora_B0.weight"), r"moka convert .*adapter --output"),
    "authors' vt": (parts("lora_A.text", "lora_A.image.default.weight", "lora_B.text"), r"layout of the MokA authors"),
    "lora": (parts("lora_A.weight", "lora_B.weight"), r"LoRA adapter .*lora_A.*MOKA.*LORA"),
    "other": (parts("hada_w1_a"), r"no MokA tensors .*moka_A.*hada_w1_a"),
    "nothing": (lambda t: {}, r"no MokA tensors .*found: none"),
    "no prefix": (renamed(lambda key: key.removeprefix(PREFIX)), r"29 of 29 names .*prefix .*save_pretrained"),
    "half of it": (renamed(lambda key: key.replace(PREFIX, "model.")), r"prefix 'base_model.model.'"),
    "doubled": (renamed(lambda key: PREFIX + key), r"29 of 29 names .*prefix 'base_model.model.'.*twice"),
    "one of them": (
        renamed(lambda key: key.removeprefix(PREFIX) if "0.mlp.up_proj.moka_B" in key else key),
        r"1 of 29 names .*prefix .*0.mlp.up_proj.moka_B",
    ),
    "another model's": (renamed(lambda key: key.replace("self_attn", "attention")), r"lacks 16 of 29 tensors"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_tensors_of_another_layout_never_load_as_an_adapter_that_does_nothing(tiny, folder, kind):
    change, message = LAYOUTS[kind]
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refuse(tiny, folder, message)


@pytest.mark.parametrize(
    "change", [lambda t, key: t.pop(key), lambda t, key: t.update({key: torch.ones(3, 8, 64)})], ids=["lost", "shape"]
)
def test_weights_that_do_not_fit_the_model_leave_it_as_it_was(tiny, folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(key for key in tensors if key.startswith(KEY)))
    save_file(tensors, folder / WEIGHTS)
    refuse(tiny, folder, r"moka_A")


def test_tensors_given_for_a_trained_adapter_that_do_not_fit_do_not_cost_it(tiny, folder):
    """An adapter made from a saved configuration and trained since, is no failed load."""
    model = tiny.strong_(get_peft_model(tiny.backbone(), moka.MokaConfig.from_pretrained(str(folder))))
    model.peft_config["default"].init_weights = True
    state = get_peft_model_state_dict(model)
    saved = {key: value for key, value in state.items() if "lm_head" in key}
    for wrong in ({key.replace("q_proj", "qkv"): value for key, value in state.items() if "moka" in key}, {}):
        with pytest.raises(moka.MokaError, match=r"lacks (4|28) of 29"):
            set_peft_model_state_dict(model, {**wrong, **saved})
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], state[key]) for key in state)


FIELDS = {
    "alpha": ("16", r"alpha is '16'.*float"),
    "dropout": (float("nan"), r"dropout is nan.*finite"),
    "r": (True, r"r is True.*int"),
    "share_b": ("no", r"share_b is 'no'.*bool"),
    "modalities": (["text"], r"modalities is \['text'\].*dict\[str, list\[int\]\]"),
    "interaction_weight": ({"visual": float("inf")}, r"interaction_weight is \{'visual': inf\}.*finite"),
    "target_modules": ({"q": 1}, r"target_modules is \{'q': 1\}.*list\[str\]"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_another_type(tiny, folder, field):
    value, message = FIELDS[field]
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refuse(tiny, folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"adapter_config.json cannot be read as JSON"),
        ("", r"adapter_config.json cannot be read as JSON"),
        ("[]", r"adapter_config.json has a list"),
        ("{}", r"peft_type is None.*MOKA"),
        ('{"peft_type": 5}', r"peft_type is 5.*MOKA"),
    ],
)
def test_configuration_that_is_none(tiny, folder, text, message):
    (folder / CONFIG).write_text(text)
    with pytest.raises(moka.MokaError, match=message):
        moka.MokaConfig.from_pretrained(str(folder))
    with pytest.raises(moka.MokaError):
        moka.load(folder)
    # peft asks for the method before it asks moka: its own error, and nothing loaded.
    refuse(tiny, folder, "", error=(ValueError, KeyError, TypeError))
