"""Tiny random instances of transformers' own multimodal models, and batches for them, as their processors would build.

A layout describes a row: capital letters are media (I image, V video, A sound), ``q`` is question text, ``a`` an answer token
and ``t`` other text. The placeholder token is repeated once per feature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as tf
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen2_5_omni_modeling
from transformers.models.qwen2_audio import modeling_qwen2_audio as qwen2_audio_modeling

VOCABULARY = 128
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = SPECIAL = range(120, 127)
PLACEHOLDER = {"I": (IMAGE, 1), "V": (VIDEO, 2), "A": (AUDIO, 3)}  # letter -> token, type
AROUND = {"I": (VISION_START, VISION_END), "V": (VISION_START, VISION_END), "A": (AUDIO_START, AUDIO_END)}
ROW = {0: "", 1: "IV", 2: "A"}  # row of moka_A -> the letters that take it

# With the default initializer_range of 0.02 a tiny random model hardly looks at its context.
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.1}
TEXT: dict[str, Any] = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MROPE: dict[str, Any] = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
TOWER: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "patch_size": 4}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "initializer_range": 0.1,
}
AUDIO_TOWER: dict[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 8,
    "initializer_range": 0.1,
}
BY_INDEX: dict[str, Any] = {"image_token_index": IMAGE, "video_token_index": VIDEO}
BY_ID: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def llava():
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER, image_size=8),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )


def llava_onevision():
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, image_size=8, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_grid_pinpoints=[[8, 8]],
        **BY_INDEX,
    )


def video_llava():
    return tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER, image_size=8),
        text_config=tf.LlamaConfig(**TEXT),
        vision_feature_layer=-1,
        **BY_INDEX,
    )


def qwen2_vl():
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return tf.Qwen2VLConfig(text_config=dict(MROPE), vision_config={**tower, "initializer_range": 0.1}, **BY_ID)


def qwen2_5_vl():
    return tf.Qwen2_5_VLConfig(text_config=dict(MROPE), vision_config=dict(QWEN_TOWER), **BY_ID)


def qwen2_audio():
    return tf.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={**AUDIO_TOWER, "model_type": "qwen2_audio_encoder"},
        audio_token_index=AUDIO,
    )


def qwen2_5_omni():
    marks: dict[str, Any] = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    marks |= {"audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END, "audio_token_index": AUDIO}
    return tf.Qwen2_5OmniThinkerConfig(
        text_config=dict(MROPE),
        vision_config=dict(QWEN_TOWER),
        audio_config={**AUDIO_TOWER, "n_window": 4, "output_dim": 32},
        **marks,
        **BY_INDEX,
    )


def idefics3(config_class=tf.Idefics3Config):
    return config_class(
        vision_config={**TOWER, "image_size": 16},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def smolvlm():
    return idefics3(tf.SmolVLMConfig)


def pictures(count, *shape):
    return {"pixel_values": torch.randn(count, *shape)}


def stills(count, *shape):
    """Video-LLaVA's pictures, which transformers called otherwise before 5.23."""
    named = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    return {"pixel_values" if "pixel_values" in named else "pixel_values_images": torch.randn(count, *shape)}


def clips(count, *shape):
    return {"pixel_values_videos": torch.randn(count, *shape)}


def anyres(count):
    return {**pictures(count, 2, 3, 8, 8), "image_sizes": torch.full((count, 2), 8)}


def qwen_pictures(count):
    grid = torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": torch.randn(16 * count, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def qwen_clips(count):
    grid = torch.tensor([[2, 4, 4]] * count)
    return {"pixel_values_videos": torch.randn(32 * count, 3 * 2 * 4 * 4), "video_grid_thw": grid}


def omni_clips(count):
    return {**qwen_clips(count), "video_second_per_grid": torch.ones(count)}


def sounds(count):
    mask = torch.ones(count, 16, dtype=torch.long)
    return {"input_features": torch.randn(count, 8, 16), "feature_attention_mask": mask}


# Both text models moved between transformers 5.0 and 5.23.
OMNI_DECODER = "model.language_model" if hasattr(qwen2_5_omni_modeling, "Qwen2_5OmniThinkerModel") else "model"
AUDIO_DECODER = "model.language_model" if hasattr(qwen2_audio_modeling, "Qwen2AudioModel") else "language_model.model"


@dataclass(frozen=True)
class Case:
    """One multimodal model: how to build it, and what one piece of each of its media is."""

    model_class: type
    config: Callable
    media: dict[str, tuple[int, Callable]]  # letter -> placeholder tokens a piece, the forward's arguments for n pieces
    language_model: str = "model.language_model"
    mrope: bool = False  # its positions are made from mm_token_type_ids

    @property
    def layouts(self):
        """Two rows of different length: all of its media, and the first of them."""
        letters = list(self.media)
        return [f"t {' '.join(letters)} q q q a a", f"{letters[0]} q t q a"]


def pieces(tokens, make, *shape):
    return tokens, (lambda count: make(count, *shape)) if shape else make


CASES = {
    "llava": Case(tf.LlavaForConditionalGeneration, llava, {"I": pieces(4, pictures, 3, 8, 8)}),
    "llava_onevision": Case(
        tf.LlavaOnevisionForConditionalGeneration,
        llava_onevision,
        {"I": pieces(10, anyres), "V": pieces(4, clips, 3, 3, 8, 8)},
    ),
    "video_llava": Case(
        tf.VideoLlavaForConditionalGeneration,
        video_llava,
        {"I": pieces(4, stills, 3, 8, 8), "V": pieces(10, clips, 2, 3, 8, 8)},
    ),
    "qwen2_vl": Case(
        tf.Qwen2VLForConditionalGeneration,
        qwen2_vl,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, qwen_clips)},
        mrope=True,
    ),
    "qwen2_5_vl": Case(
        tf.Qwen2_5_VLForConditionalGeneration,
        qwen2_5_vl,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, qwen_clips)},
        mrope=True,
    ),
    "qwen2_audio": Case(tf.Qwen2AudioForConditionalGeneration, qwen2_audio, {"A": pieces(4, sounds)}, AUDIO_DECODER),
    "qwen2_5_omni": Case(
        tf.Qwen2_5OmniThinkerForConditionalGeneration,
        qwen2_5_omni,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, omni_clips), "A": pieces(4, sounds)},
        OMNI_DECODER,
    ),
    "idefics3": Case(
        tf.Idefics3ForConditionalGeneration, idefics3, {"I": pieces(4, pictures, 1, 3, 16, 16)}, "model.text_model"
    ),
    "smolvlm": Case(
        tf.SmolVLMForConditionalGeneration, smolvlm, {"I": pieces(4, pictures, 1, 3, 16, 16)}, "model.text_model"
    ),
}


# The classes of newer transformers, by name: a version that lacks one has no case for it. What each needs to know:
# configuration, and of each medium the placeholder tokens of a piece and the forward's arguments for n pieces.
PIXTRAL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "patch_size": 4, "image_size": 8, "head_dim": 8}
SIGLIP: dict[str, Any] = {**TOWER, "image_size": 8, "vision_use_head": False, "model_type": "siglip_vision_model"}
WIDE: dict[str, Any] = {**TEXT, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **more}


def _qwen_like(config_class: Any, tower: dict[str, Any], **text: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    settings = {**TEXT, "head_dim": 8, "rope_parameters": rope, **text}
    return config_class(text_config=settings, vision_config=tower, **BY_ID)


QWEN3_TOWER: dict[str, Any] = {k: v for k, v in QWEN_TOWER.items() if not k.startswith(("window", "fullatt"))}
QWEN3_TOWER |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}


def gemma4() -> Any:
    heads = {"num_attention_heads": 4, "head_dim": 8}
    text = {**TEXT, **heads, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    tower = {**SIZES, **heads, "num_key_value_heads": 4, "num_hidden_layers": 2, "patch_size": 4}
    tower |= {"pooling_kernel_size": 2, "position_embedding_size": 64}
    marks: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    marks |= {"boi_token_id": VISION_START, "eoi_token_id": VISION_END}
    marks |= {"audio_token_id": AUDIO, "boa_token_id": AUDIO_START, "eoa_token_index": AUDIO_END}
    return tf.Gemma4Config(text_config=text, vision_config=tower, audio_config=None, **marks)


def gemma4_pictures(count: int) -> dict[str, torch.Tensor]:
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    return {"pixel_values": torch.rand(count, 16, 48), "image_position_ids": grid.expand(count, 16, 2).clone()}


def sized(count: int, side: int = 8) -> dict[str, torch.Tensor]:
    return {**pictures(count, 3, side, side), "image_sizes": torch.full((count, 2), side)}


def mels(count: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(count, 8, 16)}


def masked_mels(count: int) -> dict[str, torch.Tensor]:
    return {**mels(count), "input_features_mask": torch.ones(count, 16, dtype=torch.long)}


def lfm2_pictures(count: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(count, 16, 48),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[4, 4]] * count),
    }


def videollama_pictures(count: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(16 * count, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
        "image_merge_sizes": torch.tensor([2] * count),
    }


def videollama_clips(count: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values_videos": torch.randn(32 * count, 48),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * count),
        "video_merge_sizes": torch.tensor([2] * count),
        "video_compression_mask": torch.ones(8 * count, dtype=torch.bool),
    }


def granite_sounds(count: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(count, 10, 16), "input_features_mask": torch.ones(count, 2, dtype=torch.bool)}


def asr_sounds(count: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(count, 16, 100),
        "input_features_mask": torch.ones(count, 100, dtype=torch.long),
    }


def omni_sounds(count: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(count, 64, dtype=torch.long)
    return {"input_features": torch.randn(count, 16, 64), "feature_attention_mask": mask}


def qwen3_omni() -> Any:
    marks: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
    marks |= {"audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END}
    marks |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    audio = {"num_mel_bins": 16, "n_window": 50, "n_window_infer": 100, "output_dim": 32, "downsample_hidden_size": 8}
    return tf.models.qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
        audio_config={**AUDIO_TOWER, **audio, "max_source_positions": 64},
        vision_config=QWEN3_TOWER,
        text_config={**MROPE, **EXPERTS, "head_dim": 8},
        **marks,
    )


def molmo_pictures(count: int) -> dict[str, torch.Tensor]:
    pool = torch.arange(16).view(4, 4)
    return {
        "pixel_values": torch.randn(count, 16, 48),
        "image_token_pooling": torch.cat([pool + 16 * i for i in range(count)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * count),
        "image_num_crops": torch.ones(count, dtype=torch.long),
    }


def phi_pictures(count: int) -> dict[str, torch.Tensor]:
    return {
        "image_pixel_values": torch.randn(count, 2, 3, 16, 16),
        "image_sizes": torch.full((count, 2), 16),
        "image_attention_mask": torch.ones(count, 2, 4, 4),
    }


def gemma3n_sounds(count: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(count, 32, 16),
        "input_features_mask": torch.ones(count, 32, dtype=torch.bool),
    }


def gemma3n() -> Any:
    config = tf.Gemma3nConfig(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY + 8,
            "pad_token_id": None,  # its row would be zeros, at which the model's root has no gradient
            "head_dim": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        audio_config={
            "hidden_size": 32,
            "vocab_size": 4,
            "vocab_offset": 132,
            "input_feat_size": 16,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
        },
        audio_soft_tokens_per_image=2,
        vision_soft_tokens_per_image=4,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        boa_token_id=AUDIO_START,
        eoa_token_id=AUDIO_END,
    )
    # The real tower is timm's, which the tests do not have.
    tower = tf.SiglipVisionConfig(**{**SIGLIP, "rms_norm_eps": 1e-6, "vocab_size": 4, "vocab_offset": 128})
    object.__setattr__(config, "vision_config", tower)
    return config


NEWER: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Qwen3VLForConditionalGeneration": (
        lambda: _qwen_like(tf.Qwen3VLConfig, QWEN3_TOWER),
        {"I": pieces(4, qwen_pictures)},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        lambda: _qwen_like(tf.Qwen3VLMoeConfig, QWEN3_TOWER, **EXPERTS),
        {"I": pieces(4, qwen_pictures)},
    ),
    "Qwen3_5ForConditionalGeneration": (
        lambda: _qwen_like(
            tf.Qwen3_5Config,
            {k: v for k, v in QWEN3_TOWER.items() if k != "deepstack_visual_indexes"},
            layer_types=["linear_attention", "full_attention"],
            **{f"linear_{name}_head_dim": 8 for name in ("key", "value")},
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        {"I": pieces(4, qwen_pictures)},
    ),
    "Glm4vForConditionalGeneration": (
        lambda: tf.Glm4vConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                **{k: v for k, v in QWEN_TOWER.items() if not k.startswith(("window", "fullatt"))},
                "image_size": 16,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
        ),
        {"I": pieces(4, qwen_pictures)},
    ),
    "Glm46VForConditionalGeneration": (
        lambda: tf.Glm46VConfig(
            text_config={
                **TEXT,
                "model_type": "glm4v_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                **{k: v for k, v in QWEN_TOWER.items() if not k.startswith(("window", "fullatt"))},
                "image_size": 16,
                "model_type": "glm4v_vision",
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
        ),
        {"I": pieces(4, qwen_pictures)},
    ),
    "Gemma3ForConditionalGeneration": (
        lambda: tf.Gemma3Config(
            text_config={**WIDE, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        ),
        {"I": pieces(4, pictures, 3, 8, 8)},
    ),
    "Gemma4ForConditionalGeneration": (gemma4, {"I": pieces(4, gemma4_pictures)}),
    "InternVLForConditionalGeneration": (
        lambda: tf.InternVLConfig(
            vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            text_config=_text("qwen2"),
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        {"I": pieces(4, pictures, 3, 16, 16)},
    ),
    "LlavaNextForConditionalGeneration": (
        lambda: tf.LlavaNextConfig(
            vision_config={**TOWER, "image_size": 8, "model_type": "clip_vision_model"},
            text_config=_text("llama"),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[8, 8]],
        ),
        {"I": pieces(10, anyres)},
    ),
    "LlavaNextVideoForConditionalGeneration": (
        lambda: tf.LlavaNextVideoConfig(
            vision_config={**TOWER, "image_size": 8, "model_type": "clip_vision_model"},
            text_config=_text("llama"),
            vision_feature_layer=-1,
            image_grid_pinpoints=[[8, 8]],
            **BY_INDEX,
        ),
        {"I": pieces(10, anyres), "V": pieces(3, clips, 3, 3, 8, 8)},
    ),
    "PaliGemmaForConditionalGeneration": (
        lambda: tf.PaliGemmaConfig(
            vision_config=SIGLIP,
            text_config={**WIDE, "model_type": "gemma"},
            image_token_index=IMAGE,
            vocab_size=VOCABULARY,
            projection_dim=32,
            hidden_size=32,
        ),
        {"I": pieces(4, pictures, 3, 8, 8)},
    ),
    "Mistral3ForConditionalGeneration": (
        lambda: tf.Mistral3Config(
            vision_config={**PIXTRAL, "model_type": "pixtral", "image_size": 16},
            text_config=_text("mistral", head_dim=8),
            image_token_index=IMAGE,
        ),
        {"I": pieces(4, sized, 16)},
    ),
    "VoxtralForConditionalGeneration": (
        lambda: tf.VoxtralConfig(
            audio_config={
                **SIZES,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_mel_bins": 8,
                "max_source_positions": 8,
            },
            text_config=_text("llama", head_dim=8),
            audio_token_id=AUDIO,
        ),
        {"A": pieces(2, mels)},
    ),
    "AudioFlamingo3ForConditionalGeneration": (
        lambda: tf.AudioFlamingo3Config(
            audio_config={**SIZES, "num_hidden_layers": 2, "num_mel_bins": 8, "max_source_positions": 8},
            text_config=_text("qwen2"),
            audio_token_id=AUDIO,
        ),
        {"A": pieces(4, masked_mels)},
    ),
    "AyaVisionForConditionalGeneration": (
        lambda: tf.AyaVisionConfig(
            vision_config={**SIGLIP, "image_size": 16},
            text_config=_text("cohere2", layer_types=["sliding_attention", "full_attention"]),
            image_token_index=IMAGE,
        ),
        {"I": pieces(4, pictures, 3, 16, 16)},
    ),
    "Cohere2VisionForConditionalGeneration": (
        lambda: tf.Cohere2VisionConfig(
            vision_config={**SIGLIP, "image_size": 16},
            text_config=_text("cohere2", layer_types=["sliding_attention", "full_attention"]),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        {"I": pieces(4, pictures, 3, 16, 16)},
    ),
    "Ovis2ForConditionalGeneration": (
        lambda: tf.Ovis2Config(
            vision_config={
                **TOWER,
                "image_size": 8,
                "vocab_size": 40,
                "hidden_stride": 1,
                "num_visual_indicator_tokens": 2,
            },
            text_config=_text("qwen2"),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[VISION_START, VISION_END],
            vocab_size=VOCABULARY,
            hidden_size=32,
        ),
        {"I": pieces(4, pictures, 3, 8, 8)},
    ),
    "Lfm2VlForConditionalGeneration": (
        lambda: tf.Lfm2VlConfig(
            vision_config={**TOWER, "num_patches": 16, "model_type": "siglip2_vision_model", "vision_use_head": False},
            text_config=_text(
                "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3
            ),
            image_token_id=IMAGE,
            projector_hidden_size=32,
            downsample_factor=2,
        ),
        {"I": pieces(4, lfm2_pictures)},
    ),
    "VideoLlama3ForConditionalGeneration": (
        lambda: tf.VideoLlama3Config(
            vision_config=dict(TOWER), text_config=_text("qwen2"), image_token_id=IMAGE, video_token_id=VIDEO
        ),
        {"I": pieces(4, videollama_pictures), "V": pieces(8, videollama_clips)},
    ),
    "Llama4ForConditionalGeneration": (
        lambda: tf.Llama4Config(
            vision_config={
                **TOWER,
                "image_size": 16,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
                "pixel_shuffle_ratio": 0.5,
            },
            text_config={
                **TEXT,
                "intermediate_size_mlp": 48,
                "head_dim": 8,
                "num_local_experts": 4,
                "attention_chunk_size": 256,
                "interleave_moe_layer_step": 2,
                "attn_temperature_tuning": False,
            },
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        ),
        {"I": pieces(4, pictures, 3, 16, 16)},
    ),
    "GraniteSpeechForConditionalGeneration": (
        lambda: tf.GraniteSpeechConfig(
            text_config=_text("granite"),
            encoder_config={
                "input_dim": 16,
                "num_layers": 2,
                "hidden_dim": 32,
                "num_heads": 4,
                "dim_head": 8,
                "output_dim": 12,
                "context_size": 10,
                "max_pos_emb": 16,
                "dropout": 0.0,
            },
            projector_config={
                **SIZES,
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 2,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 1,
                "vocab_size": 8,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            audio_token_index=AUDIO,
            downsample_rate=5,
            window_size=5,
            has_lora_adapter=False,
        ),
        {"A": pieces(2, granite_sounds)},
    ),
    "Qwen3ASRForConditionalGeneration": (
        lambda: tf.Qwen3ASRConfig(
            audio_config={
                **AUDIO_TOWER,
                "num_mel_bins": 16,
                "n_window": 50,
                "n_window_infer": 100,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
            text_config=_text("qwen3", head_dim=8),
            audio_token_id=AUDIO,
            timestamp_token_id=127,
            pad_token_id=0,
            eos_token_id=2,
        ),
        {"A": pieces(13, asr_sounds)},
    ),
    "Qwen3OmniMoeThinkerForConditionalGeneration": (
        qwen3_omni,
        {"I": pieces(4, qwen_pictures), "V": pieces(8, omni_clips), "A": pieces(8, omni_sounds)},
    ),
    "Molmo2ForConditionalGeneration": (
        lambda: tf.Molmo2Config(
            vision_config={
                **TOWER,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "image_size": [16, 16],
                "num_position_embeddings": 16,
            },
            adapter_config={
                "vision_feature_layer": [-1],
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 48,
                "text_hidden_size": 32,
            },
            text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 8},
            image_start_token_id=VISION_START,
            image_end_token_id=VISION_END,
            image_patch_id=IMAGE,
            low_res_image_start_token_id=VISION_START,
            frame_start_token_id=AUDIO_START,
            frame_end_token_id=AUDIO_END,
        ),
        {"I": pieces(4, molmo_pictures)},
    ),
    "Phi4MultimodalForCausalLM": (
        lambda: tf.Phi4MultimodalConfig(
            **{**TEXT, "bos_token_id": 1},
            vision_config={**TOWER, "image_size": 16, "crop_size": 16, "image_token_id": IMAGE, "feature_layer": -1},
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 1,
                "num_attention_heads": 4,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 16,
                "audio_token_id": AUDIO,
                "input_size": 16,
                "feature_layer": -1,
            },
        ),
        {"I": pieces(13, phi_pictures)},
    ),
    "Gemma3nForConditionalGeneration": (gemma3n, {"I": pieces(4, pictures, 3, 8, 8), "A": pieces(2, gemma3n_sounds)}),
}


def newer_case(name: str) -> Case | None:
    """Return the case of a class by its name; None if the installed transformers lacks it."""
    model_class = getattr(tf, name, None)
    config, media = NEWER[name]
    return None if model_class is None else Case(model_class, config, media)


def backbone(case):
    torch.manual_seed(0)
    model = case.model_class(case.config()).eval()
    for parameter in model.parameters():
        if (
            parameter.dim() > 1 and not parameter.any()
        ):  # Gemma 3's projector begins with zeros: no picture would be seen
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch of a model's media and text."""

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer: torch.Tensor  # bool
    media: dict[str, torch.Tensor]

    @property
    def tokens(self):
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.media}

    @property
    def everything(self):
        return {**self.tokens, "mm_token_type_ids": self.mm_token_type_ids}

    @property
    def labels(self):
        return torch.where(self.answer, self.input_ids, -100)

    def with_token(self, row, position, value):
        changed = self.input_ids.clone()
        changed[row, position] = value
        assert not torch.equal(changed, self.input_ids)
        return replace(self, input_ids=changed)


def prompt(case, layouts=None, seed=3) -> Prompt:
    torch.manual_seed(seed)
    rows = []
    layouts = case.layouts if layouts is None else layouts
    for layout in layouts:
        ids: list[int] = []
        types: list[int] = []
        answer: list[bool] = []
        for letter in layout.split():
            if letter in PLACEHOLDER:
                (token, kind), (start, end), count = PLACEHOLDER[letter], AROUND[letter], case.media[letter][0]
                ids += [start, *[token] * count, end]
                types += [0, *[kind] * count, 0]
            else:
                ids.append(int(torch.randint(1, 120, ())))
                types.append(0)
            answer += [letter == "a"] * (len(ids) - len(answer))
        rows.append((ids, types, [1] * len(ids), answer))
    width = max(len(row[0]) for row in rows)
    columns = [torch.tensor([[0] * (width - len(row[k])) + row[k] for row in rows]) for k in range(4)]
    media: dict[str, torch.Tensor] = {}
    for letter, (_, make) in case.media.items():
        if count := sum(layout.count(letter) for layout in layouts):
            media |= make(count)
    return Prompt(columns[0], columns[1], columns[2], columns[3].bool(), media)
