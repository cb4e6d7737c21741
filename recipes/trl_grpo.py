"""Group relative policy optimisation with TRL's GRPOTrainer and a MokA adapter, on pictures.

    python recipes/trl_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data questions.jsonl --output runs/grpo
    python recipes/trl_grpo.py --tiny

A line of the data: {"prompt": [{"role": "user", "content": "..."}], "solution": "...", "images": ["a.png"]}. The reward is whether the
solution is in the answer: put your own instead. Rollouts are made by transformers: vLLM knows no MokA and would sample from another
model, with every token on the text path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, Image, Sequence, load_dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

import moka


def has_solution(completions, solution, **_) -> list[float]:
    """Return 1 for each answer with its solution in it."""
    return [float(one in chat[0]["content"]) for chat, one in zip(completions, solution, strict=True)]


def alternating(completions, **_) -> list[float]:
    """Return a reward for every second answer: a random model has no solutions."""
    return [float(i % 2) for i in range(len(completions))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSONL of questions")
    parser.add_argument("--output", type=Path, default=Path("runs/trl_grpo"), help="folder of the result")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model and data of noise, two steps on the CPU"
    )
    parser.add_argument("--use-vllm", action="store_true", help="refused: vLLM would sample from another model")
    arguments = parser.parse_args()
    if arguments.use_vllm:
        parser.error("--use-vllm: vLLM knows no MokA: rollouts would come from the text path only. Leave it out.")
    torch.manual_seed(42)
    generation = {}
    if arguments.tiny:
        from moka.testing.tiny_mllms import tiny_model, tiny_processor

        model, processor = tiny_model("qwen2.5-vl"), tiny_processor("qwen2.5-vl")
        rows = tiny_questions(arguments.output / "tiny-data")
        # A random model would write placeholders of media.
        generation = {"suppress_tokens": sorted(processor.tokenizer.get_added_vocab().values())[1:]}
    else:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model, dtype="auto")
        rows = load_dataset("json", data_files=str(arguments.data), split="train")
    trainer = GRPOTrainer(
        model,
        reward_funcs=alternating if arguments.tiny else has_solution,
        args=GRPOConfig(
            output_dir=str(arguments.output),
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            bf16=not arguments.tiny,
            use_cpu=arguments.tiny,
            max_steps=2 if arguments.tiny else -1,
            logging_steps=1 if arguments.tiny else 10,
            save_strategy="no",
            report_to="none",
            num_generations=2 if arguments.tiny else 8,
            max_completion_length=4 if arguments.tiny else 256,
            generation_kwargs=generation,
        ),
        train_dataset=rows.cast_column("images", Sequence(Image())),
        processing_class=processor,
        peft_config=moka.MokaConfig.from_processor(processor, r=8, alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(arguments.output))  # the adapter; PeftModel.from_pretrained(model, folder) loads it
    processor.save_pretrained(str(arguments.output))


def tiny_questions(folder: Path) -> Dataset:
    """Return questions about pictures of noise, with solutions."""
    from moka.testing.tiny_mllms import write_tiny_samples

    rows = []
    for sample in write_tiny_samples("qwen2.5-vl", folder):
        (picture, question), answer = sample["messages"][0]["content"], sample["messages"][1]["content"][0]
        prompt = [{"role": "user", "content": question["text"]}]
        rows.append({"prompt": prompt, "solution": answer["text"], "images": [picture["image"]]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
