"""Hostile and broken adapter folders: refused with a clear error, nothing executed, and the model is as it was."""

import json
import os
import re
import struct

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import moka

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

by_moka_load = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="moka.load needs transformers 5.20, as training does"
)


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
        kwargs = row.kwargs(*(() if model is adapted else ("input_ids", "attention_mask")))
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


KEY = PREFIX + "model.layers.0.self_attn.q_proj.moka_A.weight"
FILES = {
    "nothing": b"",
    "cut": None,
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
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if kind == "cut" else FILES[kind])
    refuse(tiny, folder, r"adapter_model.safetensors.*truncated or damaged")


def test_a_folder_without_its_weights_or_without_anything(tiny, folder, tmp_path):
    (folder / WEIGHTS).unlink()
    refuse(tiny, folder, r"no adapter_model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=CONFIG):  # peft's own: it might have been a name on the Hub
        moka.MokaConfig.from_pretrained(str(tmp_path / "empty"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def ran(request, folder, tmp_path):
    """The file that code in the folder's pickle makes."""
    path, tensors = tmp_path / "executed", load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    content = {**tensors, "x": Payload(path)}
    torch.save(content, folder / "adapter_model.bin", _use_new_zipfile_serialization=not request.param)
    return path


def test_code_in_a_pickle_is_not_executed(tiny, folder, ran):
    refuse(tiny, folder, r"adapter_model.bin.*not executed")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        tiny.backbone().load_adapter(str(folder), adapter_name="mine")  # transformers' own reads no pickle
    assert not ran.exists()


@by_moka_load
def test_code_in_a_pickle_is_not_executed_by_moka_load(folder, ran):
    with pytest.raises(moka.MokaError, match="not executed"):
        moka.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"PK\x03\x04" + bytes(50), b"garbage" * 9])
def test_pickles_that_are_none(tiny, folder, data):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(data)
    refuse(tiny, folder, r"adapter_model.bin.*(truncated or damaged|not executed)")


def test_a_pickle_of_only_tensors_is_loaded(tiny, folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    state = get_peft_model_state_dict(PeftModel.from_pretrained(tiny.backbone(), folder))
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    torch.save({**tensors, "x": 1}, folder / "adapter_model.bin")
    refuse(tiny, folder, r"adapter_model.bin.*named tensors")


def renamed(rename):
    return lambda tensors: {rename(key): value for key, value in tensors.items()}


def parts(*names):
    return lambda t: {f"{PREFIX}model.layers.0.self_attn.q_proj.{name}": torch.ones(4, 4) for name in names}


def changed(change):
    """A change in place, of the tensors and the first name of an A."""

    def apply(tensors):
        change(tensors, next(key for key in sorted(tensors) if "moka_A" in key))
        return tensors

    return apply


NAN, INF = float("nan"), float("inf")
TENSORS = {
    "authors' avt": (parts("lora_A0.weight", "lora_A1.weight", "lora_B0.weight"), r"lora_A0.*moka convert .*adapter"),
    "authors' vt": (parts("lora_A.text", "lora_A.image.default.weight", "lora_B.text"), r"lora_A.*moka convert"),
    "lora": (parts("lora_A.weight", "lora_B.weight"), r"LoRA.*lora_A.*MOKA.*LORA"),
    "other": (parts("hada_w1_a"), r"moka_A.*hada_w1_a"),
    "nothing": (lambda t: {}, r"moka_A.*none"),
    "no prefix": (renamed(lambda key: key.removeprefix(PREFIX)), r"29 of 29.*'base_model.model.'"),
    "half of it": (renamed(lambda key: key.replace(PREFIX, "model.")), r"'base_model.model.'"),
    "doubled": (renamed(lambda key: PREFIX + key), r"29 of 29.*'base_model.model.'.*twice"),
    "one of them": (
        renamed(lambda key: key.removeprefix(PREFIX) if "0.mlp.up_proj.moka_B" in key else key),
        r"1 of 29.*'base_model.model.'.*0.mlp.up_proj.moka_B",
    ),
    "another model's": (renamed(lambda key: key.replace("self_attn", "attention")), r"lacks 16 of 28.*self_attn"),
    "missing": (changed(lambda t, key: t.pop(key)), r"lacks 1 of 28.*layers.0.*moka_A"),
    "no module": (changed(lambda t, key: t.pop(PREFIX + "lm_head.weight")), r"'lm_head'.*modules_to_save"),
    "extra": (changed(lambda t, key: t.update({key.replace("s.0", "s.5"): t[key].clone()})), r"1 tensors.*layers.5"),
    "empty": (changed(lambda t, key: t.update({key: torch.empty(0)})), r"1 empty.*layers.0.*ZeRO-3, FSDP"),
    "shape": (changed(lambda t, key: t.update({key: torch.zeros(3, 8, 96)})), r"\[3, 8, 96\].*\[3, 4, 96\].*rank"),
    "shape of a module": (changed(lambda t, key: t.update({PREFIX + "lm_head.weight": torch.ones(2, 64)})), r"lm_head"),
    "integers": (changed(lambda t, key: t.update({key: t[key].int()})), r"torch.int32.*layers.0.*moka_A"),
    "nan of float8": (
        changed(lambda t, key: t.update({key: (t[key] * NAN).to(torch.float8_e4m3fn)})),
        r"not finite.*layers.0.*moka_A",
    ),
    "nan": (changed(lambda t, key: t[key].view(-1)[3].fill_(NAN)), r"not finite.*layers.0.*moka_A"),
    "inf": (changed(lambda t, key: t[key].view(-1)[0].fill_(INF)), r"not finite.*layers.0.*moka_A"),
    "nan in a module": (changed(lambda t, key: t[PREFIX + "lm_head.weight"].fill_(NAN)), r"not finite.*lm_head"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_this_models_or_damaged(tiny, folder, kind):
    change, message = TENSORS[kind]
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refuse(tiny, folder, message)


def test_values_loaded_by_transformers_itself_are_checked_before_the_first_inference(tiny, folder):
    """Its ``model.load_adapter`` asks no tuner; what is missing or extra it prints in its own load report."""
    save_file(TENSORS["nan"][0](load_file(folder / WEIGHTS)), folder / WEIGHTS)
    model, row = tiny.backbone(), tiny.rows(["i i q q"])
    model.load_adapter(str(folder), adapter_name="mine")
    with pytest.raises(moka.MokaError, match=r"'mine'.*not finite.*moka_A"):
        model(**row.kwargs())


def test_tensors_in_memory_are_checked_too(model):
    """``set_peft_model_state_dict`` is what loads from the Hub and from trainers."""
    state = get_peft_model_state_dict(model)
    key = next(iter(state))
    with pytest.raises(moka.MokaError, match=r"not finite.*layers.0.*moka_A"):
        set_peft_model_state_dict(model, {**state, key: state[key] * NAN})


any_missing = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="peft before 0.21 does not tell which adapter it loads, and load_state_dict may leave all of it out",
)


@pytest.mark.parametrize("kind", ["renamed", pytest.param("none", marks=any_missing)])
def test_tensors_given_for_a_trained_adapter_that_do_not_fit_do_not_cost_it(tiny, folder, kind):
    """An adapter made from a saved configuration and trained since is no failed load."""
    model = tiny.strong_(get_peft_model(tiny.backbone(), moka.MokaConfig.from_pretrained(str(folder))))
    model.peft_config["default"].init_weights = True
    state = get_peft_model_state_dict(model)
    saved = {key: value for key, value in state.items() if "lm_head" in key}
    own = state if kind == "renamed" else {}
    wrong = {key.replace("q_proj", "qkv"): value for key, value in own.items() if "moka" in key}
    with pytest.raises(moka.MokaError, match=r"lacks (4|28) of 2[89]"):  # before peft 0.21 without the trained head
        set_peft_model_state_dict(model, {**wrong, **saved})
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], state[key]) for key in state)


FIELDS = {
    "alpha": ["16", NAN, INF, 10**400, True],
    "dropout": [NAN, "0.1"],
    "r": [True, 2.5],
    "share_b": ["no", 1],
    "use_rslora": ["no"],
    "modalities": [["text"], {"text": 0}],
    "interaction_weight": [{"visual": INF}, NAN],
    "alpha_pattern": [{"q_proj": NAN}],
    "target_modules": [{"q": 1}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_fields_of_another_type(tiny, folder, field, value):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refuse(tiny, folder, rf"adapter_config.json: {field} is {re.escape(repr(value))}; allowed: \w+")


def test_a_rank_that_is_not_the_files(tiny, folder):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    refuse(tiny, folder, r"moka_A.*\[3, 4, 96\].*\[3, 2, 96\]")


NO_CONFIGURATIONS = [
    ("{", r"adapter_config.json.*JSON"),
    ("", r"adapter_config.json.*JSON"),
    ("[]", r"adapter_config.json.*list"),
    ("{}", r"adapter_config.json.*peft_type is None.*MOKA"),
    ('{"peft_type": 5}', r"adapter_config.json.*peft_type is 5.*MOKA"),
]


@pytest.mark.parametrize(("text", "message"), NO_CONFIGURATIONS)
def test_configuration_that_is_none(tiny, folder, text, message):
    (folder / CONFIG).write_text(text)
    with pytest.raises(moka.MokaError, match=message):
        moka.MokaConfig.from_pretrained(str(folder))
    # peft asks for the method before it asks moka: its own error, and nothing loaded.
    refuse(tiny, folder, None, error=(ValueError, KeyError, TypeError))


@by_moka_load
@pytest.mark.parametrize(("text", "message"), NO_CONFIGURATIONS)
def test_configuration_that_is_none_by_moka_load(folder, text, message):
    (folder / CONFIG).write_text(text)
    with pytest.raises(moka.MokaError, match=message):
        moka.load(str(folder))
