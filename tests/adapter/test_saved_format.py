"""An adapter folder saved by an earlier version loads in this one, and computes what it computed then.

``fixtures/format_1`` was written by moka 0.1.0 (format_version 1, peft 0.21.2): one linear map of 16 x 12, rank 2. Never
write it anew; a new format gets a folder of its own beside it.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import moka
from moka.adapter.config import FORMAT_VERSION

FOLDERS = sorted(Path(__file__).with_name("fixtures").glob("format_*"))


class Net(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.proj = nn.Linear(16, 12)
        self.proj.load_state_dict({name: case[name] for name in ("weight", "bias")})

    def forward(self, x):
        return self.proj(x)


def test_every_format_has_a_saved_folder():
    assert [folder.name for folder in FOLDERS] == [f"format_{i + 1}" for i in range(FORMAT_VERSION)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_saved_adapter_computes_what_it_computed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("case*"))
    case = load_file(folder / "case.safetensors")
    model = PeftModel.from_pretrained(Net(case), tmp_path / "adapter").eval()
    config = model.peft_config["default"]
    assert (config.r, config.alpha, config.interaction_weight) == (2, 6, {"visual": 0.5, "audio": 2.0})
    ids = {name: case[name] for name in ("mm_token_type_ids", "attention_mask")}
    with torch.no_grad(), moka.routing(model, **ids, question_mask=case["question_mask"].bool()):
        y = model(case["x"])
        torch.testing.assert_close(y, case["y"], atol=1e-5, rtol=1e-5)
        bare = nn.functional.linear(case["x"], case["weight"], case["bias"])
    assert (y - bare)[case["attention_mask"].bool()].abs().min(dim=-1).values.max() > 0.01
    assert torch.equal(y[1, 0], bare[1, 0])  # padding
