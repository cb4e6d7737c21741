"""Exporting: check the request, write, read back and compare, describe; a folder appears when all of it went well."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import moka
from moka.data.jsonl import JsonlDataset
from moka.errors import MokaError, nearest
from moka.inference import EXPORT, export_kind, find_adapter, load
from moka.io import atomic_dir, check_output_folder, write_json, write_text
from moka.modeling.artifacts import ADAPTER, AdapterDescription
from moka.modeling.hf_model import backbone_fingerprint
from moka.training.run_dir import CONFIG

from . import formats, verify
from .card import make_card
from .formats import FORMATS, HF_BACKBONE, LORA, TEXT_MERGED, Source
from .verify import Checks, make_probes


@dataclass
class ExportReport:
    """The report of an export. Differences are those of the logits, as a part of the largest one."""

    format: str
    output: Path
    source: Path
    changed: int
    expected: int
    largest_difference: float
    differences: dict[str, float]
    losses: dict[str, float]
    bytes: int
    lost: list[str] = field(default_factory=list)
    next_command: str = ""
    trained_on: str | None = None  # nf4 or int8, where the run's backbone was quantised


def export(
    run: str | Path,
    output: str | Path,
    format: str = TEXT_MERGED,
    *,
    modality: str | None = None,
    samples: str | Path | None = None,
    overwrite: bool = False,
    backbone: str | None = None,
    dtype: str = "float32",
) -> ExportReport:
    """Write a trained run in a format that others can use, and verify what was written.

    Args:
        run: a run folder of ``moka train``, or an adapter folder.
        output: the folder to write; it is there complete, or not at all.
        format: "text-merged", "hf-backbone" or "lora"; see ``moka.export.formats``.
        modality: for "lora": whose path to export (default: text).
        samples: JSONL file of chats to compare on besides random inputs (the first 32).
        overwrite: replace an export that is there.
        backbone: where the language model is here, if not at the recorded name.
        dtype: of the written weights: float32, bfloat16 or auto. A backbone that is quantised on disk is turned into it.
            One that was quantised for training (``model.quantization``) is read as it is on disk: merging into
            quantised weights would round them again.
    Raises:
        MokaError: nothing to export, a place that is taken, or a verification that failed.
    """
    if format not in FORMATS:
        raise MokaError(f"format: {format!r} is not one of {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    if export_kind(run) is not None:
        raise MokaError(f"{run} is an export already ({export_kind(run)}); give the run that it was made from.")
    adapter = find_adapter(run)
    check_output_folder(Path(output), adapter, lambda folder: export_kind(folder) is not None, overwrite)
    out = Path(output).resolve()
    own = None if samples is None else JsonlDataset(samples, require_answer=False)
    live = load(adapter, device="cpu", dtype=dtype, backbone=backbone, dequantize=True)
    source = Source(live, format, modality)
    name = source.info.name
    if Path(source.backbone_place).resolve().is_relative_to(out):
        raise MokaError(f"--output: {out} has the backbone {name} of this run; choose another folder.")
    probes = make_probes(live, own)
    with atomic_dir(out) as part:
        formats.write(source, part)
        # Compared in float32, also for bfloat16 weights: the noise of computing in bfloat16 would hide a wrong merge.
        live.model.float()
        expected = verify.live_logits(live, probes)
        try:
            checks = verify.verify(source, part, probes, expected)
        except Exception as error:  # whatever a damaged file makes a loader say
            reason = (
                str(error).strip().splitlines()[0].replace(str(part), str(out)) if str(error).strip() else repr(error)
            )
            raise MokaError(
                f"The export to {out} failed its verification and was removed: {reason.rstrip('.')}. The run is as it was; "
                "try again, and report it if it stays."
            ) from error
        _keep_config(adapter, part, format)
        write_json(part / EXPORT, _description(source, adapter, checks))
        card = make_card(source, out.name, str(run), checks, name)
        write_text(part / "README.md", card)
        if format == TEXT_MERGED:
            write_text(part / ADAPTER / "README.md", card)
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    return ExportReport(
        format=format,
        output=out,
        source=adapter,
        changed=checks.changed,
        expected=checks.expected,
        largest_difference=checks.largest,
        differences=checks.differences,
        losses=checks.losses,
        bytes=size,
        lost=source.lost(),
        next_command=_next_command(format, str(output), source.backbone_place, source.info.hf),
        trained_on=AdapterDescription.read(adapter).quantization,
    )


def _keep_config(adapter: Path, folder: Path, format: str) -> None:
    """The run's configuration has the questions of `moka eval`. Without its first line it marks no run of training."""
    config = adapter.parent / CONFIG
    if format == TEXT_MERGED and adapter.name == ADAPTER and config.is_file():
        text = config.read_text(encoding="utf-8")
        write_text(folder / CONFIG, f"# Of the run that this was exported from, for `moka eval`.\n{text}")


def _description(source: Source, adapter: Path, checks: Checks) -> dict[str, Any]:
    return {
        "kind": source.format,
        "format_version": 1,
        "source": {
            "adapter": str(adapter),
            "adapter_sha256": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "method": "moka" if source.is_moka else "lora",
            "backbone": source.info.name,
            "backbone_fingerprint": backbone_fingerprint(source.base),
        },
        "path": source.modality if source.is_moka else "all",
        "dtype": str(source.dtype).removeprefix("torch."),
        "versions": {
            "moka": moka.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "lossy": bool(source.lost()),
        "lost": source.lost(),
        "checks": {
            "modules_changed": checks.changed,
            "modules_expected": checks.expected,
            "tensors_unchanged": checks.unchanged_tensors,
            "tolerance": checks.tolerance,
            "largest_difference": checks.largest,
            "differences": checks.differences,
            "losses": checks.losses,
        },
    }


def _next_command(format: str, output: str, backbone: str, hf: bool) -> str:
    place = shlex.quote(output)
    if format == TEXT_MERGED:
        return f'moka generate {place} "Your question?"'
    auto = "AutoModelForMultimodalLM" if hf else "AutoModelForCausalLM"
    load_model = f'{auto}.from_pretrained("{output if format == HF_BACKBONE else backbone}")'
    return f'PeftModel.from_pretrained({load_model}, "{output}")' if format == LORA else load_model
