"""Direct preference optimisation with TRL's DPOTrainer and a MokA adapter, on pictures.

    python recipes/trl_dpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data preferences.jsonl --output runs/dpo
    python recipes/trl_dpo.py --tiny

A line of the data: {"prompt": [{"role": "user", "content": "..."}], "chosen": [...], "rejected": [...], "images": ["a.png"]}. TRL's
collator is used; labels do not mark the question there, so MokA finds it by the turns of the chat template.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, Image, Sequence, load_dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor
from trl import DPOConfig, DPOTrainer

import moka


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSONL of preferences")
    parser.add_argument("--output", type=Path, default=Path("runs/trl_dpo"), help="folder of the result")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model and data of noise, two steps on the CPU"
    )
    arguments = parser.parse_args()
    torch.manual_seed(42)
    if arguments.tiny:
        from moka.testing.tiny_mllms import tiny_model, tiny_processor

        model, processor = tiny_model("qwen2.5-vl"), tiny_processor("qwen2.5-vl")
        rows = tiny_preferences(arguments.output / "tiny-data")
    else:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model, dtype="auto")
        rows = load_dataset("json", data_files=str(arguments.data), split="train")
    rows = rows.cast_column("images", Sequence(Image()))
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(arguments.output),
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            bf16=not arguments.tiny,
            use_cpu=arguments.tiny,
            max_steps=2 if arguments.tiny else -1,
            logging_steps=1 if arguments.tiny else 10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=processor,
        peft_config=moka.MokaConfig.from_processor(processor, r=8, alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(arguments.output))  # the adapter; PeftModel.from_pretrained(model, folder) loads it
    processor.save_pretrained(str(arguments.output))


def tiny_preferences(folder: Path) -> Dataset:
    """Return questions about pictures of noise, with a preferred answer."""
    from moka.testing.tiny_mllms import write_tiny_samples

    rows = []
    for sample in write_tiny_samples("qwen2.5-vl", folder):
        (picture, question), answer = sample["messages"][0]["content"], sample["messages"][1]["content"][0]
        chats = [[{"role": "assistant", "content": text}] for text in (answer["text"], "zero")]
        prompt = [{"role": "user", "content": question["text"]}]
        rows.append({"prompt": prompt, "chosen": chats[0], "rejected": chats[1], "images": [picture["image"]]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
