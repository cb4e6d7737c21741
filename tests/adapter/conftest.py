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

IMAGE, AUDIO = 126, 127  # placeholder tokens
TYPES = {IMAGE: 1, AUDIO: 3}
BACKBONES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def tiny_backbone(kind: str = "llama", seed: int = 0, **settings):
    config_class, model_class = BACKBONES[kind]
    torch.manual_seed(seed)
    values = {
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        **{"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None, "bos_token_id": None},
        # Larger than usual: with the default 0.02 a tiny random model hardly looks at its context.
        **{"pad_token_id": 0, "initializer_range": 0.1},
    }
    model = model_class(config_class(**values | settings))
    return model.eval()


def strong_(model, seed: int = 1):
    """Random A and B, large enough that the adapter and its interaction clearly change the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".moka_" in name:
            std = 0.1 if "moka_B" in name else 0.3
            parameter.data = (torch.randn(parameter.shape, generator=generator) * std).to(parameter)
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

    @property
    def ids(self) -> dict:
        """All but the tokens."""
        return self.kwargs("mm_token_type_ids", "interaction_ids", "attention_mask")

    @property
    def routed(self) -> dict:
        """What says how to route them."""
        return self.kwargs("mm_token_type_ids", "interaction_ids")

    @property
    def text(self) -> dict:
        """The tokens without what says how to route them."""
        return self.kwargs("input_ids", "attention_mask")

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


def reference(layer, x, types, groups, real):
    """Compute a MokA layer from the definition by plain operators, with a map of all pairs of tokens.

    x: [batch, seq, in]; types, groups, real: [batch, seq], as ``mm_token_type_ids``, ``interaction_ids``, ``attention_mask``.
    """
    y = layer.base_layer(x)
    if layer.disable_adapters:
        return y
    for name in [n for n in (layer.merged_adapters or layer.active_adapters) if n in layer.moka_A]:
        y = y + _reference_update(layer, name, x, types, groups, real.bool()).to(y.dtype)
    return y


def _reference_update(layer, name, x, types, groups, real):
    config, scale = layer.moka_config[name], layer.moka_scaling[name]
    A, B = (part[name].weight.to(x.dtype) for part in (layer.moka_A, layer.moka_B))
    names = list(config.modalities)
    text, row_of = names.index("text"), {i: row for row, ids in enumerate(config.modalities.values()) for i in ids}
    rows = torch.tensor([[row_of[i] for i in row] for row in types.tolist()]).where(real, text)
    before, after = (scale, 1.0) if config.scale_position == "input" else (1.0, scale)
    every = torch.einsum("mri,bti->btmr", A, x) * before
    takes = torch.tensor([config.adapt is None or n in config.adapt for n in names])[rows]
    z = every.gather(2, rows[:, :, None, None].expand(-1, -1, 1, A.shape[1]))[:, :, 0] * takes[..., None]
    part, is_key = (groups > 0) & real & takes, (rows == text) == (config.interaction != "reversed")
    allowed = (groups[:, :, None] == groups[:, None]) & (part & ~is_key)[:, :, None] & (part & is_key)[:, None]
    if config.interaction != "none":
        maps = (z @ z.mT).to(torch.promote_types(z.dtype, torch.float32)) / math.sqrt(z.shape[-1])
        share = maps.masked_fill(~allowed, -1e30).softmax(-1) * allowed
        if config.interaction == "mean":
            share = allowed / allowed.sum(-1, keepdim=True).clamp(1)
        weights = config.interaction_weight
        weights = [weights.get(n, 1.0) if isinstance(weights, dict) else weights for n in names]
        z = z + torch.tensor(weights).to(z.dtype)[rows][..., None] * (share.to(z.dtype) @ z)
    update = z @ B.T if config.share_b else torch.einsum("btor,btr->bto", B[rows], z)
    if (config.text_merged or name in layer.merged_adapters) and (config.adapt is None or "text" in config.adapt):
        update = update - every[:, :, text] @ (B if config.share_b else B[text]).T
    return after * update


@contextmanager
def plain_layers(batch):
    """Compute the MokA layers by the reference, of the tokens of ``batch``; other tokens are decoded text."""

    def forward(layer, x):
        ids = batch.mm_token_type_ids, batch.interaction_ids, batch.attention_mask
        if x.shape[1] != ids[0].shape[1]:
            text = torch.zeros(x.shape[:2], dtype=torch.long)
            ids = text, text, text + 1
        return reference(layer, x, *ids)

    own = MokaLinear.forward
    MokaLinear.forward = forward
    try:
        yield
    finally:
        MokaLinear.forward = own


def logits(model, batch, *names):
    """Logits of a forward on ``batch`` without gradients."""
    with torch.no_grad():
        return model(**batch.kwargs(*names)).logits


def generate(model, inputs, **options):
    """Decode greedily: (new tokens [batch, steps], logits [steps, batch, vocabulary]). ``inputs``: a batch, or arguments."""
    inputs = inputs.kwargs() if isinstance(inputs, Rows) else inputs
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **{**settings, **options})
    return out.sequences[:, -len(out.logits) :], torch.stack(out.logits)


def same(a, b):
    """Assert equality to 1e-4, as of two orders of summation."""
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def same_gradients(found, expected, **tolerance):
    """Assert equality of gradients by name."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def layers_of(model):
    """MokA layers by their names in the backbone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: module for name, module in base.named_modules() if isinstance(module, MokaLinear)}


@pytest.fixture(autouse=True)
def _unexpected_routing_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A MokA layer ran without routing")
        yield


@pytest.fixture(scope="session")
def tiny():
    """The helpers above; test modules cannot import this file."""
    return SimpleNamespace(
        **{
            "IMAGE": IMAGE,
            "AUDIO": AUDIO,
            "Rows": Rows,
            "adapted": adapted,
            "backbone": tiny_backbone,
            "config": config,
        },
        **{
            "generate": generate,
            "gradients": gradients,
            "layers": layers_of,
            "logits": logits,
            "rows": rows,
            "same": same,
        },
        **{"plain_layers": plain_layers, "reference": reference, "same_gradients": same_gradients, "strong_": strong_},
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
