"""Which layers a name, a path, a pattern or the default means in transformers' models, and which tokens are media.

Models are built on the meta device from their default configuration with few layers: only names and shapes count.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule
from tokenizers import Tokenizer, models
from torch import nn

import moka
from moka.adapter.targets import (
    check_supported,
    coverage,
    decoder_scope,
    fill_targets,
    matches,
    no_match,
    placeholder_ids,
    structure_ids,
    tower_modality,
)
from moka.adapter.text_decoder import decoder_blocks, is_linear, named_modules
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.model import MokaForConditionalGeneration

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SEVEN = {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
MERGED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
MLA = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEAR_ATTENTION = {*SEVEN, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
BERT = {"query", "key", "value", "dense"}
FALCON = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COUNTS = ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_blocks", "n_layer", "n_layers")
SETTINGS = {
    "Gemma3nForCausalLM": {"num_hidden_layers": 5, "num_kv_shared_layers": 0},
    "Gemma4ForConditionalGeneration": {"vision_config": {}, "audio_config": {}},
    "Phi4MultimodalForCausalLM": {"vision_config": {}, "audio_config": {}},
    "AyaVisionForConditionalGeneration": {"vision_config": {"model_type": "siglip_vision_model", **TINY}},
    "Lfm2VlForConditionalGeneration": {
        "text_config": {"model_type": "lfm2", **TINY, "layer_types": ["conv", "full_attention"]}
    },
}


def shrink(config, layers=4):
    if not hasattr(config, "pad_token_id"):  # some of transformers 5.0 do not get the default that their models read
        config.pad_token_id = None
    for name in COUNTS:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, min(layers, getattr(config, name)))
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(vars(config).get(name), list):
            setattr(config, name, getattr(config, name)[:layers])
    for inner in vars(config).values():
        if isinstance(inner, tf.PreTrainedConfig):
            shrink(inner, layers)
    return config


@functools.cache
def build(name):
    """One of transformers' models; read-only."""
    model_class = getattr(tf, name, None)
    if model_class is None:
        pytest.skip(f"this transformers has no {name}")
    try:
        with torch.device("meta"):
            return model_class(shrink(model_class.config_class(**SETTINGS.get(name, {}))))
    except ImportError as error:
        pytest.skip(f"{name} needs a package that is not installed: {str(error).strip()[:80]}")


LLAVA, LLAMA = "LlavaForConditionalGeneration", "LlamaForCausalLM"


@functools.cache
def composed():
    visual = {"encoder": {"type": "clip", "model_config": {**TINY, "image_size": 16, "patch_size": 8}}}
    audio = {"encoder": {"type": "conv-audio", "frames": 8, "channels": [6], "width": 8, "num_tokens": 3}}
    modalities = {"visual": {**visual, "projector": {"type": "mlp"}}, "audio": {**audio, "projector": {"type": "mlp"}}}
    text = {"model_type": "llama", **TINY, "vocab_size": 64}
    return MokaForConditionalGeneration(MokaModelConfig(text, modalities))


class Wrapper(nn.Module):
    """Someone's own network: an encoder and a language model with layers of the same names."""

    def __init__(self):
        super().__init__()
        self.encoder = tf.CLIPVisionModel(tf.CLIPVisionConfig(**TINY, image_size=8, patch_size=4))
        self.language_model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=64))


def config(adapt_towers=False, **settings):
    made = moka.MokaConfig(**settings)
    made.adapt_towers = adapt_towers
    return made


def hits(model, targets=None, **settings):
    """Full names of the modules that are adapted."""
    made = config(target_modules=targets, **settings)
    fill_targets(made, model)
    scope = decoder_scope(model)
    return [name for name, _ in named_modules(model) if name and matches(made, name, scope)]


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


DEFAULTS = {
    # name: leaf names, share of the blocks' weights
    "LlamaForCausalLM": (SEVEN, 1.0),
    LLAVA: (SEVEN, 1.0),
    "LlavaNextForConditionalGeneration": (SEVEN, 1.0),
    "LlavaNextVideoForConditionalGeneration": (SEVEN, 1.0),
    "LlavaOnevisionForConditionalGeneration": (SEVEN, 1.0),
    "Qwen2AudioForConditionalGeneration": (SEVEN, 1.0),
    "Qwen2_5_VLForConditionalGeneration": (SEVEN, 1.0),
    "Qwen2_5OmniThinkerForConditionalGeneration": (SEVEN, 1.0),
    "Qwen2_5OmniForConditionalGeneration": (SEVEN, 1.0),
    "Qwen3VLForConditionalGeneration": (SEVEN, 1.0),
    "Qwen3VLMoeForConditionalGeneration": (ATTENTION, None),
    "Qwen3OmniMoeThinkerForConditionalGeneration": (ATTENTION, None),
    "Qwen3_5ForConditionalGeneration": (LINEAR_ATTENTION, 1.0),
    "Qwen3_5MoeForConditionalGeneration": (LINEAR_ATTENTION, None),
    "Qwen3NextForCausalLM": ({*SEVEN, "in_proj_qkvz", "in_proj_ba", "out_proj"}, None),
    "Gemma3ForConditionalGeneration": (SEVEN, 1.0),
    "Gemma3nForConditionalGeneration": (SEVEN, None),
    "Gemma3nForCausalLM": (SEVEN, None),
    "Gemma4ForConditionalGeneration": (SEVEN, None),
    "InternVLForConditionalGeneration": (SEVEN, 1.0),
    "PaliGemmaForConditionalGeneration": (SEVEN, 1.0),
    "VoxtralForConditionalGeneration": (SEVEN, 1.0),
    "Mistral3ForConditionalGeneration": (SEVEN, 1.0),
    "Phi4MultimodalForCausalLM": (MERGED, 1.0),
    "Glm4vForConditionalGeneration": ({*ATTENTION, "gate_up_proj", "down_proj"}, 1.0),
    "Lfm2VlForConditionalGeneration": (
        {"q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"},
        1.0,
    ),
    "GraniteSpeechForConditionalGeneration": (SEVEN, 1.0),
    "Ovis2ForConditionalGeneration": (SEVEN, 1.0),
    "AyaVisionForConditionalGeneration": (SEVEN, 1.0),
    "Cohere2VisionForConditionalGeneration": (SEVEN, 1.0),
    "Llama4ForConditionalGeneration": (SEVEN, None),
    "VideoLlama3ForConditionalGeneration": (SEVEN, 1.0),
    "AudioFlamingo3ForConditionalGeneration": (SEVEN, 1.0),
    "Kimi_K25ForConditionalGeneration": (MLA, None),
    "DeepseekV3ForCausalLM": (MLA, None),
    "Blip2ForConditionalGeneration": ({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 1.0),
    "FuyuForCausalLM": (FALCON, 1.0),
    "FalconForCausalLM": (FALCON, 1.0),
    "GPT2LMHeadModel": ({"c_attn", "c_proj", "c_fc"}, 1.0),
    "GPTJForCausalLM": ({"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}, 1.0),
    "MptForCausalLM": ({"Wqkv", "out_proj", "up_proj", "down_proj"}, 1.0),
    "BertModel": (BERT, 1.0),
    "Mamba2ForCausalLM": ({"in_proj"}, None),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_targets_are_the_projections_of_the_decoders_blocks(name):
    model, (expected, share) = build(name), DEFAULTS[name]
    names = hits(model)
    blocks = decoder_blocks(model)[0]
    assert leaves(names) == expected
    assert [name for name in names if not name.startswith(f"{blocks}.")] == []
    assert all(is_linear(model.get_submodule(name)) for name in names)
    if share is not None:
        assert coverage(model, names) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", DEFAULTS)
def test_all_linear_means_the_decoders_blocks_without_what_chooses_experts(name):
    model = build(name)
    names = hits(model, "all-linear")
    assert set(names) >= set(hits(model))
    assert all(name.startswith(f"{decoder_blocks(model)[0]}.") for name in names)
    assert all(is_linear(model.get_submodule(name)) for name in names)
    assert not leaves(names) & {"gate", "router", "shared_expert_gate"}


@pytest.mark.parametrize("name", [LLAVA, "Qwen2AudioForConditionalGeneration", "Gemma4ForConditionalGeneration"])
def test_bare_names_mean_the_decoder_though_the_tower_has_them(name):
    model = build(name)
    names, everywhere = (hits(model, {"q_proj", "v_proj"}, adapt_towers=towers) for towers in (False, True))
    assert leaves(names) == {"q_proj", "v_proj"}
    assert all(".language_model." in f".{name}" for name in names)
    assert set(names) < set(everywhere)
    assert any("tower" in name for name in everywhere)


# Its path differs between versions of transformers.
TOWER = next(n for n, _ in named_modules(build(LLAVA)) if n.endswith(".encoder.layers.1.self_attn.q_proj"))


@pytest.mark.parametrize(
    "targets",
    [
        {TOWER},
        {TOWER.removeprefix("model.")},
        rf".*{TOWER}".replace(".", r"\.").replace(r"\.*", ".*"),
    ],
    ids=["path", "end of a path", "pattern"],
)
def test_a_path_or_a_pattern_reaches_the_tower(targets):
    assert hits(build(LLAVA), targets) == [TOWER]


def test_paths_and_bare_names_keep_their_meaning_next_to_each_other():
    names = hits(build(LLAVA), {"k_proj", TOWER})
    assert [name for name in names if "language_model" not in name] == [TOWER]
    assert leaves(names) == {"k_proj", "q_proj"}


def test_paths_that_peft_shortened_still_reach_the_tower():
    model, key = build("Qwen2_5_VLForConditionalGeneration"), "model.visual.blocks.0.attn.qkv"
    shortened, scope = config(target_modules={"qkv"}), decoder_scope(model)
    assert matches(shortened, key, scope, given={key})
    assert not matches(shortened, key, scope)
    assert not matches(shortened, key, scope, given={"qkv"})


def test_peft_narrows_the_choice_as_it_does_for_names():
    model = build(LLAVA)
    assert {name.split(".")[3] for name in hits(model, layers_to_transform=[1, 2])} == {"1", "2"}
    assert {name.split(".")[3] for name in hits(model, layers_to_transform=3, layers_pattern="layers")} == {"3"}
    assert leaves(hits(model, exclude_modules={"q_proj"})) == SEVEN - {"q_proj"}
    made, key = (
        config(target_modules={"q_proj"}, exclude_modules={"q_proj"}),
        "model.language_model.layers.0.self_attn.q_proj",
    )
    assert isinstance(matches(made, key, decoder_scope(model)), _ExcludedModule)  # peft reports these


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: build(LLAVA), "lm_head"),
        (lambda: build("Qwen2_5OmniForConditionalGeneration"), "thinker.lm_head"),
        (lambda: build("Llama4ForConditionalGeneration"), "language_model.lm_head"),
        (composed, "language_model.lm_head"),
        (Wrapper, "language_model.lm_head"),
    ],
    ids=["LLaVA", "Omni", "Llama 4", "composed", "wrapper"],
)
def test_the_output_head_is_reached_by_name(make, head):
    assert hits(make(), {"lm_head"}) == [head]
    assert head not in hits(make(), "all-linear")


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        (LLAVA, "model.multi_modal_projector.linear_1"),
        ("Phi4MultimodalForCausalLM", "model.embed_tokens_extend.image_embed.img_projection_up"),
        ("Phi4MultimodalForCausalLM", "model.embed_tokens_extend.audio_embed.up_proj_for_speech"),
        ("BertModel", "pooler.dense"),
        ("Mamba2ForCausalLM", "backbone.layers.0.mixer.out_proj"),  # a fused kernel reads its weight
    ],
)
def test_a_layer_that_does_not_read_the_text_takes_a_path(name, projector):
    model, leaf = build(name), projector.rpartition(".")[2]
    assert projector in dict(named_modules(model))
    assert projector not in hits(model, {leaf})
    assert projector not in hits(model, "all-linear")
    assert hits(model, {projector}) == [projector]


def test_cross_attention_is_no_part_of_the_decoders_scope():
    names = hits(build("MllamaForConditionalGeneration"), {"q_proj"})
    assert names
    assert all(".self_attn." in name and ".language_model." in name for name in names)


def test_layers_in_a_list_are_named_in_full():
    """Their last part is a number, as the blocks' own is."""
    model = build("CTRLLMHeadModel")
    names = hits(model, "all-linear")
    assert "transformer.h.0.ffn.2" in names
    assert all(is_linear(model.get_submodule(name)) for name in names)


def test_a_network_that_is_not_of_transformers_is_left_to_peft():
    network = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "fc1": nn.Linear(4, 4)})
    assert decoder_scope(network) is None
    assert set(hits(network)) == {"encoder.q_proj", "fc1"}
    made = config(target_modules="all-linear")
    fill_targets(made, network)
    assert made.target_modules == {"encoder.q_proj", "fc1"}
    parents = {name.rpartition(".")[0].partition(".layers")[0] for name in hits(Wrapper())}
    assert parents == {"language_model.model"}


def test_a_model_without_known_names_asks_for_them():
    with pytest.raises(moka.MokaError) as caught:
        fill_targets(config(), build("XLMWithLMHeadModel"))
    assert "target_modules" in str(caught.value)
    assert "q_lin" in str(caught.value)


def test_layers_of_another_adapter_count_by_the_wrappers_name():
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=64))
    before = coverage(base, hits(base, {"q_proj", "v_proj"}))
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).base_model.model
    assert leaves(hits(wrapped)) == SEVEN
    assert leaves(hits(wrapped, "all-linear")) == SEVEN
    assert not any("base_layer" in name or "lora" in name for name in decoder_scope(wrapped))
    assert coverage(wrapped, hits(wrapped, {"q_proj", "v_proj"})) == before
    assert "q_proj" in no_match(config(target_modules={"q_prj"}), wrapped)
    assert "base_layer" not in no_match(config(target_modules={"layer"}), wrapped)


def test_coverage_is_the_share_of_the_blocks_weights():
    model = build(LLAMA)
    attention = hits(model, ATTENTION)
    sizes = {name: model.get_submodule(name).weight.numel() for name in hits(model)}
    assert coverage(model, attention) == pytest.approx(sum(map(sizes.get, attention)) / sum(sizes.values()))
    assert coverage(model, hits(model, {"q_proj", "v_proj"})) < 0.5
    assert coverage(model, [*attention, "lm_head"]) == coverage(model, attention)  # outside of the blocks
    assert coverage(build(LLAVA), [TOWER]) == 0


def test_coverage_counts_experts_that_are_one_parameter():
    model = build("Qwen3VLMoeForConditionalGeneration")
    blocks = model.get_submodule(decoder_blocks(model)[0])
    experts = sum(p.numel() for p in blocks.parameters() if p.dim() == 3)
    total = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    assert 0.5 < experts / total < 1
    assert coverage(model, hits(model)) < 1 - experts / total


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": {"q_porj"}}, ["q_porj", "q_proj"]),
        ({"target_modules": {"q_proj"}, "layers_to_transform": [9]}, ["[9]", "4 blocks"]),
        ({"target_modules": {"q_proj"}, "layers_to_transform": 0}, ["layers_to_transform is 0"]),
        ({"target_modules": {"q_proj"}, "exclude_modules": "model.*"}, ["exclude_modules is model.*"]),
        ({"target_modules": {"linear_1"}}, ["model.multi_modal_projector.linear_1", "adapt_towers"]),
    ],
)
def test_targets_that_match_nothing_get_the_nearest_names_and_the_reason(settings, expected):
    message = no_match(config(**settings), build(LLAVA))
    assert "target_modules" in message
    assert ("adapt_towers" in message) == ("adapt_towers" in expected)
    assert all(part in message for part in expected)


# Which models can be adapted.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("T5ForConditionalGeneration", "encoder-decoder"),
        ("BartForConditionalGeneration", "encoder-decoder"),
        ("WhisperForConditionalGeneration", "encoder-decoder"),
        ("Florence2ForConditionalGeneration", "encoder-decoder"),
        ("MllamaForConditionalGeneration", "cross-attention"),
        ("IdeficsForVisionText2Text", "cross-attention"),
        ("BlipForConditionalGeneration", "cross-attention"),
        ("VoxtralForConditionalGeneration", "modality_token_ids"),
        ("GitForCausalLM", "modality_token_ids"),
        ("Kosmos2ForConditionalGeneration", "modality_token_ids"),
    ],
)
def test_models_whose_media_cannot_be_routed_are_refused(name, reason):
    model, made = build(name), config()
    made.modality_token_ids = placeholder_ids(model, made)
    with pytest.raises(moka.MokaError) as caught:
        check_supported(model, made)
    assert name in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: build(LLAVA), {}),
        (lambda: build("Phi4MultimodalForCausalLM"), {}),
        (lambda: build("Qwen2_5OmniForConditionalGeneration"), {}),
        (lambda: build(LLAMA), {}),
        (lambda: build("BertModel"), {}),
        (lambda: build("VoxtralForConditionalGeneration"), {"modality_token_ids": {"audio": [24]}}),
        (lambda: build("VoxtralForConditionalGeneration"), {"modalities": {"text": [0]}}),
        (lambda: build("Blip2ForConditionalGeneration"), {"modality_token_ids": {"visual": [50265]}}),
        (composed, {}),
        (composed, {"modalities": {"text": [0], "depth": [4]}}),
        (Wrapper, {}),
    ],
)
def test_models_whose_media_are_tokens_are_accepted(make, settings):
    model, made = make(), config(**settings)
    made.modality_token_ids = made.modality_token_ids or placeholder_ids(model, made)
    check_supported(model, made)


# Tokens of media.


@pytest.mark.parametrize(
    ("name", "placeholders", "structure"),
    [
        (LLAVA, {"visual": [32000]}, []),
        ("Qwen2_5_VLForConditionalGeneration", {"visual": [151655, 151656]}, [151652, 151653]),
        (
            "Qwen2_5OmniForConditionalGeneration",
            {"visual": [151655, 151656], "audio": [151646]},
            [151647, 151648, 151652, 151653],
        ),
        ("Gemma3ForConditionalGeneration", {"visual": [262144]}, [255999, 256000]),
        (
            "Gemma4ForConditionalGeneration",
            {"visual": [258880, 258884], "audio": [258881]},
            [255999, 256000, 258882, 258883],
        ),
        ("Glm4vForConditionalGeneration", {"visual": [151343, 151344]}, [151339, 151340, 151341, 151342]),
        ("Phi4MultimodalForCausalLM", {"visual": [200010], "audio": [200011]}, []),
        ("Ovis2ForConditionalGeneration", {"visual": [151665]}, [151666, 151667, 151668, 151669, 151670]),
        (LLAMA, {}, []),
    ],
)
def test_ids_that_the_configuration_names(name, placeholders, structure):
    model = build(name)
    assert placeholder_ids(model, config()) == placeholders
    assert structure_ids(model) == structure_ids(model.config) == structure
    only_audio = config(modalities={"text": [0], "sound": [3]})
    assert placeholder_ids(model, only_audio).get("sound") == placeholders.get("audio")


def test_ids_of_the_composed_model_are_beyond_its_vocabulary():
    assert placeholder_ids(composed(), config()) == {"visual": [64, 65], "audio": [66]}
    assert placeholder_ids(composed(), config(modalities={"text": [0], "depth": [4]})) == {"depth": [67]}


def tokenizer(*tokens):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "hello", *tokens])}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>"
    )


def test_structure_of_a_processor_is_by_its_attributes():
    names = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|tile|>", "<|user|>")
    processor = SimpleNamespace(
        tokenizer=names,
        image_token="[IMG]",
        image_token_id=2,
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        image_end_token_id=4,
        tile_token="<|tile|>",
        end_of_utterance_token="<|user|>",
        audio_token="<not in the vocabulary>",
        num_image_tokens=1,
    )
    assert structure_ids(processor) == [3, 4, 5]
    assert structure_ids(processor, placeholders=[5]) == [2, 3, 4]


def test_structure_of_a_tokenizer_has_its_own_marks_and_the_tiles_of_a_picture():
    names = tokenizer("<image>", "<boi>", "<row_1_col_1>", "<row_1_col_2>")
    names.add_tokens(["<row_1_col_1>", "<row_1_col_2>"], special_tokens=True)
    names._set_model_specific_special_tokens({"image_token": "<image>", "boi_token": "<boi>"})
    assert structure_ids(names) == [3, 4, 5]
    assert structure_ids(tokenizer()) == []


def test_structure_of_a_processor_whose_image_token_is_not_the_placeholder():
    """Gemma 3 writes a begin mark into the prompt and expands it to a token that its tokenizer names."""
    names = tokenizer("<soft>", "<boi>", "<eoi>")
    names._set_model_specific_special_tokens({"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    processor = SimpleNamespace(tokenizer=names, image_token="<boi>", image_token_id=3, boi_token="<boi>")
    assert structure_ids(processor) == [3, 4]


BOTH, SPLIT = {"visual": [1], "audio": [3]}, {"text": [0], "image": [1], "clip": [2], "speech": [3]}


@pytest.mark.parametrize(
    ("make", "name", "settings", "expected"),
    [
        (lambda: build(LLAVA), TOWER, {}, "visual"),
        (
            lambda: build(LLAVA),
            "model.multi_modal_projector.linear_1",
            {"modality_token_ids": {"visual": [7]}},
            "visual",
        ),
        (lambda: build(LLAVA), "model.multi_modal_projector.linear_1", {"modality_token_ids": BOTH}, "text"),
        (lambda: build(LLAVA), TOWER, {"modalities": {"text": [0], "audio": [3]}}, "text"),
        (lambda: build(LLAVA), TOWER, {"modalities": SPLIT}, "image"),
        (
            lambda: build("Qwen2AudioForConditionalGeneration"),
            "audio_tower.layers.0.fc1",
            {"modalities": SPLIT},
            "speech",
        ),
        (
            lambda: build("Gemma4ForConditionalGeneration"),
            "audio_tower.layers.0",
            {"modality_token_ids": BOTH},
            "audio",
        ),
        (lambda: build("Qwen2_5_VLForConditionalGeneration"), "visual.blocks.0.attn.qkv", {}, "visual"),
        (composed, "encoders.visual", {}, "visual"),
        (composed, "projectors.audio", {"modality_token_ids": BOTH}, "audio"),
    ],
)
def test_the_modality_of_a_towers_layer(make, name, settings, expected):
    model = make()
    name = next(full for full, _ in named_modules(model) if full.endswith(name))
    assert tower_modality(model, name, config(**settings)) == expected


def test_clippable_layers_of_gemma_4s_tower_are_not_adapted():
    model = build("Gemma4ForConditionalGeneration")
    clippable = {name for name, m in named_modules(model) if type(m).__name__ == "Gemma4ClippableLinear"}
    assert leaves(clippable) & SEVEN
    assert not clippable & {*hits(model), *hits(model, "all-linear")}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("WhisperForConditionalGeneration", {}, r"WhisperForConditionalGeneration.*encoder-decoder"),
        ("MllamaForConditionalGeneration", {}, r"MllamaForConditionalGeneration.*cross-attention"),
        ("GitForCausalLM", {}, r"modality_token_ids.*GitForCausalLM.*visual"),
        (
            LLAVA,
            {"target_modules": ["linear_1"]},
            r"target_modules.*'model.multi_modal_projector.linear_1'.*adapt_towers",
        ),
        (LLAVA, {"target_modules": ["layers.0.self_attn"]}, r"target_modules.*layers.0.self_attn.*Attention"),
        ("JambaForCausalLM", {"target_modules": r".*experts\.0\.up_proj"}, r"target_modules.*experts"),
    ],
)
def test_a_model_that_is_refused_is_as_it_was(name, settings, message):
    model = build(name)
    before = [(key, type(module)) for key, module in model.named_modules()]
    with pytest.raises(moka.MokaError, match=message):
        get_peft_model(model, config(**settings))
    assert [(key, type(module)) for key, module in model.named_modules()] == before
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj", "vproj"]}, r"'q_prj', 'vproj'.*LlamaForCausalLM.*q_proj.*v_proj"),
        ({"target_modules": "nothing.*"}, r"nothing.*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform.*\[7\].*2 blocks"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, r"'model.embed_tokens'.*Embedding.*nn.Linear, Conv1D"),
    ],
)
def test_target_modules(tiny, settings, message):
    backbone = tiny.backbone()
    before = sorted(vars(backbone))
    with pytest.raises(moka.MokaError, match=f"target_modules.*{message}"):
        get_peft_model(backbone, tiny.config(**settings))
    assert sorted(vars(backbone)) == before
    assert not backbone._forward_pre_hooks


def test_default_layers_that_a_model_lacks(tiny):
    with pytest.raises(moka.MokaError, match=r"target_modules.*Sequential.*\['0'\]"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), tiny.config(task_type=None))
