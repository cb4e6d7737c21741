"""Composed and Hugging Face multimodal models, tiny and random, with a batch that has answers."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka.modeling import MokaModelConfig
from moka.testing.mllms import CASES, backbone, prompt

HF = ("llava", "qwen2_5_vl", "qwen2_5_omni")


@dataclass
class Example:
    """A model in eval mode, a batch with labels, and the batch's media inputs by modality."""

    model: Any
    batch: dict[str, Any]
    media: dict[str, list[str]] = field(default_factory=dict)


def with_adapter(model, kind):
    settings = {"r": 4, "task_type": "CAUSAL_LM"}
    if kind == "moka":
        model = get_peft_model(model, moka.MokaConfig(**settings, dropout=0.0, init_weights=False))
    elif kind == "lora":
        names = r".*(language_model|model)\.layers\..*(q_proj|v_proj)"
        model = get_peft_model(model, LoraConfig(**settings, target_modules=names, init_lora_weights=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_" in name or "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def composed_example(adapter="moka", seed=0):
    """Two media, one of them missing in the second row; left-padded."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    image = {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": 8, "num_tokens": 2, "dropout": 0.0}
    sound = {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3, "dropout": 0.0}
    modalities = {
        "visual": {"encoder": image, "projector": {"type": "linear"}},
        "audio": {"encoder": sound, "projector": {"type": "linear"}},
    }
    model = moka.MokaForConditionalGeneration(MokaModelConfig(text, modalities), LlamaForCausalLM(text)).eval()
    for projector in model.projectors.values():
        projector.output.weight.data.normal_(std=0.4)
    i, a = model.config.placeholder_id(1), model.config.placeholder_id(3)
    ids = torch.tensor([[1, i, i, a, a, a, 7, 8, 9, 20, 21], [0, 0, 0, 1, i, i, 11, 12, 13, 22, 23]])
    types = torch.tensor([[0, 1, 1, 3, 3, 3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]])
    groups = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels = torch.where((types == 0) & (groups == 0) & (ids > 1), ids, -100)
    batch = {
        "input_ids": ids,
        "mm_token_type_ids": types,
        "interaction_ids": groups,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(2, *model.encoders["visual"].dummy_input(1).shape[1:]),
        "input_features": torch.randn(1, *model.encoders["audio"].dummy_input(1).shape[1:]),
    }
    return Example(with_adapter(model, adapter), batch, {"visual": ["pixel_values"], "audio": ["input_features"]})


def hugging_face_example(name, adapter="none"):
    case = CASES[name]
    row = prompt(case)
    names = {
        "visual": [n for n in row.media if n.startswith("pixel")],
        "audio": [n for n in row.media if n == "input_features"],
    }
    batch = {**row.everything, "labels": row.labels}
    return Example(with_adapter(backbone(case), adapter), batch, {k: v for k, v in names.items() if v})


EXAMPLES = {
    **{f"composed, {adapter}": (composed_example, adapter) for adapter in ("moka", "lora", "none")},
    **{f"{name}, none": (hugging_face_example, name) for name in HF},
    **{f"{name}, {adapter}": (hugging_face_example, name, adapter) for name in HF[1:2] for adapter in ("moka", "lora")},
    "qwen2_5_omni, moka": (hugging_face_example, "qwen2_5_omni", "moka"),
}


@pytest.fixture(params=list(EXAMPLES))
def example(request):
    make, *arguments = EXAMPLES[request.param]
    return make(*arguments)


@pytest.fixture
def composed():
    return composed_example


@pytest.fixture
def hugging_face():
    return hugging_face_example
