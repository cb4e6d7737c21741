"""Tiny random Hugging Face multimodal LLMs with their processors: what `moka train --tiny` trains for ``model.kind: hf``.

The classes of models, image processors and feature extractors are the published ones; tokenizer and weights are made here.
Video needs torchvision in transformers' processors, so these take none.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moka.errors import MokaError, nearest

from . import mllms

PREFIX = "tiny:"
# Words in the names of published models -> kind.
KINDS = {
    "qwen2.5-omni": ("qwen2.5-omni",),
    "qwen2.5-vl": ("qwen2.5-vl", "qwen2-vl"),
    "qwen2-audio": ("qwen2-audio",),
}
_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "audio": "<|AUDIO|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
}
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_TOKENS.values()]
_CORPUS = [
    "Which digit is written in the picture, and which is spoken? one two three four five six seven eight nine zero"
]
# The layout of Qwen's templates.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|image_pad|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIDE = 16  # pixels of a picture
_FRAMES = 100  # of a second of sound


def tiny_kind(name: str) -> str:
    """Return the kind of the tiny model for a published one, by its name.

    Raises:
        MokaError: none is known.
    """
    kind = name.removeprefix(PREFIX)
    found = next((one for one, words in KINDS.items() if any(word in kind.lower() for word in words)), None)
    if found is None:
        raise MokaError(
            f"model.name: no tiny model is known for {name!r}; known: {', '.join(PREFIX + one for one in KINDS)}."
            f"{nearest(kind, KINDS)}"
        )
    return found


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the marks and placeholders of Qwen's models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    named = {f"{name}_token": token for name, token in _TOKENS.items()}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )


class _WithoutVideo:
    """For processors of transformers: everything but a video processor, and the tokens' names from the tokenizer."""

    def __init__(self, image_processor=None, feature_extractor=None, tokenizer=None, chat_template=None):
        for name in ("image", "video", "audio"):
            setattr(self, f"{name}_token", getattr(tokenizer, f"{name}_token"))
            setattr(self, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        parts = [one for one in (image_processor, feature_extractor) if one is not None]
        tf.ProcessorMixin.__init__(self, *parts, tokenizer, chat_template=chat_template)  # type: ignore[arg-type]


class TinyOmniProcessor(_WithoutVideo, tf.Qwen2_5OmniProcessor):
    """The processor of Qwen2.5-Omni without its video processor."""


class TinyVLProcessor(_WithoutVideo, tf.Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without its video processor."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, None, tokenizer, chat_template)

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "mm_token_type_ids"]


class _OmniKey(tf.PreTrainedConfig):
    """Stands for `TinyOmniProcessor` in `AutoProcessor`, which finds processors in folders by the names of their classes."""


class _VLKey(tf.PreTrainedConfig):
    """Stands for `TinyVLProcessor`."""


tf.AutoProcessor.register(_OmniKey, TinyOmniProcessor, exist_ok=True)
tf.AutoProcessor.register(_VLKey, TinyVLProcessor, exist_ok=True)


def tiny_processor(kind: str) -> Any:
    """Return the processor of a tiny model."""
    tokenizer = tiny_tokenizer()
    size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}
    pictures = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    sound = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    if kind == "qwen2.5-omni":
        return TinyOmniProcessor(pictures, sound, tokenizer, chat_template=_TEMPLATE)
    if kind == "qwen2.5-vl":
        return TinyVLProcessor(pictures, tokenizer, chat_template=_TEMPLATE)
    return tf.Qwen2AudioProcessor(sound, tokenizer, chat_template=_TEMPLATE)


def tiny_model(kind: str) -> tf.PreTrainedModel:
    """Return a tiny model with the same random weights every time."""
    tokenizer = tiny_tokenizer()
    case = mllms.CASES[{"qwen2.5-omni": "qwen2_5_omni", "qwen2.5-vl": "qwen2_5_vl", "qwen2-audio": "qwen2_audio"}[kind]]
    config = case.config()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    named = {f"{name}_token_{end}": ids[name] for name in ("image", "video", "audio") for end in ("id", "index")}
    named |= {
        f"{ours}_{end}_token_id": ids[f"{ours}_{own}"]
        for ours in ("vision", "audio")
        for end, own in (("start", "bos"), ("end", "eos"))
    }
    for name, value in named.items():
        if hasattr(config, name):
            setattr(config, name, value)
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = len(tokenizer), 2048
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if getattr(config, "audio_config", None) is not None:
        config.audio_config.max_source_positions = _FRAMES // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()
