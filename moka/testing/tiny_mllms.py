"""Tiny random Hugging Face multimodal LLMs with their processors: what `moka train --tiny` trains for ``model.kind: hf``.

The classes of models, image processors and feature extractors are the published ones; tokenizer, weights and video
processor are made here: those of transformers need torchvision.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.video_utils import VideoMetadata

from moka.errors import MokaError, nearest

from . import mllms

PREFIX = "tiny:"
# Words in the names of published models -> kind.
KINDS = {
    "qwen2.5-omni": ("qwen2.5-omni",),
    "qwen2.5-vl": ("qwen2.5-vl", "qwen2-vl"),
    "qwen2-audio": ("qwen2-audio",),
    "qwen3-vl": ("qwen3-vl",),
    "gemma-4": ("gemma-4",),
}
MEDIA = {
    "qwen2.5-omni": ("image", "video", "audio"),
    "qwen2.5-vl": ("image", "video"),
    "qwen2-audio": ("audio",),
    "qwen3-vl": ("image", "video"),
    "gemma-4": ("image",),
}
_CASES = {
    "qwen2.5-omni": "qwen2_5_omni",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen2-audio": "qwen2_audio",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "gemma-4": "Gemma4ForConditionalGeneration",
}
_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "audio": "<|AUDIO|>",
    **dict.fromkeys(("vision_bos", "vision_start", "boi"), "<|vision_bos|>"),
    **dict.fromkeys(("vision_eos", "vision_end", "eoi"), "<|vision_eos|>"),
    **dict.fromkeys(("audio_bos", "audio_start", "boa"), "<|audio_bos|>"),
    **dict.fromkeys(("audio_eos", "audio_end", "eoa"), "<|audio_eos|>"),
}
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(_TOKENS.values())]
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
    "{% elif part['type'] == 'video' %}<|vision_bos|><|video_pad|><|vision_eos|>"
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


class TinyVideoProcessor:
    """Frames of a video as patches in the order of Qwen's models; frames are scaled to 16 x 16 pixels.

    Returns ``pixel_values_videos`` [patches, 3 * 2 * 4 * 4], ``video_grid_thw`` [videos, 3] and ``video_metadata``.
    """

    merge_size, temporal_patch_size, patch_size = 2, 2, 4

    def __call__(self, videos: Any, **kwargs: Any) -> tf.BatchFeature:
        side, merge = _SIDE // self.patch_size, self.merge_size
        values, grids, metadata = [], [], []
        for frames in videos:
            pictures = [
                np.asarray(frame.convert("RGB").resize((_SIDE, _SIDE)), np.float32) / 127.5 - 1 for frame in frames
            ]
            pictures += pictures[-1:] * (len(pictures) % 2)
            pairs = len(pictures) // 2
            blocks = np.stack(pictures).transpose(0, 3, 1, 2)  # [frames, 3, height, width]
            inside = (side // merge, merge, self.patch_size)
            blocks = blocks.reshape(pairs, 2, 3, *inside, *inside).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
            values.append(torch.from_numpy(blocks.reshape(pairs * side * side, -1).copy()))
            grids.append([pairs, side, side])
            metadata.append(VideoMetadata(len(frames), fps=1.0, frames_indices=list(range(len(frames)))))
        found = {"pixel_values_videos": torch.cat(values), "video_grid_thw": torch.tensor(grids)}
        return tf.BatchFeature({**found, "video_metadata": metadata})


class _WithTinyVideo:
    """For processors of transformers: a video processor without torchvision, and the tokens' names from the tokenizer."""

    def __init__(self, image_processor=None, feature_extractor=None, tokenizer=None, chat_template=None):
        for name in ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "boa", "eoa"):
            setattr(self, f"{name}_token", getattr(tokenizer, f"{name}_token"))
            setattr(self, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        parts = [one for one in (image_processor, feature_extractor) if one is not None]
        tf.ProcessorMixin.__init__(self, *parts, tokenizer, chat_template=chat_template)  # type: ignore[arg-type]
        self.video_processor = TinyVideoProcessor()


class _Pictures(_WithTinyVideo):
    """Without sound."""

    tokenizer: Any
    image_processor: Any
    video_processor: Any

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, None, tokenizer, chat_template)

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "mm_token_type_ids"]


class TinyOmniProcessor(_WithTinyVideo, tf.Qwen2_5OmniProcessor):
    """The processor of Qwen2.5-Omni."""


class TinyQwen25VLProcessor(_Pictures, tf.Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL."""


class TinyQwen3VLProcessor(_Pictures, tf.Qwen3VLProcessor):
    """The processor of Qwen3-VL."""


class TinyGemma4Processor(_Pictures, tf.Gemma4Processor):
    """The processor of Gemma 4 for pictures."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template)
        self.video_processor = None
        self.image_seq_length, self.audio_seq_length, self.audio_ms_per_token = 70, 1, 40


PROCESSORS: dict[str, Any] = {
    "qwen2.5-omni": TinyOmniProcessor,
    "qwen2.5-vl": TinyQwen25VLProcessor,
    "qwen2-audio": tf.Qwen2AudioProcessor,
    "qwen3-vl": TinyQwen3VLProcessor,
    "gemma-4": TinyGemma4Processor,
}
for _processor in PROCESSORS.values():
    if _processor.__module__ == __name__:
        # AutoProcessor finds processors in folders by the names of their classes, among those of registered configurations.
        _key = type(f"{_processor.__name__}Key", (tf.PreTrainedConfig,), {})
        tf.AutoProcessor.register(_key, _processor, exist_ok=True)


def tiny_processor(kind: str) -> Any:
    """Return the processor of a tiny model."""
    tokenizer = tiny_tokenizer()
    size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}
    parts: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": _TEMPLATE}
    if kind == "gemma-4":
        parts["image_processor"] = tf.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    elif "image" in MEDIA[kind]:
        parts["image_processor"] = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    if "audio" in MEDIA[kind]:
        parts["feature_extractor"] = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return PROCESSORS[kind](**parts)


def tiny_model(kind: str) -> tf.PreTrainedModel:
    """Return a tiny model with the same random weights every time."""
    tokenizer = tiny_tokenizer()
    case = mllms.CASES.get(_CASES[kind]) or mllms.newer_case(_CASES[kind])
    if case is None:
        raise MokaError(f"model.name: tiny:{kind} needs a newer transformers: it has no {_CASES[kind]}.")
    config = case.config()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    named = {f"{name}_token_{end}": value for name, value in ids.items() for end in ("id", "index")}
    for name, value in named.items():
        if hasattr(config, name):
            setattr(config, name, value)
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = len(tokenizer), 2048
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = len(tokenizer)
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if getattr(config, "audio_config", None) is not None:
        config.audio_config.max_source_positions = _FRAMES // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def write_tiny_samples(kind: str, folder: Path, count: int = 16) -> list[dict[str, Any]]:
    """Write small pictures and sounds of noise, and return questions about them in the format of `moka.data.schema`."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, samples = np.random.default_rng(0), []
    for i in range(count):
        parts: list[dict[str, Any]] = []
        if "image" in MEDIA[kind]:
            picture = Image.fromarray(noise.integers(0, 256, (_SIDE, _SIDE + i, 3), np.uint8))
            picture.save(folder / f"{i}.png")
            parts.append({"type": "image", "image": str(folder / f"{i}.png")})
        if "audio" in MEDIA[kind]:
            sound = (noise.standard_normal(4000 + 100 * i) * 3000).astype("<i2")
            with wave.open(str(folder / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(sound.tobytes())
            parts.append({"type": "audio", "audio": str(folder / f"{i}.wav")})
        parts.append({"type": "text", "text": "Which digit is it?"})
        answer = {"role": "assistant", "content": [{"type": "text", "text": ("one", "two", "three")[i % 3]}]}
        samples.append({"messages": [{"role": "user", "content": parts}, answer]})
    return samples
