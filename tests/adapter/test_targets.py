"""Which layers a name, a path, a pattern or the default means in transformers' models, and which tokens are media.

Models are built on the meta device from their default configuration with few layers: only names and shapes count.
"""

import functools
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn

import moka
from moka.adapter import MokaLinear
from moka.adapter.targets import tower_modality
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
    """Someone's own network: an encoder and language models with layers of the same names."""

    def __init__(self, language_models=("language_model",)):
        super().__init__()
        self.encoder = tf.CLIPVisionModel(tf.CLIPVisionConfig(**TINY, image_size=8, patch_size=4))
        for name in language_models:
            setattr(self, name, tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=64)))


def attach(model, **settings):
    """Adapt ``model`` and give it back as it was: the layers by name, the share of the blocks' weights, the config."""
    given = moka.MokaConfig(**settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_modules: the adapter")  # a small share
        adapted = get_peft_model(model, given, low_cpu_mem_usage=True)
    base = adapted.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, MokaLinear)}
    share = adapted.base_model.coverage()
    adapted.unload()
    return layers, share, given


def hits(model, targets=None, **settings):
    """Full names of the layers that are adapted; none if targets match nothing."""
    try:
        return list(attach(model, **{"target_modules": targets, "modalities": {"text": [0]}, **settings})[0])
    except moka.MokaError:
        return []


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


def blocks_of(names):
    return {re.match(r"(.+?)\.\d+\.", name)[1] for name in names}


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
def test_default_targets_and_all_linear_are_projections_of_the_decoders_blocks(name):
    model, (expected, share) = build(name), DEFAULTS[name]
    layers, found, _ = attach(model, modalities={"text": [0]})
    assert leaves(layers) == expected
    assert found == pytest.approx(share, abs=0.01) if share else found < 1
    (blocks,) = blocks_of(layers)
    assert not re.search("vis|aud|tower|talker", blocks)
    everything = hits(model, "all-linear")
    assert set(everything) >= set(layers)
    assert blocks_of(everything) == {blocks}
    assert not leaves(everything) & {"gate", "router", "shared_expert_gate"}  # they choose experts


@pytest.mark.parametrize("name", [LLAVA, "Qwen2AudioForConditionalGeneration"])
def test_bare_names_mean_the_decoder_though_the_tower_has_them(name):
    model = build(name)
    names, everywhere = (hits(model, ["q_proj", "v_proj"], adapt_towers=towers) for towers in (False, True))
    assert leaves(names) == {"q_proj", "v_proj"}
    assert all(".language_model." in f".{name}" for name in names)
    assert set(names) < set(everywhere)
    assert any("tower" in name for name in everywhere)


# Its path differs between versions of transformers.
TOWER = next(n for n, _ in build(LLAVA).named_modules() if n.endswith(".encoder.layers.1.self_attn.q_proj"))


@pytest.mark.parametrize(
    "targets",
    [{TOWER}, {TOWER.removeprefix("model.")}, ".*" + re.escape(TOWER)],
    ids=["path", "end of a path", "pattern"],
)
def test_a_path_or_a_pattern_reaches_the_tower(targets):
    assert hits(build(LLAVA), targets) == [TOWER]


def test_paths_and_bare_names_keep_their_meaning_next_to_each_other():
    names = hits(build(LLAVA), {"k_proj", TOWER})
    assert [name for name in names if "language_model" not in name] == [TOWER]
    assert leaves(names) == {"k_proj", "q_proj"}


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"layers_to_transform": [1, 2]}, {"1", "2"}),
        ({"layers_to_transform": 0}, {"0"}),
        ({"layers_to_transform": 3, "layers_pattern": "layers"}, {"3"}),
        ({"layers_to_transform": []}, {"0", "1", "2", "3"}),
        ({"exclude_modules": ["q_proj"]}, {"0", "1", "2", "3"}),
    ],
)
def test_peft_narrows_the_choice_to_blocks_of_the_language_model(settings, blocks, tmp_path):
    layers, _, made = attach(build(LLAVA), **settings)
    assert {name.split(".")[3] for name in layers} == blocks
    assert leaves(layers) == SEVEN - set(settings.get("exclude_modules", ()))
    assert len(layers) == len(blocks) * len(leaves(layers))
    made.save_pretrained(tmp_path)
    assert moka.MokaConfig.from_pretrained(tmp_path).target_modules == made.target_modules


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
    assert projector in dict(model.named_modules())
    assert projector not in hits(model, {leaf})
    assert projector not in hits(model, "all-linear")
    assert hits(model, {projector}) == [projector]


def test_layers_in_a_list_are_named_in_full():
    """Their last part is a number, as the blocks' own is."""
    assert "transformer.h.0.ffn.2" in hits(build("CTRLLMHeadModel"), "all-linear")


def test_a_network_that_is_not_of_transformers_is_left_to_peft():
    network = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "fc1": nn.Linear(4, 4)})
    assert hits(network) == hits(network, "all-linear") == ["encoder.q_proj", "fc1"]
    assert blocks_of(hits(Wrapper())) == {"language_model.model.layers"}
    assert blocks_of(hits(Wrapper(("one", "two")))) >= {"one.model.layers", "two.model.layers"}  # neither is preferred


def test_layers_of_another_adapter_count_by_the_wrappers_name():
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=64))
    saved = attach(base, target_modules=["k_proj"])[1]
    wrapped = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "k_proj"])
    ).base_model.model
    del wrapped.peft_config  # peft would take it for this adapter's
    with pytest.raises(moka.MokaError, match=r"q_prj.*q_proj") as caught:
        attach(wrapped, target_modules=["q_prj"])
    assert "base_layer" not in str(caught.value)
    model = get_peft_model(wrapped, moka.MokaConfig())
    names = [n for n, m in model.get_base_model().named_modules() if isinstance(m, MokaLinear)]
    assert leaves(names) == SEVEN - {"k_proj"}
    assert not any("lora" in name for name in names)
    assert model.base_model.coverage() == pytest.approx(1 - saved)


def test_coverage_is_the_share_of_the_blocks_weights():
    model = build(LLAMA)
    layers, everything, _ = attach(model)
    sizes = {name: model.get_submodule(name).weight.numel() for name in layers}
    attention, share, _ = attach(model, target_modules=list(ATTENTION))
    assert everything == 1
    assert share == pytest.approx(sum(map(sizes.get, attention)) / sum(sizes.values()))
    assert attach(model, target_modules=[*ATTENTION, "lm_head"])[1] == share  # outside of the blocks
    assert attach(build(LLAVA), target_modules=[TOWER])[1] == 0


def test_coverage_counts_experts_that_are_one_parameter():
    model = build("Qwen3VLMoeForConditionalGeneration")
    layers, share, _ = attach(model)
    blocks = model.get_submodule(blocks_of(layers).pop())
    experts = sum(p.numel() for p in blocks.parameters() if p.dim() == 3)
    total = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    assert 0.5 < experts / total < 1
    assert share < 1 - experts / total


def tiny_llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=64))


NO_IDS = "modality_token_ids"
REFUSED = [
    *[
        (name, {}, f"{name}.*encoder-decoder")
        for name in ("T5ForConditionalGeneration", "BartForConditionalGeneration")
    ],
    *[(f"{name}ForConditionalGeneration", {}, f"{name}.*encoder-decoder") for name in ("Whisper", "Florence2")],
    *[(f"{name}ForConditionalGeneration", {}, f"{name}.*cross-attention") for name in ("Mllama", "Blip")],
    ("IdeficsForVisionText2Text", {}, "IdeficsForVisionText2Text.*cross-attention"),
    ("VoxtralForConditionalGeneration", {}, "modality_token_ids.*Voxtral"),
    ("GitForCausalLM", {}, "modality_token_ids.*GitForCausalLM.*visual"),
    ("Kosmos2ForConditionalGeneration", {}, "modality_token_ids.*Kosmos2"),
    ("XLMWithLMHeadModel", {}, "target_modules.*q_lin"),
    (lambda: nn.Sequential(nn.Linear(4, 4)), {}, r"target_modules.*Sequential.*\['0'\]"),
    (LLAVA, {"target_modules": ["q_porj"]}, "target_modules.*q_porj.*q_proj"),
    (LLAVA, {"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"target_modules.*\[9\].*4 blocks"),
    (
        LLAVA,
        {"target_modules": ["q_proj"], "exclude_modules": "model.*"},
        r"target_modules.*exclude_modules is model\.\*",
    ),
    (LLAVA, {"target_modules": ["linear_1"]}, "target_modules.*'model.multi_modal_projector.linear_1'.*adapt_towers"),
    (LLAVA, {"target_modules": ["layers.0.self_attn"]}, "target_modules.*layers.0.self_attn.*Attention"),
    ("JambaForCausalLM", {"target_modules": r".*experts\.0\.up_proj"}, "target_modules.*experts"),
    (tiny_llama, {"target_modules": ["q_prj", "vproj"]}, "target_modules.*'q_prj', 'vproj'.*Llama.*q_proj.*v_proj"),
    (tiny_llama, {"target_modules": "nothing.*"}, "target_modules.*nothing.*q_proj"),
    (tiny_llama, {"target_modules": ["embed_tokens"]}, "target_modules.*'model.embed_tokens'.*Embedding.*nn.Linear"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_a_model_that_is_refused_is_as_it_was(name, settings, message):
    model = build(name) if isinstance(name, str) else name()
    before = [(key, type(module), sorted(vars(module))) for key, module in model.named_modules()]
    with pytest.raises(moka.MokaError, match=message):
        get_peft_model(model, moka.MokaConfig(**settings))
    assert [(key, type(module), sorted(vars(module))) for key, module in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


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
    assert attach(make(), **settings)[0]


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
    _, _, made = attach(build(name))
    assert made.modality_token_ids == placeholders
    assert made.structure_token_ids == structure


def test_ids_of_the_composed_model_are_beyond_its_vocabulary():
    assert attach(composed())[2].modality_token_ids == {"visual": [64, 65], "audio": [66]}
    assert attach(composed(), modalities={"text": [0], "depth": [4]})[2].modality_token_ids == {"depth": [67]}


def tokenizer(*tokens):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "hello", *tokens])}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>"
    )


def structure_of(processor):
    return moka.MokaConfig.from_processor(processor, turn_markers={"user": [1]}).structure_token_ids


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
    assert structure_of(processor) == [3, 4, 5]


def test_structure_of_a_tokenizer_has_its_own_marks_and_the_tiles_of_a_picture():
    names = tokenizer("<image>", "<boi>", "<row_1_col_1>", "<row_1_col_2>")
    names.add_tokens(["<row_1_col_1>", "<row_1_col_2>"], special_tokens=True)
    names._set_model_specific_special_tokens({"image_token": "<image>", "boi_token": "<boi>"})
    assert structure_of(names) == [3, 4, 5]
    assert structure_of(tokenizer()) == []


def test_structure_of_a_processor_whose_image_token_is_not_the_placeholder():
    """Gemma 3 writes a begin mark into the prompt and expands it to a token that its tokenizer names."""
    names = tokenizer("<soft>", "<boi>", "<eoi>")
    names._set_model_specific_special_tokens({"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    processor = SimpleNamespace(tokenizer=names, image_token="<boi>", image_token_id=3, boi_token="<boi>")
    assert structure_of(processor) == [3, 4]


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
    name = next(full for full, _ in model.named_modules() if full.endswith(name))
    assert tower_modality(model, name, moka.MokaConfig(**settings)) == expected


def test_clippable_layers_of_gemma_4s_tower_are_not_adapted():
    model = build("Gemma4ForConditionalGeneration")
    clippable = {name for name, m in model.named_modules() if type(m).__name__ == "Gemma4ClippableLinear"}
    assert leaves(clippable) & SEVEN
    assert not clippable & {*hits(model), *hits(model, "all-linear")}


# Through saving and training, with a vision tower.


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
