"""Adapter folders as a run leaves them, with random weights instead of training."""

import copy

import pytest
import torch
from peft import get_peft_model

from moka import MokaConfig
from moka.config import ModelSection
from moka.modeling.artifacts import save_adapter, trained_parts
from moka.modeling.build import build_model


@pytest.fixture
def make_run(backbones, tiny_config, tmp_path):
    """``make_run(backbone="llama", method=MokaConfig, **settings)``: an adapter folder; random B, so that it matters."""

    def make(name="run", backbone="llama", method=MokaConfig, **settings):
        section = copy.deepcopy(tiny_config(tmp_path)["model"])
        section["backbone"] = str(settings.pop("folder", backbones[backbone]))
        torch.manual_seed(0)
        model, processor = build_model(ModelSection(**section, dtype="float32"))
        start = {"init_weights": False} if method is MokaConfig else {"init_lora_weights": False}
        alpha = "alpha" if method is MokaConfig else "lora_alpha"
        default = {"r": 4, alpha: 16, "target_modules": r"language_model\..*\.(?:q_proj|v_proj|down_proj)"}
        config = method(**{**default, **start, **settings}, modules_to_save=trained_parts(model), task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        folder = tmp_path / name / "adapter"
        save_adapter(adapted, processor, folder)
        return folder.parent

    return make
