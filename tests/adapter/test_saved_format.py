"""An adapter folder saved by an earlier version loads in this one, and computes what it computed then.

Each folder ``fixtures/format_N`` has an adapter of one linear map, 16 x 12, rank 2, and ``case.safetensors``: the map's weight
and bias, inputs, ids and the output. Never write one again; a new format gets a folder of its own, made in this way:

- ``format_1`` was written by moka 0.1.0 (peft 0.21.2): parameters ``proj.moka_A``, padding not adapted.
- ``format_2`` is ``format_1`` loaded by the first moka that wrote format 2 (peft 0.21.2) and saved with ``save_pretrained``;
  its case is that of ``format_1`` with the output computed then: parameters ``proj.moka_A.weight``, padding is text.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import moka
from moka.adapter.config import FORMAT_VERSION

FIXTURES = Path(__file__).with_name("fixtures")
FOLDERS = sorted(FIXTURES.glob("format_*"))
PREFIX = "base_model.model.proj."


class Net(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.proj = nn.Linear(16, 12)
        self.proj.load_state_dict({name: case[name] for name in ("weight", "bias")})

    def forward(self, x):
        return self.proj(x)


def load(folder, tmp_path):
    """The adapter in its network, and the case."""
    shutil.copytree(folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("case*"))
    case = load_file(folder / "case.safetensors")
    return PeftModel.from_pretrained(Net(case), tmp_path / "adapter").eval(), case


def test_every_format_has_a_saved_folder():
    assert [folder.name for folder in FOLDERS] == [f"format_{i + 1}" for i in range(FORMAT_VERSION)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_saved_adapter_computes_what_it_computed(folder, tmp_path):
    model, case = load(folder, tmp_path)
    config, real = model.peft_config["default"], case["attention_mask"].bool()
    assert (config.r, config.alpha, config.interaction_weight) == (2, 6, {"visual": 0.5, "audio": 2.0})
    ids = {name: case[name] for name in ("mm_token_type_ids", "attention_mask")}
    with torch.no_grad(), moka.routing(model, **ids, question_mask=case["question_mask"].bool()):
        y = model(case["x"])
    compared = real if folder.name == "format_1" else torch.ones_like(real)
    torch.testing.assert_close(y[compared], case["y"][compared], atol=1e-5, rtol=1e-5)
    bare = nn.functional.linear(case["x"], case["weight"], case["bias"])
    assert (y - bare)[real].abs().amax(-1).min() > 0.01
    # Padding is text.
    layer = model.base_model.model.proj
    A, B = layer.moka_A["default"].weight[config.text_row], layer.moka_B["default"].weight
    text = bare + case["x"] @ A.T @ B.T * 6 / 2
    torch.testing.assert_close(y[~real], text[~real], atol=1e-5, rtol=1e-5)


def test_an_adapter_of_format_1_is_saved_in_todays_format(tmp_path):
    model, _ = load(FIXTURES / "format_1", tmp_path)
    model.save_pretrained(tmp_path / "again")
    saved, expected = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", FIXTURES / "format_2"))
    assert saved.keys() == expected.keys() == {f"{PREFIX}moka_A.weight", f"{PREFIX}moka_B.weight"}
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["format_version"] == FORMAT_VERSION
