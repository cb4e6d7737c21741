"""The run folder: what a run leaves behind, and the self-contained adapter folder in it.

RUN/config.yaml         the resolved configuration
RUN/connector/          stage 1: trained encoders and projectors
RUN/adapter/            adapter, projectors, encoders, processor, model configuration
RUN/metrics.jsonl       one line for each logging step
RUN/loss.png            loss and learning rate
RUN/samples.jsonl       answers to validation questions
RUN/evaluation.json     written by `moka eval`
RUN/README.md           model card
RUN/checkpoints/        for --resume
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import moka
from moka.errors import MokaError

from .arguments import RunConfig
from .connector import trained_parts

CONFIG, ADAPTER, CONNECTOR, METRICS = "config.yaml", "adapter", "connector", "metrics.jsonl"
MODEL_CONFIG = "moka_model.json"
FORMAT_VERSION = 1


class RunFolder:
    """A run's folder. Creating it is the last thing before training, so that a refused run leaves nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that already holds a run, unless it is to be resumed or replaced."""
        holds = (self.path / CONFIG).exists()
        if self.path.exists() and not self.path.is_dir():
            raise MokaError(f"output.dir: {self.path} is a file; name a folder.")
        if resume and not holds:
            raise MokaError(f"--resume: {self.path} holds no run; leave --resume out to start one.")
        if holds and not resume and not overwrite:
            raise MokaError(
                f"output.dir: {self.path} already holds a run. Choose another with output.dir=..., go on with --resume, or "
                "replace it with --overwrite."
            )
        if not holds and self.path.is_dir() and any(self.path.iterdir()):
            raise MokaError(f"output.dir: {self.path} is not empty and holds no run of ours; choose another folder.")

    def create(self, config: RunConfig, overwrite: bool) -> None:
        if overwrite and (self.path / CONFIG).exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (self.path / CONFIG).write_text(f"# Resolved by moka {moka.__version__}\n{text}", encoding="utf-8")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, record: dict[str, Any]) -> None:
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def save_adapter(model: PeftModel, processor: Any, folder: str | Path, state_dict: dict | None = None) -> None:
    """Write a self-contained adapter folder and read it back.

    Raises:
        MokaError: a tensor came out empty or not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would look the backbone's name up on the hub, which an embedded one is not on.
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    processor.save_pretrained(folder)
    base = model.get_base_model()
    (folder / MODEL_CONFIG).write_text(
        json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "moka_version": moka.__version__,
                "backbone": base.config.backbone,
                "backbone_fingerprint": base.backbone_fingerprint(),
                "modalities": base.config.modalities,
                "fill_token_id": base.config.fill_token_id,
                "parts": trained_parts(base),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise MokaError(
                f"{folder}: {key} was saved empty or not finite; training diverged, or shards were not gathered."
            )


def check_trained(folder: str | Path) -> None:
    """After training: an adapter whose every B is still zero has learned nothing, and must not look like a result."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    ups = [t for key, t in tensors.items() if key.endswith(("moka_B", "lora_B.weight"))]
    if ups and all(not t.any() for t in ups):
        raise MokaError(f"{folder}: every B is still zero after training; no gradient reached the adapter.")
