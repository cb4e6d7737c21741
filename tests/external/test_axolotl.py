"""axolotl trains a MokA adapter by its plug-in. `make test-integrations` runs it with the newest axolotl."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import yaml

pytest.importorskip("axolotl", reason="axolotl is in an environment of its own: make test-integrations")
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

import moka  # noqa: F401

QUESTION = "which colour is this picture"


@pytest.fixture
def settings(llava, pictures, tmp_path):
    """The settings of a run of three steps."""
    with (tmp_path / "data.jsonl").open("w") as file:
        for i, path in enumerate(pictures):
            asked = [{"type": "image", "path": path}, {"type": "text", "text": QUESTION}]
            answered = [{"type": "text", "text": ["red", "blue"][i % 2]}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = {"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "type": "chat_template"}
    return {
        "base_model": str(llava),
        "processor_type": "AutoProcessor",
        "plugins": ["moka.integrations.axolotl.MokaPlugin"],
        "adapter": "moka",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "chat_template": "tokenizer_default",
        "datasets": [{**data, "field_messages": "messages"}],
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "output_dir": str(tmp_path / "out"),
        "logging_steps": 1,
        "save_steps": 3,
        "val_set_size": 0,
        "bf16": False,
        "attn_implementation": "eager",
        "dataloader_num_workers": 0,
    }


def run(settings, folder):
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(folder / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
    )


def loaded(llava, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), folder)


def test_training_and_training_on(settings, llava, tmp_path):
    done = run(settings, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first = loaded(llava, tmp_path / "out")
    trained = {name: p.detach() for name, p in first.named_parameters() if "moka_B.default" in name}
    assert len(trained) == 14
    assert all(parameter.any() for parameter in trained.values())
    config = first.peft_config["default"]
    assert config.r == 4
    assert config.turn_markers["user"]

    again = {**settings, "lora_model_dir": str(tmp_path / "out"), "output_dir": str(tmp_path / "more")}
    done = run(again, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    second = dict(loaded(llava, tmp_path / "more").named_parameters())
    assert any((second[name] - value).abs().max() > 1e-3 for name, value in trained.items())


def test_a_setting_that_moka_does_not_have_is_refused(settings, tmp_path):
    done = run({**settings, "lora_target_linear": True}, tmp_path)
    assert done.returncode != 0
    assert "lora_target_linear" in done.stderr.rsplit("MokaError", 1)[1]
    assert not list((tmp_path).glob("out/checkpoint-*"))
