"""Fine-tune a multimodal LLM with transformers' Trainer and a MokA adapter: pictures, videos, sound.

    python recipes/plain_trainer.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --output runs/mine
    python recipes/plain_trainer.py --tiny

Chats are lines of JSON: {"messages": [...]}, media as parts of the content (docs/data.md). Several GPUs: torchrun or accelerate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments

import moka
from moka.data import open_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSONL of chats")
    parser.add_argument("--output", type=Path, default=Path("runs/plain_trainer"), help="folder of the result")
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
        model = getattr(model, "thinker", model)  # of Qwen2.5-Omni the part that understands
        samples = list(open_samples(str(arguments.data), "train"))
    # The processor tells MokA where turns begin and which tokens are marks of media.
    config = moka.MokaConfig.from_processor(processor, r=8, alpha=16, dropout=0.05, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        bf16=not arguments.tiny,
        use_cpu=arguments.tiny,
        max_steps=2 if arguments.tiny else -1,
        logging_steps=1 if arguments.tiny else 10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator takes samples as they are
        gradient_checkpointing=True,
    )
    collator = moka.MultimodalCollator(processor)  # supervises the answers only
    trainer = Trainer(model, settings, train_dataset=samples, data_collator=collator)
    trainer.train()
    trainer.save_model(str(arguments.output))  # the adapter; PeftModel.from_pretrained(model, folder) loads it
    processor.save_pretrained(str(arguments.output))


if __name__ == "__main__":
    main()
