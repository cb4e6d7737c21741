"""ms-swift trains a MokA adapter by its plug-in. `make test-integrations` runs it with the newest ms-swift."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is in an environment of its own: make test-integrations")
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import moka
import moka.integrations

SIDE = 16
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture
def llava(tmp_path):
    """The folder of a tiny random LLaVA with its processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["which colour is this picture red blue"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, patch_size=4, image_size=SIDE),
            text_config=LlamaConfig(
                **sizes, vocab_size=len(tokenizer), num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
            ),
            image_token_index=3,
            vision_feature_layer=-2,
        )
    )
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture
def data(tmp_path):
    lines = []
    for i in range(8):
        path = str(tmp_path / f"{i}.png")
        Image.new("RGB", (SIDE, SIDE), (30 * i, 10, 200 - 20 * i)).save(path)
        question = {"role": "user", "content": "<image>which colour is this picture"}
        lines.append(
            {"messages": [question, {"role": "assistant", "content": ["red", "blue"][i % 2]}], "images": [path]}
        )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data.jsonl"


def test_sft_with_the_plug_in(llava, data, tmp_path):
    plug_in = Path(moka.integrations.__path__[0]) / "ms_swift.py"
    settings = {
        "external_plugins": plug_in,
        "tuner_type": "moka",
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "model": llava,
        "model_type": "llava1_5_hf",
        "dataset": data,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "output_dir": tmp_path / "out",
        "torch_dtype": "float32",
        "logging_steps": 1,
        "save_steps": 3,
        "split_dataset_ratio": 0,
        "gradient_checkpointing": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }
    command = [str(Path(sys.executable).parent / "swift"), "sft"]
    command += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "match nothing in the input ids" not in done.stdout + done.stderr
    (folder,) = (tmp_path / "out").glob("*/checkpoint-3")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), folder)
    rows = [parameter for name, parameter in model.named_parameters() if "moka_A.default" in name]
    trained = [parameter for name, parameter in model.named_parameters() if "moka_B.default" in name]
    assert len(rows) == len(trained) == 14
    assert all(parameter.any() for parameter in trained)
    config = model.peft_config["default"]
    assert config.turn_markers["user"]
    assert config.r == 4
