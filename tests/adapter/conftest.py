"""Tiny random backbones, adapters that clearly change the logits, and rows of text, image and sound tokens."""

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import moka
from moka.adapter import MokaLinear
from moka.adapter.context import running_call
from moka.adapter.routing import uniform_view

IMAGE, AUDIO = 126, 127  # placeholder tokens
TYPES = {IMAGE: 1, AUDIO: 3}
BACKBONES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def tiny_backbone(kind: str = "llama", seed: int = 0):
    config_class, model_class = BACKBONES[kind]
    torch.manual_seed(seed)
    model = model_class(
        config_class(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            # Larger than usual: with the default 0.02 a tiny random model hardly looks at its context.
            initializer_range=0.1,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    return model.eval()


def strong_(model, seed: int = 1):
    """Random A and B, large enough that the adapter and its interaction clearly change the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "moka_A" in name or "moka_B" in name:
            std = 0.3 if "moka_A" in name else 0.1
            parameter.data = (torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype)
    return model


def config(**overrides) -> moka.MokaConfig:
    values = {"r": 4, "alpha": 8, "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"}
    return moka.MokaConfig(**{**values, "modality_token_ids": {"visual": [IMAGE], "audio": [AUDIO]}, **overrides})


def adapted(kind: str = "llama", backbone=None, **overrides):
    """A PeftModel in eval mode. ``overrides`` go to ``MokaConfig``."""
    backbone = backbone if backbone is not None else tiny_backbone(kind)
    return strong_(get_peft_model(backbone, config(**overrides))).eval()


@dataclass
class Rows:
    """A batch of rows: everything a forward takes."""

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    interaction_ids: torch.Tensor
    attention_mask: torch.Tensor

    def kwargs(self, *names) -> dict:
        return {name: getattr(self, name) for name in names or self.__dataclass_fields__}

    def row(self, i: int):
        """Row ``i`` without its padding."""
        real = self.attention_mask[i].bool()
        return Rows(*(getattr(self, name)[i, real][None] for name in self.__dataclass_fields__))


# q: question text, t: other text, i: image, a: audio; a digit after a letter is its group (q and media: 1 by default).
LAYOUTS = ["t i i i a a q q q t", "t i i q q t", "q q a a a i i t t", "t t q q q"]


def rows(layouts=LAYOUTS, side: str = "left", seed: int = 3) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    parsed = []
    for layout in layouts:
        ids, types, groups = [], [], []
        for token in layout.split():
            letter, group = token[0], int(token[1:] or (token[0] != "t"))
            text = int(torch.randint(1, 126, (), generator=generator))
            ids.append({"i": IMAGE, "a": AUDIO}.get(letter, text))
            types.append(TYPES.get(ids[-1], 0))
            groups.append(group)
        parsed.append((ids, types, groups, [1] * len(ids)))
    width = max(len(row[0]) for row in parsed)
    pad = [
        [(part + [0] * (width - len(part))) if side == "right" else ([0] * (width - len(part)) + part) for part in row]
        for row in parsed
    ]
    return Rows(*(torch.tensor([row[k] for row in pad]) for k in range(4)))


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain_forward(layer, x, *args, **kwargs):
    """The layer by plain operators, one token at a time where tokens attend: a reference for everything that is faster."""
    call = running_call(layer.moka_model)
    known = call is not None and call.routing is not None
    routing = call.routing if known else layer.moka_model.routing_outside(layer, call)
    y = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters:
        return y
    for name in layer.adapters_in_use():
        config, s = layer.moka_config[name], layer.moka_scaling[name]
        decodes = routing is not None and routing.text_steps is not None
        view = uniform_view(config, only=routing.only) if decodes else layer.view(name, x, routing)
        A, B = layer.moka_A[name].weight, layer.moka_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        rows = torch.full((len(flat),), view.row) if view.rows is None else view.rows.flatten()
        before, after = (s, 1.0) if config.scale_position == "input" else (1.0, s)
        every = torch.stack([flat @ A[m].to(x.dtype).T for m in range(len(A))]) * before  # [M, tokens, r]
        z = every[rows, torch.arange(len(flat))]
        mask = torch.ones(len(flat), 1) if view.adapter_mask is None else view.adapter_mask.float()
        z = z * (0 if view.disabled else mask.to(z.dtype))
        mixed = z
        if view.attention is not None:
            seq = view.rows.shape[1]
            for b, (queries, keys) in enumerate(zip(view.attention.query, view.attention.key, strict=True)):
                for i, q in enumerate(queries):
                    allowed = [
                        k for j, k in enumerate(keys) if view.attention.mask is None or view.attention.mask[b, i, j]
                    ]
                    weight = view.attention.weight[b, i].item()
                    if not allowed or not weight:
                        continue
                    k = torch.stack([z[b * seq + j] for j in allowed])
                    share = torch.full((len(k),), 1 / len(k))
                    if config.interaction != "mean":
                        share = ((k @ z[b * seq + q]).float() / math.sqrt(z.shape[1])).softmax(0)
                    step = torch.zeros_like(z)
                    step[b * seq + q] = 1
                    mixed = mixed + weight * step * (share.to(k.dtype) @ k)
        own = B if config.share_b else B[rows]
        update = mixed @ own.to(z.dtype).T if config.share_b else torch.einsum("tor,tr->to", own.to(z.dtype), mixed)
        if layer.is_merged(name):
            text = every[config.text_row]
            update = update - text @ (B if config.share_b else B[config.text_row]).to(z.dtype).T
        y = y + (after * update).view(y.shape).to(y.dtype)
    return y


@contextmanager
def plain_layers():
    """Compute the MokA layers by the reference above."""
    own = MokaLinear.forward
    MokaLinear.forward = _plain_forward
    try:
        yield
    finally:
        MokaLinear.forward = own


@pytest.fixture(autouse=True)
def _unexpected_routing_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A MokA layer ran without routing")
        yield


@pytest.fixture(scope="session")
def tiny():
    """The helpers above; test modules cannot import this file."""
    return SimpleNamespace(
        IMAGE=IMAGE,
        AUDIO=AUDIO,
        Rows=Rows,
        adapted=adapted,
        backbone=tiny_backbone,
        config=config,
        gradients=gradients,
        plain_layers=plain_layers,
        rows=rows,
        strong_=strong_,
    )


@pytest.fixture(scope="module", params=list(BACKBONES))
def pair(request):
    """A PeftModel on each tiny backbone; read-only."""
    return adapted(request.param)


@pytest.fixture
def model():
    """A fresh adapted llama."""
    return adapted("llama")


@pytest.fixture
def batch() -> Rows:
    """Four rows, left-padded."""
    return rows()
