"""Tiny random backbones with a real byte-level BPE tokenizer, saved as ordinary Hugging Face folders."""

import os

# Two spinning OpenMP threads on a busy machine are an order of magnitude slower; workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "zero one two three four five six seven eight nine which digit is written spoken image sound the same yes no"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tiny_tokenizer):
    """Folders of a tiny random LLaMA and a tiny random Qwen2, by name."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tiny_tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    folders = {}
    for name, model_class, config in (
        ("llama", LlamaForCausalLM, LlamaConfig(**shape, tie_word_embeddings=True)),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config(**shape, tie_word_embeddings=False)),
    ):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model_class(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders
