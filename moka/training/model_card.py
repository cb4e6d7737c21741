"""Files for people, written after a run: a plot of the loss, and a model card."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import torch
import yaml

import moka
from moka.config import RunConfig
from moka.data import attribution
from moka.distributed import is_main
from moka.io import disk_full_errors, write_text
from moka.modeling import MokaProcessor
from moka.modeling.artifacts import ADAPTER
from moka.modeling.configuration import DEFAULT_TYPE_IDS, MEDIA_TYPE_IDS
from moka.modeling.hf_model import model_inputs

from .distributed_backend import in_words
from .run_dir import RunFolder

_NAMES = {
    "moka": "MokA (https://arxiv.org/abs/2506.05191)",
    "lora": "LoRA",
    "dora": "DoRA (https://arxiv.org/abs/2402.09353)",
    "multiple_lora": "Multiple LoRA (several LoRAs for every token)",
    "loramoe": "LoRAMoE (https://arxiv.org/abs/2312.09979)",
    "hydralora": "HydraLoRA (https://arxiv.org/abs/2404.19245)",
    "uni_mm_lora": "Uni-modal + multimodal LoRA (https://arxiv.org/abs/2506.05191)",
    "uni_mm_lora_gate": "Uni-modal + multimodal LoRA with a gate (https://arxiv.org/abs/2506.05191)",
    "imod": "IMoD (CVPR 2026; experimental)",
}
# Panels of a plot: prefixes of the logged keys, label, settings of the axis.
Panels = list[tuple[tuple[str, ...], str, dict[str, Any]]]
_LOSS: Panels = [(("loss", "eval_loss"), "loss", {}), (("learning_rate",), "learning rate", {})]
_BALANCE: Panels = [
    (("tokens_per_second",), "tokens/s", {"ylim": (0, None)}),
    (("data_wait",), "waiting for data", {"ylim": (0, 1)}),
    (("grad_norm/",), "gradient norm", {"yscale": "log"}),
    (("update_share/",), "share of B's update", {"ylim": (0, 1)}),
    (("fisher_share/",), "share of Fisher information", {"ylim": (0, 1)}),
    (("gradient_cosine/",), "cosine of gradients", {"ylim": (-1, 1)}),
]


def plot_metrics(folder: RunFolder) -> None:
    """Draw RUN/loss.png (loss and learning rate) and RUN/balance.png (throughput, waiting for data, gradient norms by part, and,
    if they were observed, shares and cosines of the modalities).
    """
    with suppress(ImportError):  # matplotlib
        _plot(folder, "loss.png", _LOSS)
        _plot(folder, "balance.png", _BALANCE)


def _plot(folder: RunFolder, name: str, panels: Panels) -> None:
    """Draw a panel below the other, a column for each stage; nothing if the first panel's figures were not logged."""
    from matplotlib.figure import Figure

    records = folder.metrics()
    stages = sorted({r["stage"] for r in records if any(key in r for key in panels[0][0])})
    panels = [panel for panel in panels if any(key.startswith(panel[0]) for r in records for key in r)]
    if not stages:
        return
    heights = [2 if len(keys) > 1 or keys[0].endswith("/") else 1 for keys, _, _ in panels]
    figure = Figure(figsize=(5 * len(stages), 1.75 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), len(stages), squeeze=False, sharex="col", height_ratios=heights)
    for column, stage in enumerate(stages):
        of_stage = [r for r in records if r["stage"] == stage]
        for axis, (prefixes, label, settings) in zip(axes[:, column], panels, strict=True):
            for key in sorted({key for r in of_stage for key in r if key.startswith(prefixes)}):
                points = [(r["step"], r[key]) for r in of_stage if r.get(key) is not None]
                # A's gradient is zero as long as B is, which a logarithmic axis cannot show.
                points = [point for point in points if point[1] or "yscale" not in settings]
                if points:
                    axis.plot(*zip(*points, strict=True), ".-", label=key.removeprefix(prefixes[0]) or key)
            axis.set(ylabel=label, **settings)
            if len(axis.lines) > 1:
                axis.legend(fontsize="small", ncols=2)
        axes[0][column].set(title=f"stage {stage}")
        axes[-1][column].set(xlabel="step")
    with disk_full_errors(folder / name):
        figure.savefig(folder / name, dpi=120)


def write_card(folder: RunFolder, config: RunConfig, summary: dict[str, Any]) -> None:
    """RUN/README.md and the adapter's README.md: what it is, how to load it, how it was made, its numbers."""
    method = config.adapter["method"]
    engines = {f"stage {stage}": in_words(engine) for stage, engine in summary.get("engines", {}).items()}
    rows = {
        key: f"{n:,}" if "parameters" in key and isinstance(n, int) else n
        for key, n in summary.items()
        if key != "engines"
    } | engines
    evaluation = folder / "evaluation.json"
    numbers = (
        _evaluation_table(json.loads(evaluation.read_text("utf-8"))) if evaluation.exists() else "Not evaluated yet."
    )
    data = "".join(dict.fromkeys(attribution(s) for s in (config.data.train, config.data.alignment) if s))
    header = {
        "library_name": "peft",
        "tags": list(dict.fromkeys(["moka", "multimodal", method])),
        "base_model": config.model.backbone,
    }
    run = folder.path.as_posix()
    modalities = ", ".join(["text", *(config.model.modalities or summary.get("modalities", []))])
    text = f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {folder.path.name}

A {_NAMES.get(method, method)} adapter for `{config.model.backbone}` with the modalities {modalities}, trained with moka {moka.__version__}.

## Use

```python
import moka

model = moka.load("{run}")
print(model.generate("Your question?"{_media_arguments(config)}))
```

With peft only: `PeftModel.from_pretrained(moka.load_base("{run}"), "{run}/{ADAPTER}")`, after `import moka`, which makes the
method known to peft; without it peft raises `KeyError: 'MOKA'`.

## Training

| | |
|---|---|
{"".join(f"| {key} | {value} |{chr(10)}" for key, value in rows.items())}
The resolved configuration is in `config.yaml`, every logged number in `metrics.jsonl`.

## Evaluation

{numbers}

## Data and licences

{data or "Not recorded."}
"""
    write_text(folder / "README.md", text)
    if (folder / ADAPTER).is_dir():
        write_text(folder / ADAPTER / "README.md", text)


def _media_arguments(config: RunConfig) -> str:
    """The media that the trained model takes, as arguments of ``generate``; a picture means video too."""
    files = {"image": "picture.png", "video": "clip.mp4", "audio": "sound.wav"}
    kinds = {type_id: kind for kind, type_id in MEDIA_TYPE_IDS.items()}
    first = (
        (spec.get("type_ids") or DEFAULT_TYPE_IDS.get(name) or [0])[0] for name, spec in config.model.modalities.items()
    )
    return "".join(f', {kinds[i]}="{files[kinds[i]]}"' for i in first if i in kinds)


def _evaluation_table(result: dict[str, Any]) -> str:
    lines = ["| questions | right | N | accuracy | 95 % interval |", "|---|---|---|---|---|"]
    for condition, scores in result["conditions"].items():
        for category, s in scores.items():
            low, high = s["interval"]
            lines.append(
                f"| {condition}: {category} | {s['right']} | {s['n']} | {100 * s['accuracy']:.1f} % | "
                f"{100 * low:.1f} - {100 * high:.1f} % |"
            )
    return "\n".join(lines)


@torch.no_grad()
def write_samples(folder: RunFolder, model: Any, processor: MokaProcessor, samples: Any, config: RunConfig) -> None:
    """RUN/samples.jsonl: the model's answers to the first validation questions.

    Every process has to call it, as each may hold but a part of the model; the main one writes.
    """
    model.eval()
    lines = []
    for index in range(min(config.output.samples, len(samples))):
        sample = samples[index]
        last = max(i for i, message in enumerate(sample["messages"]) if message["role"] == "assistant")
        question, reference = sample["messages"][:last], sample["messages"][last : last + 1]
        batch = processor(question).to(model.device)
        batch.pop("labels")
        tokens = model.generate(
            **model_inputs(model, batch), max_new_tokens=config.evaluation.max_new_tokens, do_sample=False
        )
        record = {
            "id": sample["id"],
            "question": _text(question),
            "answer": processor.decode(tokens[0, batch["input_ids"].shape[1] :]),
            "reference": _text(reference),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if is_main():
        write_text(folder / "samples.jsonl", "".join(lines))


def _text(messages: list[dict]) -> str:
    parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
    return " ".join(p if isinstance(p, str) else p.get("text", f"[{p['type']}]") for p in parts)
