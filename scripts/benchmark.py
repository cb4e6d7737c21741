"""Time the adapter against the bare backbone in one process, interleaved.

    python scripts/benchmark.py decode                      # the embedded 135M backbone
    python scripts/benchmark.py decode --backbone FOLDER --rounds 20 --json decode.json

Each round decodes the same number of tokens with every variant, in an order drawn anew; ratios are taken within a
round, so that what else the machine does falls on all of them alike. Printed: median and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import moka
from moka.adapter.config import DEFAULT_TARGETS
from moka.data import resolve_backbone


def random_adapter_(model: torch.nn.Module) -> torch.nn.Module:
    """B as after training, and not zero."""
    for name, parameter in model.named_parameters():
        if "moka_B" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model.eval()


def decode_variants(backbone: str) -> dict[str, torch.nn.Module]:
    """Bare twice, MokA merged and live, and peft's LoRA live, each on a backbone of its own."""
    bare = AutoModelForCausalLM.from_pretrained(resolve_backbone(backbone), dtype=torch.float32).eval()
    own = moka.MokaConfig(r=4, alpha=16, task_type="CAUSAL_LM")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=list(DEFAULT_TARGETS), task_type="CAUSAL_LM")
    # Twice the same, each a copy as the others are: what their ratio is off 1 is the measurement's own error.
    variants = {"bare": copy.deepcopy(bare), "bare again": copy.deepcopy(bare)}
    for name, config in (("moka merged", own), ("moka live", own), ("lora live", lora)):
        variants[name] = random_adapter_(get_peft_model(copy.deepcopy(bare), copy.deepcopy(config)))
    variants["moka merged"].merge_adapter()
    return variants


@torch.no_grad()
def decode_seconds(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of ``tokens`` greedy steps after the prompt of [1, seq] text tokens; the prefill is not counted."""
    begin = []

    def step(_, scores):
        if not begin:
            begin.append(time.perf_counter())  # the prefill's scores: decoding begins
        return scores

    settings = {"do_sample": False, "max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1, "pad_token_id": 0}
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), logits_processor=[step], **settings)
    return time.perf_counter() - begin[0]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def decode(arguments: argparse.Namespace) -> dict:
    variants = decode_variants(arguments.backbone)
    prompt = torch.randint(100, 10_000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    for model in variants.values():
        decode_seconds(model, prompt, 4)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(arguments.rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(decode_seconds(variants[name], prompt, arguments.tokens))
    print(f"{'variant':14} {'tokens/s':>26} {'of bare, in the same round':>34}")
    result = {}
    for name, times in seconds.items():
        speed = quartiles([arguments.tokens / t for t in times])
        share = quartiles([bare / own for bare, own in zip(seconds["bare"], times, strict=True)])
        result[name] = {"tokens_per_second": speed, "of_bare": share}
        print(
            f"{name:14} {speed[1]:9.2f} [{speed[0]:6.2f}, {speed[2]:6.2f}] {share[1]:17.4f} [{share[0]:.4f}, {share[2]:.4f}]"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    levels = parser.add_subparsers(dest="level", required=True)
    level = levels.add_parser("decode", help="tokens/s after a text prompt")
    level.add_argument("--backbone", default="embedded:smollm2-135m", help="folder, hub name, or the embedded one")
    level.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    level.add_argument("--tokens", type=int, default=32, help="tokens decoded in each measurement")
    level.add_argument("--rounds", type=int, default=20)
    level.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
    result = {"machine": machine, "settings": settings, "decode": decode(arguments)}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
