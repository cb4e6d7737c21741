"""Tiny random stand-ins of published backbones, to run a configuration's full code path in seconds.

Same architecture, same kind of tokenizer, same chat template; two layers of random weights. ``model.tiny: true`` puts
``tiny:KIND`` instead of the backbone and shrinks the encoders and projectors the same way.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moka.errors import MokaError, nearest

PREFIX = "tiny:"
_WIDTH, _LAYERS, _CONTEXT = 32, 2, 8192

# The published templates of the instruction-tuned checkpoints.
_LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the tokenizers learn their few merges from.
_CORPUS = (
    "Which digit is written? Which digit is spoken? What is shown in the picture, and what does the sound tell?",
    "Please describe the events and time range that occurred in the video. Answer with the option's letter.",
    "The quick brown fox jumps over the lazy dog, and one two three four five six seven eight nine ten.",
    "Please transcribe the speech. yes no A B C D left right piano violin flute indoor outdoor simultaneously",
)


def tiny_kind(backbone: str) -> str:
    """Which stand-in a published backbone has, by its name.

    Raises:
        MokaError: a backbone without a stand-in.
    """
    if backbone.startswith(PREFIX):
        kind = backbone.removeprefix(PREFIX)
        if kind not in KINDS:
            raise MokaError(f"model.backbone: unknown {backbone!r}; there is {known()}.{nearest(kind, KINDS)}")
        return kind
    name = backbone.lower().replace("_", "-")
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    raise MokaError(
        f"model.tiny: no stand-in is known for the backbone {backbone!r}. Name one yourself as model.backbone: {known()}."
    )


def known() -> str:
    return ", ".join(PREFIX + kind for kind in KINDS)


def write_tiny_backbone(kind: str, folder: Path) -> None:
    """A Hugging Face model folder: configuration, random weights (the same every time), tokenizer with chat template.

    Raises:
        MokaError: the package sentencepiece is missing (LLaMA-2 only needs it).
    """
    from transformers import AutoTokenizer, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    (_write_sentencepiece if kind == "llama-2" else _write_byte_bpe)(kind, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (_qwen_vl if kind == "qwen2.5-vl" else _model)(kind, tokenizer, special)
    if kind == "qwen2.5-vl":
        _write_image_processor(folder)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)


def _settings(kind: str, tokenizer: Any, special: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        # LLaMA-2-7B has a key for each query; the other two share keys between queries.
        "num_key_value_heads": 4 if kind == "llama-2" else 2,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": False,
        **special,
    }


def _model(kind: str, tokenizer: Any, special: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    settings = _settings(kind, tokenizer, special)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def _qwen_vl(kind: str, tokenizer: Any, special: dict[str, Any]) -> Any:
    """The full checkpoint: language model, vision tower and merger."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from moka.modeling.encoders.qwen2_5_vl import QwenVlEncoder

    text = _settings(kind, tokenizer, special)
    # A head has 8 numbers, so 4 angles: for time, height and width.
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>"}
    names["video"] = "<|video_pad|>"
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=dict(QwenVlEncoder.tiny_model), tie_word_embeddings=False, **ids
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _write_image_processor(folder: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil().save_pretrained(folder)


def _write_sentencepiece(kind: str, folder: Path) -> None:
    try:
        import sentencepiece
    except ImportError as error:
        raise MokaError(
            "the tokenizer of LLaMA-2 needs the package sentencepiece: pip install 'moka-peft[llama2]'."
        ) from error
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=made,
        model_type="bpe",
        vocab_size=360,  # three special tokens, 256 bytes, the characters of the corpus and a few merges
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    settings = {
        **{"tokenizer_class": "LlamaTokenizer", "chat_template": _LLAMA2_TEMPLATE, "legacy": False},
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


# Special tokens, template, and which of the tokens begin and end a text.
_BYTE_BPE: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "llama-3": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _LLAMA3_TEMPLATE,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen2": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        _QWEN2_TEMPLATE,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen2.5-vl": (
        (
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        ),
        _QWEN2_TEMPLATE,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
}


def _write_byte_bpe(kind: str, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special, template, roles = _BYTE_BPE[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)
    fast.save_pretrained(folder)


def _corpus() -> Iterator[str]:
    yield from _CORPUS


# Kind -> parts of the published names that it means; the first that fits is taken.
KINDS: dict[str, tuple[str, ...]] = {
    "llama-2": ("llama-2", "llama2"),
    "llama-3": ("llama-3", "llama3", "smollm2"),
    "qwen2.5-vl": ("qwen2.5-vl", "qwen2-5-vl"),
    "qwen2": ("qwen2", "qwen3"),
}
