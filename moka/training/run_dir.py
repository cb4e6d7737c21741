"""The run folder: what a run leaves after, and the self-contained adapter folder in it.

RUN/config.yaml         the resolved configuration
RUN/connector/          stage 1: trained encoders and projectors
RUN/adapter/            adapter, projectors, encoders, processor, model configuration
RUN/metrics.jsonl       one line for each logging step
RUN/loss.png            loss and learning rate
RUN/balance.png         throughput, waiting for data, gradient norms by part; shares of modalities if observed
RUN/diverged.json       the steps and samples at which a run diverged
RUN/samples.jsonl       answers to validation questions
RUN/evaluation.json     written by `moka eval`
RUN/README.md           model card
RUN/summary.json        written last: the run is complete
RUN/checkpoints/        for --resume
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

import moka
from moka.config import RunConfig, config_from_dict
from moka.errors import MokaError
from moka.io import append_jsonl, read_jsonl, write_text
from moka.modeling.artifacts import ADAPTER
from moka.yaml_files import load_yaml

from .lock import LOCK, FolderLock

CONFIG, CONNECTOR, METRICS, SUMMARY = "config.yaml", "connector", "metrics.jsonl", "summary.json"
DIVERGED = "diverged.json"
_MARK = "# Resolved by moka "
# All that a run and its evaluation write; --overwrite removes these and nothing else.
_ARTEFACTS = (
    *(ADAPTER, CONNECTOR, METRICS, SUMMARY, "README.md", "loss.png", "balance.png", "samples.jsonl", DIVERGED),
    *("evaluation.json", "predictions.jsonl", "benchmarks", "comparison.json", "checkpoints", "tensorboard"),
    *("dropped-stage1.jsonl", "dropped-stage2.jsonl", "lengths-stage1.npz", "lengths-stage2.npz"),
    *("bad-media-train.jsonl", "bad-media-alignment.jsonl", "bad-media-validation.jsonl"),
)
# What may differ when a run is resumed: it does not reach the training.
_FREE_ON_RESUME = ("evaluation", "output")


def _is_leftover(path: Path) -> bool:
    """Return whether a killed run left this before its configuration was written: its lock, or a temporary file."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


class RunFolder:
    """A run's folder. Creating it is the last thing before training, so that a refused run leaves nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = FolderLock(self.path)

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that already has a run, unless it must be resumed or replaced; one run is locked."""
        is_run = self.is_run()
        if is_run:
            self.lock.take()
        problem = None
        file = next((place for place in (self.path, *self.path.parents) if place.exists() and not place.is_dir()), None)
        if file is not None:
            problem = f"output.dir: {file} is a file; name a folder."
        elif resume and overwrite:
            problem = "--resume continues with a run and --overwrite replaces it; give one of them."
        elif resume and not is_run:
            problem = f"--resume: {self.path} has no run; leave --resume out to start one."
        elif is_run and not resume and not overwrite:
            problem = (
                f"output.dir: {self.path} already has a run. Choose another with output.dir=..., continue with --resume, or "
                "replace it with --overwrite."
            )
        elif not is_run and self.path.is_dir() and not all(map(_is_leftover, self.path.iterdir())):
            problem = f"output.dir: {self.path} is not empty and contains no run of moka; choose another folder."
        if problem is not None:
            raise MokaError(problem)

    def is_run(self) -> bool:
        """Return whether a run of ours is there; someone else's config.yaml is none."""
        try:
            return (self.path / CONFIG).read_text(encoding="utf-8").startswith(_MARK)
        except (OSError, UnicodeDecodeError):
            return False

    def check_same(self, config: RunConfig) -> None:
        """A resumed run trains on with the settings it began with, or its result would be of no use."""
        raw = load_yaml((self.path / CONFIG).read_text(encoding="utf-8"))
        began = _flat(_without_secrets(config_from_dict(raw, str(self.path / CONFIG)).to_dict()))
        now = _flat(_without_secrets(config.to_dict()))
        for key in sorted(set(began) | set(now)):
            if began.get(key) != now.get(key) and key.split(".")[0] not in _FREE_ON_RESUME:
                raise MokaError(
                    f"--resume: {key} is {began.get(key)!r} in {self.path / CONFIG}, and {now.get(key)!r} is given. Resume "
                    f"with `moka train {self.path / CONFIG} --resume`, or start another run with output.dir=..."
                )

    def create(self, config: RunConfig) -> None:
        """Make the folder with the resolved configuration; what an earlier run left in it goes."""
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MokaError(f"output.dir: {self.path} cannot be made ({error.strerror}); choose another.") from error
        if self.lock.take() and self.is_run():
            raise MokaError(f"output.dir: another run was begun in {self.path} meanwhile; choose another folder.")
        self._clear()
        text = yaml.safe_dump(_without_secrets(config.to_dict()), sort_keys=False, allow_unicode=True)
        try:
            write_text(self.path / CONFIG, f"{_MARK}{moka.__version__}\n{text}")
        except BaseException:
            self.lock.release()
            if made:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _clear(self) -> None:
        """Remove what moka wrote. The configuration goes last: until then the folder is known to be a run."""
        leftovers = [path.name for path in self.path.iterdir() if _is_leftover(path) and path.name != LOCK]
        for name in (*leftovers, *_ARTEFACTS, CONFIG):
            old = self.path / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a run that has nothing to continue from."""
        if not (self.path / CONNECTOR).exists() and not any(self.path.glob("checkpoints/*/checkpoint-*")):
            self._clear()
            self.lock.release()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        # NaN is no JSON.
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        append_jsonl(self.path / METRICS, record)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every logged record."""
        return read_jsonl(self.path / METRICS)

    def rewind_metrics(self, stage: int, step: int) -> None:
        """Forget what was logged after ``step`` of ``stage``: a resumed run logs it again."""
        kept = []
        for record in self.metrics():
            before = record["stage"] < stage
            if before or (record["stage"] == stage and record["step"] <= step and "train_runtime" not in record):
                kept.append(json.dumps(record) + "\n")
        write_text(self.path / METRICS, "".join(kept))


# Keys of `training` and `alignment` whose values are never written or compared.
_SECRETS = ("hub_token",)


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: v for key, v in section.items() if key not in _SECRETS} if isinstance(section, dict) else section
        for name, section in values.items()
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
