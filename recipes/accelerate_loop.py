"""Fine-tune a multimodal LLM with a MokA adapter in a training loop of one's own, by accelerate.

    accelerate launch recipes/accelerate_loop.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --output runs/loop
    python recipes/accelerate_loop.py --tiny

Nothing of MokA is in the loop: routing is found around each call of the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor, get_cosine_schedule_with_warmup

import moka
from moka.data import open_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSONL of chats")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"), help="folder of the result")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model and data of noise, two steps on the CPU"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="samples of one process (default 2)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    torch.manual_seed(42)
    accelerator = Accelerator(mixed_precision="no" if arguments.tiny else "bf16", cpu=arguments.tiny)
    if arguments.tiny:
        from moka.testing.tiny_mllms import tiny_model, tiny_processor, write_tiny_samples

        model, processor = tiny_model("qwen2.5-omni"), tiny_processor("qwen2.5-omni")
        samples = write_tiny_samples("qwen2.5-omni", arguments.output / "tiny-data")
    else:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForMultimodalLM.from_pretrained(arguments.model, dtype="auto")
        model = getattr(model, "thinker", model)  # of Qwen2.5-Omni the part that understands
        samples = list(open_samples(str(arguments.data), "train"))
    config = moka.MokaConfig.from_processor(processor, r=8, alpha=16, dropout=0.05, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    collator = moka.MultimodalCollator(processor)
    loader = DataLoader(samples, arguments.batch_size, shuffle=True, collate_fn=collator, drop_last=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.learning_rate)
    steps = min(len(loader), 4) if arguments.tiny else len(loader) // accelerator.num_processes
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * steps), steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    bar = tqdm(total=steps, disable=not accelerator.is_main_process)
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(str(arguments.output))
        processor.save_pretrained(str(arguments.output))


if __name__ == "__main__":
    main()
