"""ms-swift trains a MokA adapter by its plug-in. `make test-integrations` runs it with the newest ms-swift."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is in an environment of its own: make test-integrations")
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

import moka
import moka.integrations


@pytest.fixture
def data(tmp_path, pictures):
    lines = []
    for i, path in enumerate(pictures):
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
