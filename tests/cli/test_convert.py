"""``moka convert``: what it prints, and one line for what it refuses."""

import json

import torch


def source(folder):
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A0": (2, 8), "lora_A1": (2, 8), "lora_A2": (2, 8), "lora_B0": (8, 2)}
    torch.save(
        {f"{module}.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, folder / "adapter_model.bin"
    )
    torch.save({"base_model.model.mm.weight": torch.ones(1)}, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    return folder


def test_there_and_back(moka, tmp_path):
    done = moka("convert", source(tmp_path / "a"), "--output", tmp_path / "out", "--backbone", "some/llama")
    assert done.code == 0, done.err
    for words in (
        "layers: 1; modalities: text, visual, audio; rank: 2",
        "adapter tensors mapped: 4; projector tensors mapped: 0; kept aside: 1 (base_model.model.mm.weight)",
        "alpha 16",
        'from_pretrained("some/llama")',
    ):
        assert words in done.out
    done = moka("convert", tmp_path / "out", "--output", tmp_path / "back", "--to", "official-avt")
    assert done.code == 0, done.err
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        before, after = torch.load(tmp_path / "a" / name), torch.load(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_refusals_are_one_line(refused, tmp_path):
    assert "does not exist" in refused("convert", tmp_path / "no", "--output", tmp_path / "out")
    assert "official-avt, official-vt" in refused(
        "convert", source(tmp_path / "a"), "--output", tmp_path / "out", "--to", "llava"
    )
