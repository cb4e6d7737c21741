"""A Hugging Face multimodal LLM as the base model of a run (``model: {kind: hf, name: ...}``), and what runs know of bases."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig, PreTrainedConfig

from moka.adapter import MokaConfig
from moka.distributed import default_device
from moka.errors import MokaError
from moka.io import read_json

from .hf_processing import ChatProcessor
from .language_models import loading_errors
from .model import MokaForConditionalGeneration, fingerprint
from .processing import IGNORE, Interaction
from .quantization import check_quantization

_EXPECTED = "a folder or hub name of a multimodal LLM that transformers knows (AutoModelForMultimodalLM)"


@dataclass
class BaseInfo:
    """Facts of a base model that are stored with adapters and used in messages.

    Args:
        name: folder or hub name.
        type_ids: modality -> its ``mm_token_type_ids``, text left out.
        quantization: of its linear layers: nf4, int8 or None.
        hf: whether it is a Hugging Face multimodal LLM; else a composed model.
    """

    name: str
    type_ids: dict[str, list[int]]
    quantization: str | None = None
    hf: bool = True
    fingerprint: str | None = None


def base_info(model: Any) -> BaseInfo:
    """Return the facts of a base model, or of the one inside a peft model or an objective."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    inner = getattr(model, "model", None)
    if not isinstance(model, MokaForConditionalGeneration) and isinstance(inner, MokaForConditionalGeneration):
        model = inner  # of an objective of stage 1
    if isinstance(model, MokaForConditionalGeneration):
        return BaseInfo(model.config.backbone, model.config.type_ids, model.quantization, hf=False)
    return model.moka_base


def backbone_fingerprint(model: Any) -> str:
    """Return the fingerprint of a base model's weights; of sharded ones every process has to call it."""
    if isinstance(model, MokaForConditionalGeneration):
        return model.backbone_fingerprint()
    info = base_info(model)
    info.fingerprint = info.fingerprint or fingerprint(model)
    return info.fingerprint


def load_mllm(
    name: str,
    dtype: torch.dtype,
    interaction: Interaction = "own_turn",
    quantization: str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, ChatProcessor]:
    """Load a multimodal LLM and its processor; of a speaking model (Qwen2.5-Omni) the part that understands.

    Args:
        quantization: nf4 or int8 for its linear layers, by bitsandbytes, on ``device`` (default: this process's GPU, if any).
    Raises:
        MokaError: it cannot be loaded, or has no processor with a chat template.
    """
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization is not None:
        check_quantization(quantization)
        settings: dict[str, Any] = {"load_in_8bit": True}
        if quantization == "nf4":
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            settings["bnb_4bit_use_double_quant"] = True
        where = device or default_device()
        extra |= {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": where}}
    processor = load_chat_processor(name, interaction)
    if name.startswith("tiny:"):
        from moka.testing import tiny_mllms  # known by name only

        model: Any = tiny_mllms.tiny_model(tiny_mllms.tiny_kind(name))
        model = model.to(dtype)
    else:
        with loading_errors("model.name", name, _EXPECTED):
            model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **extra)
            model = getattr(model, "thinker", model)
    type_ids = {modality: spec["type_ids"] for modality, spec in processor.modalities.items()}
    model.moka_base = BaseInfo(name, type_ids, quantization)
    return model.eval(), processor


def load_chat_processor(name: str, interaction: Interaction = "own_turn") -> ChatProcessor:
    """Load the processor of a multimodal LLM.

    Raises:
        MokaError: it cannot be loaded, or has no chat template.
    """
    if name.startswith("tiny:"):
        from moka.testing import tiny_mllms  # known by name only

        return ChatProcessor(tiny_mllms.tiny_processor(tiny_mllms.tiny_kind(name)), interaction)
    with loading_errors("model.name", name, _EXPECTED):
        if "Tiny" in str(_processor_class(name)):
            import moka.testing.tiny_mllms  # noqa: F401  # registers the processors of `--tiny`
        own = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    return ChatProcessor(own, interaction)


def load_mllm_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a multimodal LLM; of a speaking model that of the part that understands.

    Raises:
        MokaError: it cannot be loaded.
    """
    if name.startswith("tiny:"):
        from moka.testing import tiny_mllms  # known by name only

        return tiny_mllms.tiny_model(tiny_mllms.tiny_kind(name)).config
    with loading_errors("model.name", name, _EXPECTED):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return getattr(config, "thinker_config", config)


def _processor_class(name: str) -> Any:
    """Return what a local folder says of the class of its processor."""
    path = Path(name) / "processor_config.json"
    return read_json(path, dict).get("processor_class") if path.is_file() else None


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model takes of a batch: without MokA in it, a Hugging Face model knows no routing."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    routed = isinstance(model, PeftModel) and any(isinstance(c, MokaConfig) for c in model.peft_config.values())
    if routed or isinstance(base, MokaForConditionalGeneration):
        return dict(batch)
    takes = inspect.signature(type(base).forward).parameters
    return {k: v for k, v in batch.items() if k not in ("interaction_ids", "mm_token_type_ids") or k in takes}


def logits_to_keep(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the argument of a forward that computes logits only where a next token is supervised, if the model takes it.

    Args:
        labels: [batch, seq], -100 outside of answers.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    return {"logits_to_keep": _supervised(labels)[0]} if takes else {}


def answer_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the mean loss over the answers' tokens, for ``Trainer.compute_loss_func``.

    Args:
        outputs: of a model; ``logits`` [batch, seq or kept, vocabulary], see `logits_to_keep`.
        labels: [batch, seq].
        num_items_in_batch: supervised tokens of the full batch, over all micro-batches and processes; default: of ``labels``.
    """
    keep, targets = _supervised(labels)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if logits.shape[1] != len(keep):
        logits = logits[:, keep]
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return total / ((targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)


def _supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions [kept] whose next token is supervised in any row, and these tokens [batch, kept]."""
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = (shifted != IGNORE).any(0).nonzero().squeeze(1)
    return keep, shifted[:, keep]


def check_hf_run(
    model: Any, stages: list[int], training: Mapping[str, Any], feature_cache: str | None, where: str
) -> None:
    """Refuse settings of a run that mean nothing for a Hugging Face multimodal LLM.

    Args:
        model: a section ``model`` of kind hf.
    Raises:
        MokaError: names the key and the way out.
    """
    problems = {
        "model.name is not set: name a folder or hub model": not model.name,
        "model.modalities: the model has its own encoders; take it out": bool(model.modalities),
        "model.connectors: the model has its own projectors; take it out": bool(model.connectors),
        "model.chat_template: the processor's own is used; take it out": model.chat_template is not None,
        f"stages: {stages}: there are no connectors to train; set stages: [2]": stages != [2],
        "training.packing: samples of a row would see each other's media; take it out": bool(training.get("packing")),
        "training.train_sampling_strategy: lengths are not known before encoding; use random": training.get(
            "train_sampling_strategy"
        )
        == "group_by_length",
        "data.feature_cache: encoders of Hugging Face models are not cached; take it out": feature_cache is not None,
    }
    for problem, found in problems.items():
        if found:
            raise MokaError(f"{where}: model.kind is hf, and {problem}.")
