"""Supervised fine-tuning with TRL's SFTTrainer and a MokA adapter: pictures, videos, sound.

    python recipes/trl_sft.py --model Qwen/Qwen2.5-Omni-7B --data train.jsonl --output runs/sft
    python recipes/trl_sft.py --tiny

Chats are lines of JSON: {"messages": [...]}, media as parts of the content (docs/data.md). TRL's own collator takes no sound, and
supervises questions too; moka's takes both, and answers only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor
from trl import SFTConfig, SFTTrainer

import moka
from moka.data import open_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSONL of chats")
    parser.add_argument("--output", type=Path, default=Path("runs/trl_sft"), help="folder of the result")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model and data of noise, two steps on the CPU"
    )
    arguments = parser.parse_args()
    torch.manual_seed(42)
    if arguments.tiny:
        from moka.testing.tiny_mllms import tiny_model, tiny_processor, write_tiny_samples

        model, processor = tiny_model("qwen2.5-omni"), tiny_processor("qwen2.5-omni")
        samples = write_tiny_samples("qwen2.5-omni", arguments.output / "tiny-data")
    else:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model, dtype="auto")
        samples = list(open_samples(str(arguments.data), "train"))
        model = getattr(model, "thinker", model)  # of Qwen2.5-Omni the part that understands
    settings = SFTConfig(
        output_dir=str(arguments.output),
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        bf16=not arguments.tiny,
        use_cpu=arguments.tiny,
        max_steps=2 if arguments.tiny else -1,
        logging_steps=1 if arguments.tiny else 10,
        save_strategy="no",
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},  # the collator takes samples as they are
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list([{"messages": sample["messages"]} for sample in samples]),
        data_collator=moka.MultimodalCollator(processor),
        processing_class=processor,
        # Where a LoraConfig would be.
        peft_config=moka.MokaConfig.from_processor(processor, r=8, alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(arguments.output))  # the adapter; PeftModel.from_pretrained(model, folder) loads it
    processor.save_pretrained(str(arguments.output))


if __name__ == "__main__":
    main()
