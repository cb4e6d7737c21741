"""Tiny random backbones with a real byte-level BPE tokenizer, saved as ordinary Hugging Face folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Two spinning OpenMP threads on a busy machine are an order of magnitude slower; workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "zero one two three four five six seven eight nine which digit is written spoken image sound the same yes no"
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "one": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "accelerate zero1": [
        *(str(BIN / "accelerate"), "launch", "--use_deepspeed", "--zero_stage", "1", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
    "torchrun one": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "1"],
    # `--cpu --num_processes 2` would start one process, and are silent.
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


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
        if raw["data"].get("validation") is None and "training__eval_strategy" not in changes:
            raw["training"]["eval_strategy"] = "no"
        return raw

    return make


@pytest.fixture(scope="session")
def trained_run(tiny_config, tmp_path_factory):
    """The folder of a finished run of both stages, with checkpoints at steps 2, 4 and 6. To read, not to change."""
    from moka.training import config_from_dict, run_training

    return run_training(config_from_dict(tiny_config(tmp_path_factory.mktemp("runs") / "both")))


@pytest.fixture(scope="session")
def launch():
    """``launch("torchrun", "train", config)``: `moka train config` in two processes; ``start=True`` does not wait.

    ``program`` takes the place of `-m moka`.
    """

    def run(launcher, *arguments, program=("-m", "moka"), start=False, timeout=180, **environment):
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        if launcher == "accelerate":
            own["ACCELERATE_USE_CPU"] = "true"
        command = [*LAUNCHERS[launcher], *map(str, program), *map(str, arguments)]
        settings = {"env": {**os.environ, **own, **environment}, "text": True}
        if start:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **settings
            )
        return subprocess.run(command, capture_output=True, check=False, timeout=timeout, **settings)

    return run


@pytest.fixture(scope="session")
def write_yaml():
    def write(path, raw):
        path.write_text(yaml.safe_dump(raw, sort_keys=False))  # modalities are made in their order
        return path

    return write


@pytest.fixture(scope="session")
def write_zero():
    """``write_zero(folder, "zero2")``: a settings file of DeepSpeed; also "zero1", "zero3" and "zero3-offload".

    A parameter persistence threshold of 0 makes ZeRO-3 partition tiny parameters too.
    """

    def write(folder, mode, **more):
        sizes = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        zero = {"stage": int(mode[len("zero")])}
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 0
        if mode.endswith("offload"):
            zero |= {key: {"device": "cpu"} for key in ("offload_optimizer", "offload_param")}
        # torch's AdamW instead of DeepSpeed's, which would be compiled first.
        settings = {**dict.fromkeys(sizes, "auto"), "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        path = folder / f"{mode}.json"
        path.write_text(json.dumps({**settings, **more}))
        return path

    return write
