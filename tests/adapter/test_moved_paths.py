"""An adapter saved where the model's modules have other paths, as they move between versions of transformers."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaModel

import moka

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


@pytest.mark.parametrize("kind", ["fewer blocks", "another width", "another name"])
def test_what_only_looks_moved_is_refused_before_anything_changes(tiny, tmp_path, kind):
    tiny.adapted().save_pretrained(tmp_path)
    moved(tmp_path, "model.language_model.layers")
    base = tiny.backbone()
    if kind == "fewer blocks":
        del base.model.layers[1]
    elif kind == "another width":
        for block in base.model.layers:
            block.mlp.up_proj = nn.Linear(64, 80)
    else:
        path = tmp_path / "adapter_model.safetensors"
        save_file({n.replace("q_proj", "qq_proj"): t for n, t in load_file(path).items()}, path)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(moka.MokaError, match=r"moka_[AB]"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before
