"""From a configuration to a model with its adapter."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from moka.adapter import MokaConfig
from moka.adapter.config import DEFAULT_MODALITIES, TEXT
from moka.adapter.targets import fill_targets
from moka.adapter.text_decoder import coverage, language_decoder
from moka.config import MOKA_ONLY, PEFT_METHODS, ModelSection, RunConfig, adapter_settings
from moka.errors import MokaError
from moka.modeling import MokaForConditionalGeneration, MokaProcessor
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.encoders import Encoder, build_encoder
from moka.modeling.hf_model import base_info, load_mllm
from moka.modeling.hf_processing import ChatProcessor
from moka.modeling.language_models import load_config, load_tokenizer, loading_errors
from moka.modeling.quantization import logical_numel

from .artifacts import load_connector, trained_parts
from .sharding import fsdp_requested, without_sharding, zero_stage


def resolve_backbone(name: str | Path) -> str | Path:
    """Return the Hugging Face model folder of an embedded or tiny backbone, prepared on first use; any other name unchanged."""
    if not str(name).startswith(("embedded:", "tiny:")):
        return name
    from moka.demo.embedded import resolve_backbone as prepare  # the embedded assets are known by name only

    return prepare(name)


def choose_dtype(name: str) -> torch.dtype:
    """float32, bfloat16, or for "auto" what the device computes in: bfloat16 is about 40 times slower on most CPUs."""
    if name == "auto":
        return torch.bfloat16 if is_torch_bf16_gpu_available() else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise MokaError(f"model.dtype: {name!r} is not one of auto, {', '.join(dtypes)}.")
    return dtypes[name]


def build_model(
    section: ModelSection, pretrained: bool = True, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """The base model and its processor: composed, with fresh projectors, or a Hugging Face multimodal LLM.

    Args:
        device: where a quantised model is; default: this process's GPU if there is one. Others are on the CPU.
    Raises:
        MokaError: a backbone that is not there, an unknown encoder or projector.
    """
    if section.kind == "hf":
        return load_mllm(
            section.backbone,
            choose_dtype(section.dtype),
            section.interaction,
            section.quantization,
            device,
            section.attn_implementation,
        )
    folder = resolve_backbone(section.backbone)
    extra: dict[str, Any] = {}
    if section.attn_implementation:
        extra["attn_implementation"] = section.attn_implementation
    tokenizer = load_tokenizer(folder, name=section.backbone)
    with loading_errors("model.backbone", section.backbone):
        model = MokaForConditionalGeneration.from_backbone(
            str(folder),
            section.modalities,
            name=section.backbone,
            pretrained=pretrained,
            quantization=section.quantization,
            device=device,
            dtype=choose_dtype(section.dtype),
            **extra,
        )
    # Encoders and projectors compute in float32, whatever the backbone's type: they are small and newly trained.
    model.encoders.float()
    model.projectors.float()
    processor = MokaProcessor.from_model(
        model, tokenizer, chat_template=section.chat_template, interaction=section.interaction
    )
    return model, processor


def check_not_sharded(section: ModelSection, stages: Collection[TrainingArguments]) -> None:
    """Raises `MokaError` where a quantised backbone would be split over processes: its packed weights cannot be."""
    if section.quantization is None:
        return
    fsdp = fsdp_requested() or any(one.fsdp for one in stages)
    if fsdp or any(zero_stage(one) == 3 for one in stages):
        raise MokaError(
            f"model.quantization: {section.quantization} does not go with {'FSDP' if fsdp else 'ZeRO-3'}, which splits the "
            "backbone's weights over processes. Use DDP or ZeRO-2, or set model.quantization: null."
        )


def context_length(section: ModelSection, config: Any) -> int | None:
    """Return the longest sample in tokens: the configured one, within the context of a backbone's configuration."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if section.max_length and context and section.max_length > context:
        raise MokaError(f"model.max_length: {section.max_length} exceeds the backbone's context of {context} tokens.")
    return section.max_length or context


def adapter_modalities(model: Any) -> dict[str, list[int]]:
    """Text and the model's own modalities, as ``MokaConfig.modalities`` wants them."""
    return {
        TEXT: list(DEFAULT_MODALITIES[TEXT]),
        **{name: list(ids) for name, ids in base_info(model).type_ids.items()},
    }


def attach_adapter(model: Any, section: dict[str, Any], processor: Any = None) -> PeftModel:
    """Freeze the model, add the adapter of a section ``adapter``, keep projectors and trainable encoders training.

    Args:
        processor: of a Hugging Face multimodal LLM: the adapter then knows its turns and marks of media.
    """
    try:
        with warnings.catch_warnings():
            # `moka train` prints the coverage itself.
            warnings.filterwarnings("ignore", message=r"target_modules: the adapter .* covers")
            adapted = get_peft_model(model, _adapter_config(model, section, processor))
    except ValueError as error:  # peft's own, and ours
        raise MokaError(f"adapter: {' '.join(str(error).split())}") from error
    adapted.peft_config["default"].base_model_name_or_path = base_info(model).name
    for module in adapted.modules():
        if isinstance(module, Encoder) and module.is_trained:
            module.freeze_unused()  # peft made every parameter of its copy trainable
    return adapted


def _adapter_config(model: Any, section: dict[str, Any], processor: Any = None) -> PeftConfig:
    settings: dict[str, Any] = {
        **{key: value for key, value in adapter_settings(section).items() if key != "preset"},
        "modules_to_save": trained_parts(model),
        "task_type": "CAUSAL_LM",
    }
    if settings["method"] not in PEFT_METHODS:
        settings["modalities"] = adapter_modalities(model)
        if isinstance(processor, ChatProcessor):
            return MokaConfig.from_processor(processor.processor, **settings)
        return MokaConfig(**settings)
    method = settings.pop("method")
    settings = {key: value for key, value in settings.items() if key not in MOKA_ONLY}
    settings["target_modules"] = _lora_targets(model, settings["target_modules"])
    alpha, dropout = settings.pop("alpha"), settings.pop("dropout")
    return LoraConfig(lora_alpha=alpha, lora_dropout=dropout, use_dora=method == "dora", **settings)


def adapter_coverage(adapted: PeftModel) -> float:
    """Return the share (0 to 1) of the weights in the decoder's blocks that the layers of a MokA or LoRA adapter hold."""
    base = adapted.get_base_model()
    return coverage(base, [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)])


def adapter_parameters(model: Any, section: dict[str, Any]) -> int:
    """Trainable parameters of the adapter that ``attach_adapter`` would add, and its errors, found on a model without
    memory: ``model`` itself is left as it is.
    """
    with torch.device("meta"), without_sharding():
        config: Any = copy.deepcopy(model.config)
        skeleton: Any = type(model)(config)
        if base_info(model).hf:
            skeleton.moka_base = base_info(model)
        return count_parameters(attach_adapter(skeleton, section))["adapter"]


def _lora_targets(model: Any, targets: list[str] | str | None) -> str:
    """Return a regex for what names mean to MokA, the decoder's layers: to peft's LoRA they reach encoders too."""
    if isinstance(targets, str):
        return targets
    config = MokaConfig(target_modules=targets)
    fill_targets(config, model)
    names = "|".join(re.escape(name) for name in sorted(config.target_modules or ()))
    decoder = language_decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    return (
        rf"{re.escape(path)}\.(?:.*\.)?(?:{names})" if base_info(model).hf else rf"language_model\.(?:.*\.)?(?:{names})"
    )


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters by part (adapter, encoders, projectors) and the total of all."""
    counts = {"adapter": 0, "encoders": 0, "projectors": 0, "total": 0}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # peft's untrained copy
        number = logical_numel(parameter)
        counts["total"] += number
        if parameter.requires_grad:
            part = next((p for p in ("encoders", "projectors") if f"{p}." in name), "adapter")
            counts[part] += number
    return counts


def build_for_stage_two(config: RunConfig) -> tuple[Any, Any]:
    """The composed model with every projector filled from the connectors that the configuration names."""
    model, processor = build_model(config.model, device=_training_device(config))
    if config.model.kind == "hf":
        return model, processor
    filled: dict[str, str] = {}
    for folder in config.model.connectors:
        for part in load_connector(model, folder):
            if part in filled:
                raise MokaError(f"model.connectors: {part} is in {filled[part]} and in {folder}; name one of them.")
            filled[part] = folder
    empty = [part for part in trained_parts(model) if part not in filled]
    if empty and config.model.connectors:
        raise MokaError(f"model.connectors: none of {config.model.connectors} has {', '.join(empty)}; add its stage 1.")
    return model, processor


def _training_device(config: RunConfig) -> str | None:
    """Where a run keeps to the CPU, also next to a GPU; None: the default."""
    on_cpu = all(config.section(stage).get("use_cpu") for stage in config.stages)
    return "cpu" if on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") else None


def build_processor(section: ModelSection) -> tuple[MokaForConditionalGeneration, MokaProcessor]:
    """As ``build_model``, but the model is a skeleton without memory: only configurations and the tokenizer are read.

    For what needs no weights, such as counting tokens; the skeleton says sizes and the context length.

    Raises:
        MokaError: a backbone that is not there, an unknown encoder or projector.
    """
    if section.kind == "hf":
        raise MokaError(
            "model.kind: hf: this command needs a model that moka composes of encoders and a language model. Set "
            "model.backbone and model.modalities in place of model.name."
        )
    folder = resolve_backbone(section.backbone)
    with loading_errors("model.backbone", section.backbone):
        tokenizer = load_tokenizer(folder, name=section.backbone)
        text_config = load_config(folder)
    config = MokaModelConfig(text_config, section.modalities, backbone=section.backbone)
    with torch.device("meta"):
        encoders: dict[str, Any] = {}
        for name, spec in config.modalities.items():
            encoders[name] = build_encoder(spec["encoder"], pretrained=False)
            spec["encoder"] = encoders[name].to_dict()
        skeleton = MokaForConditionalGeneration(config, encoders=encoders)
    processor = MokaProcessor.from_model(
        skeleton, tokenizer, chat_template=section.chat_template, interaction=section.interaction
    )
    return skeleton, processor
