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


@pytest.fixture(scope="session")
def tiny_config(backbones):
    """Makes the raw configuration of a run of a second or two on the embedded digits.

    ``tiny_config(folder, training__max_steps=4)`` writes into ``folder``; keyword arguments change dotted keys.
    """

    def make(folder, **changes):
        raw = {
            "stages": [1, 2],
            "model": {
                "backbone": str(backbones["llama"]),
                "chat_template": "chatml",
                "modalities": {
                    "visual": {
                        "encoder": {"type": "conv-image", "polarity": "light-on-dark", "channels": [8, 8], "width": 16},
                        "projector": {"type": "linear", "tokens": 2},
                    },
                    "audio": {
                        "encoder": {"type": "conv-audio", "channels": [8, 8], "width": 16},
                        "projector": {"type": "linear", "tokens": 2},
                    },
                },
            },
            "adapter": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "data": {
                **dict.fromkeys(("alignment", "train", "validation", "test"), "embedded:audio-visual-text"),
                "train_size": 64,
                "validation_size": 4,
            },
            "alignment": {
                "objective": "embedding",
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": 2,
            },
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "save_strategy": "steps",
                "save_steps": 2,
            },
            "evaluation": {"size": 8, "blank_size": 4, "batch_size": 4, "max_new_tokens": 4},
            "output": {"dir": str(folder), "samples": 2},
        }
        for key, value in changes.items():
            node = raw
            *parents, leaf = key.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return raw

    return make


@pytest.fixture(scope="session")
def trained_run(tiny_config, tmp_path_factory):
    """The folder of a finished run of both stages, with checkpoints at steps 2, 4 and 6. To read, not to change."""
    from moka.training import config_from_dict, run_training

    return run_training(config_from_dict(tiny_config(tmp_path_factory.mktemp("runs") / "both")))
