"""Tokens a second in training: one process and two, packed, grouped by length, from cached features; ratios of one run.

    python scripts/benchmark_training.py                               # a small random model on pictures and text, minutes
    python scripts/benchmark_training.py --tiny                        # tiny parts and few steps: only that it runs
    python scripts/benchmark_training.py --config CONFIG.yaml model.max_length=2048 --steps 30 --rows 4

Every measurement is a `moka train` (under torchrun for several processes, one thread each) of the same data and global
batch; of packed runs the batch is ``--rows`` rows. A round makes each measurement once, in an order drawn again, and ratios
are taken within a round, so that what else the machine does falls on all equally. Tokens are those of samples, not padding,
over the steps after the first two. Printed: a Markdown table of medians over the rounds, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from benchmarks.machine import in_words as machine
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from moka.testing.tiny import write_tiny_backbone
from moka.training import load_config

WARM_UP = 2  # steps
GROUPED = ["training.train_sampling_strategy=group_by_length"]
# Sizes of the random language model and picture encoder; the larger two are for a GPU.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"text": (256, 768, 4, 4), "encoder": (128, 384, 5, 4), "samples": 256, "image": (64, 8)},
    "tiny": {"text": (64, 192, 2, 4), "encoder": (32, 96, 3, 4), "samples": 64, "image": (32, 8)},
    "1b": {"text": (2048, 5632, 22, 32), "encoder": (1024, 4096, 24, 16), "samples": 256, "image": (224, 14)},
    "7b": {"text": (4096, 11008, 32, 32), "encoder": (1024, 4096, 24, 16), "samples": 256, "image": (224, 14)},
}


def sizes(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the settings of a transformer: hidden size, inner size, layers, heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, shape, strict=True))


def made_up(folder: Path, shape: dict[str, Any]) -> Path:
    """A configuration on made-up data: text only, one picture, or six, with texts of many lengths; random weights."""
    source = np.random.default_rng(0)
    write_tiny_backbone("llama-3", folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    torch.manual_seed(0)
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        text = LlamaConfig(**sizes(shape["text"]), vocab_size=len(tokenizer), **special)
        LlamaForCausalLM(text).to(dtype).save_pretrained(folder / "backbone")
        side, patch = shape["image"]
        sight = CLIPVisionConfig(**sizes(shape["encoder"]), image_size=side, patch_size=patch)
        CLIPVisionModel(sight).to(dtype).save_pretrained(folder / "encoder")
    lines = []
    for number in range(shape["samples"]):
        content: list[dict[str, str]] = []
        for place in range((0, 1, 6)[number % 3]):
            picture = Image.fromarray(source.integers(0, 255, (300, 400, 3), dtype=np.uint8))
            picture.save(folder / f"{number}-{place}.jpg")
            content.append({"type": "image", "image": f"{number}-{place}.jpg"})
        words = " ".join(source.choice(["what", "is", "shown", "here", "now"], int(source.integers(3, 60))))
        content.append({"type": "text", "text": words})
        answer = " ".join(source.choice(["yes", "no", "piano"], int(source.integers(1, 20))))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"s{number}", "messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vision = {"type": "clip", "name_or_path": str(folder / "encoder")}
    raw = {
        "model": {
            "backbone": str(folder / "backbone"),
            "max_length": 512,
            "modalities": {"visual": {"encoder": vision, "projector": {"type": "mlp", "tokens": 16}}},
        },
        "data": {"train": str(folder / "train.jsonl")},
        "training": {"per_device_train_batch_size": 4, "global_batch_size": 8, "learning_rate": 1e-4},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def variants(packed: bool, cache: Path | None, rows: int) -> dict[str, list[str]]:
    """Return what is changed in the configuration, by the name of a line of the table."""
    pack = ["training.packing=true", "training.per_device_train_batch_size=1", f"training.global_batch_size={rows}"]
    made: dict[str, list[str]] = {"as they come": [], "grouped by length": GROUPED}
    if packed:
        made["packed"] = pack
    if cache is not None:
        made["cached features"] = [f"data.feature_cache={cache}"]
    if packed and cache is not None:
        made["packed, cached features"] = [*pack, f"data.feature_cache={cache}"]
    return made


def moka(*arguments: str, processes: int = 1) -> None:
    """`moka ARGUMENTS`; ends this program with its messages where it fails."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # torchrun's own interpreter takes `-m moka` as its program.
    done = subprocess.run(
        [*launcher, "-m", "moka", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"moka {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def measured(config: Path, changes: Sequence[str], processes: int, steps: int) -> dict[str, float]:
    """Tokens a second and the share of padding of one short run."""
    with tempfile.TemporaryDirectory() as folder:
        short = [f"training.max_steps={steps}", "training.logging_steps=1", "training.logging_strategy=steps"]
        quiet = [
            "training.save_strategy=no",
            "training.eval_strategy=no",
            "output.samples=0",
            f"output.dir={folder}/run",
        ]
        moka("train", str(config), "stages=[2]", *short, *quiet, *changes, processes=processes)
        lines = (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()
    steps_ = [r for r in map(json.loads, lines) if "tokens_per_second" in r and r["step"] > WARM_UP]
    tokens = [sum(v for k, v in r.items() if k.startswith("tokens/") and k != "tokens/supervised") for r in steps_]
    seconds = [n / r["tokens_per_second"] for n, r in zip(tokens, steps_, strict=True)]
    places = [n / (1 - r["padding"]) for n, r in zip(tokens, steps_, strict=True)]
    return {"tokens_per_second": sum(tokens) / sum(seconds), "padding": 1 - sum(tokens) / sum(places)}


def spread(values: Sequence[float], form: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def table(found: dict[tuple[int, str], list[dict[str, float]]]) -> str:
    """The first line of the table is what the others are compared with, round by round."""
    first = next(iter(found.values()))
    lines = ["| processes | samples | tokens/s | ratio | padding |", "|---|---|---|---|---|"]
    for (processes, name), rounds in found.items():
        speeds = [one["tokens_per_second"] for one in rounds]
        ratios = [own / one["tokens_per_second"] for own, one in zip(speeds, first, strict=True)]
        padding = statistics.median(one["padding"] for one in rounds)
        lines.append(f"| {processes} | {name} | {spread(speeds, ',.0f')} | {spread(ratios, '.2f')} | {padding:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all measurements")
    parser.add_argument("--config", type=Path, help="measure this configuration; else a small random model")
    parser.add_argument("--size", choices=list(SHAPES), default="small", help="of the made-up model (default small)")
    parser.add_argument("--tiny", action="store_true", help="tiny random parts, few steps: only that it runs")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of each measurement (default 16, with --tiny 5); the first {WARM_UP} are not counted",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=2, help="rows of a step where samples are packed (default 2)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="lines of the table to measure (default all)")
    parser.add_argument("--no-cache", action="store_true", help="leave the feature cache out (no encoder is frozen)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_intermixed_args()
    if arguments.steps is None:
        arguments.steps = 5 if arguments.tiny else 16
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps}: the first {WARM_UP} are not counted; give {WARM_UP + 1} or more")
    with tempfile.TemporaryDirectory() as scratch:
        shape = SHAPES["tiny" if arguments.tiny else arguments.size]
        config = arguments.config or made_up(Path(scratch), shape)
        common = list(arguments.overrides)
        if arguments.config and arguments.tiny:
            common.append("model.tiny=true")
        cache = None if arguments.no_cache else Path(scratch) / "features"
        if cache is not None:
            moka("cache", str(config), "stages=[2]", *common, f"data.feature_cache={cache}", "--split", "train")
        packed = load_config(config, common).model.max_length is not None
        if not packed:
            print("note: nothing is packed, as model.max_length is not set.")
        changes = variants(packed, cache, arguments.rows)
        if unknown := set(arguments.variants or ()) - set(changes):
            parser.error(f"--variants {', '.join(sorted(unknown))}: there is {', '.join(changes)}")
        changes = {name: own for name, own in changes.items() if name in (arguments.variants or changes)}
        found: dict[tuple[int, str], list[dict[str, float]]] = {
            (n, name): [] for n in arguments.processes for name in changes
        }
        for _ in range(arguments.rounds):
            for n, name in random.sample(list(found), len(found)):
                found[n, name].append(measured(config, [*common, *changes[name]], n, arguments.steps))
    kept = f"median [smallest, largest] of {arguments.rounds} rounds of {arguments.steps} steps"
    print(f"{machine()}; one thread a process; {kept}; ratio to the first line in the same round\n\n{table(found)}")
    if arguments.json:
        settings: dict[str, Any] = {key: str(value) for key, value in vars(arguments).items()}
        result = [{"processes": n, "samples": name, "rounds": rounds} for (n, name), rounds in found.items()]
        text = json.dumps({"machine": machine(), "settings": settings, "results": result}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
