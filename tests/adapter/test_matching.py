"""Tensors of an adapter file find their places in a model by name: either format, any adapter name, paths that moved."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaModel

import moka
from moka.adapter.matching import PREFIX, match_names

FORMAT_1 = Path(__file__).with_name("fixtures") / "llama_format_1"
A, B = (3, 2, 8), (4, 2)


def shapes(*modules, tail="weight", prefix=PREFIX, group="moka_{}"):
    """The two tensors of each module, by default as in a file of format 2."""
    end = f".{tail}" if tail else ""
    return {f"{prefix}{m}.{group.format(x)}{end}": {"A": A, "B": B}[x] for m in modules for x in "AB"}


LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in range(12) for name in ("q_proj", "v_proj")]


def to(new, *modules, old=""):
    return [f"{new}{m.removeprefix(old)}" for m in modules]


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("tail", ["", "weight", "default", "default.weight", "weight.weight"])
def test_either_format_with_or_without_the_names_of_peft_and_the_adapter(tail, prefix):
    given = shapes(*LAYERS, tail=tail, prefix=prefix)
    for place in ("weight", "mine.weight", "mine"):
        expected = shapes(*LAYERS, tail=place)
        assert match_names(expected, given) == dict(zip(given, expected, strict=True))


MOVES = {
    "into a language model": (LAYERS, to("model.language_model", *LAYERS, old="model")),
    "out of it": (to("model.language_model", *LAYERS, old="model"), LAYERS),
    "a thinker": (LAYERS, to("thinker.", *LAYERS)),
    "another list of blocks": (LAYERS, to("transformer.h", *LAYERS, old="model.layers")),
    "one stayed": ([*LAYERS, "lm_head"], [*to("thinker.", *LAYERS), "lm_head"]),
    "no blocks": (["audio.proj", "proj_out"], ["model.audio.proj", "model.audio.proj_out"]),
    # A tower with blocks of the same names takes the longer ending, and leaves the other to the language model.
    "two towers": (
        [*LAYERS, *to("visual", *LAYERS, old="model")],
        [*to("model.language_model", *LAYERS, old="model"), *to("model.visual", *LAYERS, old="model")],
    ),
    "experts": (
        [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(3) for j in range(3)],
        [f"thinker.model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(3) for j in range(3)],
    ),
}


@pytest.mark.parametrize("kind", MOVES)
def test_paths_that_moved_between_versions_of_transformers(kind):
    old, new = MOVES[kind]
    for tail in ("", "weight"):
        given, expected = shapes(*old, tail=tail), shapes(*new, tail="default.weight")
        order = sorted(given, key=hash)  # any order of the file
        matched = match_names(expected, {name: given[name] for name in order})
        assert matched == dict(zip(given, expected, strict=True))


def test_modules_to_save_and_trained_biases_move_too():
    given = {
        **shapes("model.layers.0.q"),
        PREFIX + "model.layers.0.q.base_layer.bias": (4,),
        PREFIX + "model.norm.weight": (8,),
        PREFIX + "lm_head.weight": (9, 8),
        PREFIX + "model.embed_tokens.weight": (9, 8),  # a resized embedding: no tensor of the adapter
    }
    expected = {
        **shapes("model.lm.layers.0.q", tail="x.weight"),
        PREFIX + "model.lm.layers.0.q.base_layer.bias": (4,),
        PREFIX + "model.lm.norm.modules_to_save.x.weight": (8,),
        PREFIX + "lm_head.modules_to_save.x.weight": (9, 8),
    }
    embedding = PREFIX + "model.embed_tokens.weight"
    assert match_names(expected, given) == {**dict(zip(given, expected, strict=False)), embedding: embedding}


def test_biases_that_peft_writes_twice_are_one_tensor():
    """With bias="all" peft also writes the biases of a trained copy under their names in the model."""
    tower = PREFIX + "tower."
    copied = tower + "modules_to_save.default.fc.bias"
    given = {**shapes("model.layers.0.q"), copied: (4,), tower + "fc.bias": (4,), tower + "fc.weight": (4, 8)}
    expected = {name: shape for name, shape in given.items() if "tower" not in name}
    expected |= {copied: (4,), tower + "modules_to_save.default.fc.weight": (4, 8)}
    for names in (given, dict(reversed(given.items()))):
        matched = match_names(expected, names)
        assert matched[tower + "fc.bias"] == copied
        assert set(matched.values()) == set(expected)


Q0, Q1 = "model.layers.0.q_proj", "model.layers.1.q_proj"
WRONG = {
    "lost": (shapes(Q0, Q1), {**shapes(Q0), PREFIX + Q1 + ".moka_A": A}, r"lacks 1 of 4 .*layers.1.q_proj.moka_B"),
    "nothing": (shapes(Q0), {}, r"lacks 2 of 2"),
    "lost module": ({**shapes(Q0), "lm_head.weight": (9, 8)}, shapes(Q0), r"lacks 1 of 3 .*lm_head.weight"),
    "extra": (shapes(Q0), shapes(Q0, Q1), r"2 tensors .*layers.1.q_proj.moka_A"),
    "extra part": (shapes(Q0), {**shapes(Q0), Q0 + ".moka_E": (1,)}, r"1 tensors .*moka_E"),
    "another block": (shapes(Q0), shapes(Q1), r"lacks 2 of 2"),
    "another block of a moved path": (shapes("lm." + Q0), shapes(Q1), r"lacks 2 of 2"),
    "another name": (shapes(Q0), shapes("model.layers.0.qkv"), r"lacks 2 of 2 .*q_proj"),
    "another expert": (shapes("a.0.experts.1.up"), shapes("b.2.experts.1.up"), r"lacks 2 of 2"),
    "only the tensor's name in common": (shapes("down"), shapes("up"), r"lacks 2 of 2 .*down"),
    "only an index in common": (shapes("audio.2"), shapes("visual.2"), r"lacks 2 of 2 .*audio.2"),
    "only weight in common": ({"lm_head.weight": (9, 8)}, {"norm.weight": (9, 8)}, r"lacks 1 of 1 .*lm_head"),
    "two places": (
        shapes("text." + Q0, "audio." + Q0),
        shapes("old." + Q0, "older." + Q0),
        r"old.* could .*audio.*text",
    ),
    "two for a place": (shapes("new." + Q0), shapes("old." + Q0, "older." + Q0), r"old.*older.* could .*new"),
    "both formats": (shapes(Q0), {**shapes(Q0), **shapes(Q0, tail="")}, r"moka_A.* and .*moka_A.* same tensor"),
    "two adapters": (shapes(Q0), {**shapes(Q0, tail="a"), **shapes(Q0, tail="b")}, r"moka_A.a and .*moka_A.b"),
    "rank": (
        shapes(Q0),
        {**shapes(Q0), PREFIX + Q0 + ".moka_B.weight": (4, 3)},
        r"layers.0.q_proj.moka_B.weight is \[4, 3\] .* \[4, 2\]",
    ),
    "shape of a moved path": (
        shapes("lm." + Q0),
        {**shapes(Q0), PREFIX + Q0 + ".moka_A.weight": (2, 2, 8)},
        r"layers.0.q_proj.moka_A.weight is \[2, 2, 8\] .* \[3, 2, 8\]",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_without_one_place_each(kind):
    expected, given, message = WRONG[kind]
    with pytest.raises(moka.MokaError, match=message):
        match_names(expected, given)


@pytest.mark.parametrize("targets", [None, r"model\.layers\.\d+\.self_attn\.(q|v)_proj"], ids=["names", "pattern"])
@pytest.mark.parametrize("old", ["model.layers", "thinker.model.layers"], ids=["same paths", "moved"])
@pytest.mark.parametrize("verb", ["from_pretrained", "load_adapter"])
def test_tensors_of_other_adapters_in_a_folder_are_left_out(tiny, batch, tmp_path, verb, old, targets):
    """peft 0.19 writes them into every adapter's folder, under the names of their adapters."""
    saved, other = tiny.adapted(target_modules=targets), tiny.strong_(tiny.adapted(), seed=8)
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    others = get_peft_model_state_dict(other)
    tensors |= {name.replace(".weight", ".default.weight"): tensor for name, tensor in others.items()}
    tensors = {name.replace("model.layers", old): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    if targets is not None:
        path = tmp_path / "adapter_config.json"
        pattern = targets.replace(r"model\.layers", old.replace(".", r"\."))
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": pattern}))
    if verb == "from_pretrained":
        model = PeftModel.from_pretrained(tiny.backbone(), tmp_path).eval()
    else:
        model = tiny.strong_(tiny.adapted(), seed=9)
        before = get_peft_model_state_dict(model, adapter_name="default")
        model.load_adapter(tmp_path, "saved")
        after = model.state_dict()
        assert all(torch.equal(after[name.replace(".weight", ".default.weight")], before[name]) for name in before)
        model.set_adapter("saved")
    with torch.no_grad():
        assert torch.equal(model(**batch.kwargs()).logits, saved(**batch.kwargs()).logits)


def backbone(tiny):
    """A llama with weights that no generator of random numbers decides (see the fixture's README)."""
    model = tiny.backbone()
    with torch.no_grad():
        for i, (_, weight) in enumerate(sorted(model.named_parameters())):
            wave = 0.15 * torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (1 + 0.1 * i))
            weight.copy_((wave + (weight.dim() == 1)).reshape(weight.shape))
    return model


def test_a_llama_adapter_of_format_1_computes_what_it_computed(tiny):
    case = load_file(FORMAT_1 / "case.safetensors")
    logits, inputs = case.pop("logits"), case
    bare = backbone(tiny)
    with torch.no_grad():
        before = bare(input_ids=inputs["input_ids"]).logits
        model = PeftModel.from_pretrained(bare, FORMAT_1).eval()
        tiny.same(model(**inputs).logits, logits)
    assert (before - logits).abs().mean() > 0.1


# Where the decoder's blocks were when the adapter was saved -> is the new place `model.layers`.
OLD_PLACES = ["model.language_model.layers", "language_model.model.layers", "layers", "thinker.model.layers"]


def moved(folder, old, new="model.layers"):
    """Rewrite the names in an adapter folder, and in the patterns of its configuration."""
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(path)
    names = {name: name.replace(f"base_model.model.{new}.", f"base_model.model.{old}.") for name in tensors}
    assert not set(names.values()) & set(names)
    save_file({names[name]: tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads(config_path.read_text())
    if isinstance(config["target_modules"], str):
        pattern = config["target_modules"]
        config["target_modules"] = pattern.replace(new.replace(".", r"\."), old.replace(".", r"\."))
        assert config["target_modules"] != pattern
    config_path.write_text(json.dumps(config))


TARGETS = {
    "names": None,
    "pattern": r"model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.(gate|up|down)_proj)",
    "one block": r"model\.layers\.1\.(self_attn|mlp)\.\w+_proj",
}


def load(verb, base, folder, tiny):
    if verb == "from_pretrained":
        return PeftModel.from_pretrained(base, folder).eval()
    model = tiny.adapted(backbone=base)
    model.load_adapter(folder, "saved")
    model.set_adapter("saved")
    return model.eval()


@pytest.mark.parametrize("verb", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("old", OLD_PLACES)
def test_an_adapter_of_other_paths_loads(tiny, batch, tmp_path, old, targets, verb):
    model = tiny.adapted(target_modules=TARGETS[targets])
    model.save_pretrained(tmp_path / "adapter")
    moved(tmp_path / "adapter", old)
    loaded = load(verb, tiny.backbone(), tmp_path / "adapter", tiny)
    with torch.no_grad():
        assert torch.equal(loaded(**batch.kwargs()).logits, model(**batch.kwargs()).logits)
    # And on: what is saved here again has this model's names.
    loaded.save_pretrained(tmp_path / "again")
    folder = tmp_path / "again" / ("" if verb == "from_pretrained" else "saved")
    again = PeftModel.from_pretrained(tiny.backbone(), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch.kwargs()).logits, model(**batch.kwargs()).logits)


class Nested(nn.Module):
    """The same language model at another path, next to a tower with blocks of the same names."""

    def __init__(self, base):
        super().__init__()
        self.vision = LlamaModel(base.config)
        self.language_model = base

    def forward(self, **kwargs):
        return self.language_model(**kwargs)


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_of_a_language_model_loads_into_a_network_around_it(tiny, batch, tmp_path, targets):
    model = tiny.adapted(target_modules=TARGETS[targets], task_type=None)
    model.save_pretrained(tmp_path)
    network = Nested(tiny.backbone())
    loaded = PeftModel.from_pretrained(network, tmp_path).eval()
    layers = [name for name, module in loaded.named_modules() if isinstance(module, moka.adapter.MokaLinear)]
    assert layers
    assert all("language_model.model.layers" in name for name in layers)
    with torch.no_grad():
        assert torch.equal(loaded(**batch.kwargs()).logits, model(**batch.kwargs()).logits)
