"""Names and paths in ``target_modules`` through ``get_peft_model``: the decoder's layers, and those of a vision tower."""

import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

import moka
from moka.adapter import MokaLinear
from moka.adapter.text_decoder import coverage

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_llava():
    """Blocks: 2 of the tower, 12 of the decoder; 24 paths or more are shortened by peft."""
    vision = {"model_type": "clip_vision_model", **TINY, "image_size": 8, "patch_size": 4, "projection_dim": 32}
    text = {"model_type": "llama", **TINY, "num_hidden_layers": 12, "vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=60))


def adapted_layers(model):
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, MokaLinear)}


PATHS = [name for name, _ in tiny_llava().named_modules() if name.endswith((".self_attn.q_proj", ".self_attn.v_proj"))]
DECODER_PATHS = [name for name in PATHS if ".language_model." in name]
TOWER_PATHS = [name for name in PATHS if ".vision_tower." in name]


@pytest.mark.parametrize(
    ("targets", "towers", "expected"),
    [
        (["q_proj", "v_proj"], False, DECODER_PATHS),
        (["q_proj", "v_proj"], True, DECODER_PATHS + TOWER_PATHS),
        (DECODER_PATHS, False, DECODER_PATHS),
        (DECODER_PATHS + TOWER_PATHS, False, DECODER_PATHS + TOWER_PATHS),
        (TOWER_PATHS, False, TOWER_PATHS),
        (r".*vision.*\.[qv]_proj", False, TOWER_PATHS),
    ],
    ids=["names", "towers", "24 paths", "28 paths", "tower", "pattern"],
)
@pytest.mark.filterwarnings("ignore:target_modules. the adapter")
def test_the_layers_that_get_peft_model_adapts(tmp_path, targets, towers, expected):
    """Also after saving and loading, and for a second adapter."""
    assert (len(DECODER_PATHS), len(TOWER_PATHS)) == (24, 4)
    made = moka.MokaConfig(target_modules=targets, adapt_towers=towers, init_weights=False)
    model = get_peft_model(tiny_llava(), made)
    model.add_adapter("second", moka.MokaConfig(target_modules=targets, adapt_towers=towers))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    for one in (model, again):
        layers = adapted_layers(one)
        assert sorted(name for name, m in layers.items() if "default" in m.moka_A) == sorted(expected)
        assert {n for n, m in layers.items() if m.moka_tower} == set(TOWER_PATHS) & set(expected)
        assert {m.moka_tower["default"] for m in layers.values() if m.moka_tower} <= {"visual"}
    assert sorted(name for name, m in adapted_layers(model).items() if "second" in m.moka_A) == sorted(expected)
    assert model.base_model.coverage() == pytest.approx(coverage(model.base_model.model, expected))


@pytest.mark.filterwarnings("ignore:target_modules. the adapter")
def test_a_towers_layers_take_its_modality_for_all_of_their_tokens():
    model = get_peft_model(
        tiny_llava(), moka.MokaConfig(target_modules=["q_proj", "v_proj"], adapt_towers=True, init_weights=False)
    ).train()
    ids = torch.tensor([[1, 60, 60, 60, 60, 7, 8, 9]])
    labels = ids.where(torch.arange(8) == 7, -100)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    layers = adapted_layers(model)
    for name, rows in (TOWER_PATHS[0], [False, True, False]), (DECODER_PATHS[0], [True, True, False]):
        grad = layers[name].moka_A["default"].weight.grad  # [text, visual, audio; r, in]
        assert (grad.flatten(1).norm(dim=1) > 0).tolist() == rows


def test_an_adapter_of_a_small_share_is_reported_with_its_share():
    with pytest.warns(UserWarning, match=r"target_modules.*'default'.*\b\d+%"):
        get_peft_model(tiny_llava(), moka.MokaConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llava(), moka.MokaConfig())
