"""Folders of language models: what is damaged, lost or not ours is one clear error, and nothing in them is run."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from moka.config import ModelSection
from moka.errors import MokaError
from moka.inference import load
from moka.modeling.build import build_model


@pytest.fixture
def backbone(backbones, tmp_path):
    return shutil.copytree(backbones["llama"], tmp_path / "backbone")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def remote_code(folder):
    (folder / "modeling_x.py").write_text("raise SystemExit('run')\n")
    edit(
        folder / "config.json",
        model_type="never_heard_of",
        auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"},
    )


DAMAGE = {
    "a tensor is lost": (lose_a_tensor, ["up_proj", "random"]),
    "more layers than tensors": (lambda f: edit(f / "config.json", num_hidden_layers=3), ["layers.2", "random"]),
    "cut weights": (truncate, ["model.backbone"]),
    "a pointer of git-lfs": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        ["git-lfs"],
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["tokenizer"]),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["model.backbone"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["model.backbone"]),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), ["model.backbone"]),
    "a wrong type in it": (lambda f: edit(f / "config.json", hidden_size="wide"), ["model.backbone"]),
    "another kind of model": (lambda f: edit(f / "config.json", model_type="vit"), ["model.backbone"]),
    "code of its own": (remote_code, ["auto_map", "never runs"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_backbone_is_one_clear_error(backbone, case, monkeypatch):
    damage, words = DAMAGE[case]
    damage(backbone)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run code"))
    with pytest.raises(MokaError) as error:
        build_model(ModelSection(backbone=str(backbone)))
    assert str(backbone) in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_an_empty_folder_and_a_run_are_no_backbones(tmp_path, trained_run):
    for folder in (tmp_path, trained_run):
        with pytest.raises(MokaError, match=str(folder)):
            build_model(ModelSection(backbone=str(folder)))


def test_an_unknown_attention_is_named(backbone):
    with pytest.raises(MokaError, match="sdqa"):
        build_model(ModelSection(backbone=str(backbone), attn_implementation="sdqa"))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_an_adapter_folder_knows_its_files(trained_run, tmp_path, name):
    run = shutil.copytree(trained_run, tmp_path / "run")
    if not (run / "adapter" / name).exists():
        pytest.skip(f"this tokenizer has no {name}")
    (run / "adapter" / name).unlink()
    with pytest.raises(MokaError, match=name.replace(".", r"\.")):
        load(run)
