"""The recipes for trainers of others run with ``--tiny``, and leave an adapter that peft loads."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from moka.testing.tiny_mllms import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {
    "plain_trainer": "qwen2.5-omni",
    "accelerate_loop": "qwen2.5-omni",
    "trl_sft": "qwen2.5-omni",
    "trl_dpo": "qwen2.5-vl",
    "trl_grpo": "qwen2.5-vl",
}


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_trains_and_saves(name, tmp_path, monkeypatch):
    if name.startswith("trl"):
        pytest.importorskip("trl", minversion="1.16")
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch, "--tiny", "--output", "out")
    loaded = PeftModel.from_pretrained(tiny_model(KINDS[name]), "out")
    rows = [
        parameter
        for name, parameter in loaded.named_parameters()
        if "moka_B" in name and name.endswith(".weight") and ".q_proj." in name
    ]
    assert rows
    assert all(torch.isfinite(parameter).all() and parameter.any() for parameter in rows)


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_is_short_and_has_help(name, monkeypatch, capsys):
    text = (RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 120
    with pytest.raises(SystemExit) as caught:
        run(name, monkeypatch, "--help")
    assert caught.value.code == 0
    assert "--tiny" in capsys.readouterr().out


def test_rollouts_of_vllm_are_refused(monkeypatch, capsys):
    pytest.importorskip("trl", minversion="1.16")
    with pytest.raises(SystemExit) as caught:
        run("trl_grpo", monkeypatch, "--tiny", "--use-vllm")
    assert caught.value.code == 2
    assert "vLLM knows no MokA" in capsys.readouterr().err
