"""The three formats that a trained run can leave moka in, and the folders they are.

    text-merged   OUT/backbone  the language model, text path merged in      nothing is lost; `moka.load(OUT)`
                  OUT/adapter   what media tokens have beyond the text path
    hf-backbone   OUT           the language model, text path merged in      text only; transformers
    lora          OUT           one modality's path as a LoRA                one path for all tokens; peft

For text tokens MokA is a constant update ``s B A_text`` of each weight, which a merged weight or a LoRA contains exactly. Media tokens
also attend to the question, which no constant matrix does.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.adapter import MokaConfig, MokaLinear
from moka.adapter.config import TEXT
from moka.errors import MokaError, nearest
from moka.inference import LoadedModel
from moka.io import read_json, write_json
from moka.modeling.artifacts import ADAPTER, MODEL_CONFIG, save_adapter
from moka.modeling.build import resolve_backbone
from moka.modeling.hf_model import base_info
from moka.modeling.model import fingerprint

TEXT_MERGED, HF_BACKBONE, LORA = "text-merged", "hf-backbone", "lora"
FORMATS = (TEXT_MERGED, HF_BACKBONE, LORA)
BACKBONE = "backbone"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Update:
    """One linear map's constant update ``scale * B @ A``, as the adapter has it for one modality."""

    name: str  # in the bare language model
    A: torch.Tensor  # [r, in] float32
    B: torch.Tensor  # [out, r] float32
    r: int
    alpha: float
    scale: float
    transposed: bool  # the weight is [in, out]

    def delta(self) -> torch.Tensor:
        """In the layout of the weight, float32."""
        delta = (self.B @ self.A) * self.scale
        return delta.T if self.transposed else delta


class Source:
    """A live model and the updates of the modality that must be exported.

    Raises:
        MokaError: an adapter, modality or layer that cannot leave in this format.
    """

    def __init__(self, live: LoadedModel, format: str, modality: str | None = None) -> None:
        self.live, self.format = live, format
        self.model: Any = live.model
        self.base: Any = live.model.get_base_model()
        self.config: Any = live.model.peft_config["default"]
        self.is_moka = isinstance(self.config, MokaConfig)
        self.info = base_info(self.base)
        # What is written: of a composed model the language model, of a Hugging Face multimodal LLM all of it.
        self.inside = "" if self.info.hf else "language_model."
        # Of the weights that are written; the comparison is made in float32.
        self.dtype: torch.dtype = self.root.dtype
        self.modality = modality or TEXT
        if problem := self._problem(modality):
            raise MokaError(f"{live.folder}: {problem}")
        self.updates = self._read_updates()
        if not any(update.B.any() and update.A.any() for update in self.updates):
            raise MokaError(
                f"{live.folder}: the {self.modality} path of every adapted layer of the language model is zero, so an export "
                "would be the backbone as it was. Train the adapter, or take another checkpoint."
            )
        if format != LORA:
            self._check_not_tied()

    @property
    def root(self) -> Any:
        """Return the model that is written, which has the adapter inside."""
        return self.base if self.info.hf else self.base.language_model

    @property
    def backbone_place(self) -> str:
        """Where others find the backbone: an embedded one by its folder, which they need no moka to read."""
        return self.info.name if self.info.hf else str(resolve_backbone(self.info.name))

    @property
    def lossless_for_media(self) -> bool:
        """Return whether the format keeps outputs for media tokens, too."""
        return self.format == TEXT_MERGED or not self.is_moka

    def lost(self) -> list[str]:
        """Return what the export does not hold, in words."""
        if self.format == TEXT_MERGED:
            return []
        parts = []
        media = list(self.info.type_ids)
        if media and not self.info.hf:
            parts.append(f"the encoders and projectors of {', '.join(media)}: it takes no media by itself")
        if self.is_moka:
            others = [name for name in self.config.adapted if name != self.modality]
            if others:
                parts.append(
                    f"the {', '.join(others)} path of the adapter: every token goes through the {self.modality} path"
                )
            if self.config.interacts:
                parts.append("the interaction of media tokens with the question")
        return parts

    def _problem(self, modality: str | None) -> str:
        """Return why this adapter cannot be exported in this format, or an empty string."""
        config, path = self.config, self.modality
        if self.is_moka and config.method != "moka":
            return f"an adapter of method {config.method} cannot be exported; MokA and LoRA can."
        if not self.is_moka and not isinstance(config, LoraConfig):
            return f"an adapter of type {config.peft_type} cannot be exported; MokA and LoRA can."
        if modality is not None and self.format != LORA:
            return f"modality: {modality!r} goes with the format {LORA} only; {self.format} keeps the text path."
        if self.format == LORA and config.bias != "none":
            return (
                f"its trained biases (bias={config.bias!r}) have no place in a LoRA folder. Use `moka export --format "
                f"{HF_BACKBONE}`, which keeps them."
            )
        if self.is_moka:
            names = list(config.modalities)
            if config.text_merged:
                return "it is an export already (text_merged); give the run that it was made from."
            if path not in names:
                return f"modality: {path!r} is none of the adapter's: {', '.join(names)}.{nearest(path, names)}"
            if path not in config.adapted:
                return (
                    f"modality: this adapter leaves {path} tokens only (adapt is {config.adapt}), so there is no {path} path to "
                    f"export. `moka export --format lora --modality {config.adapted[0]}` exports another."
                )
        elif self.format == TEXT_MERGED:
            return (
                "it has a plain LoRA, which has one path for all tokens: there is nothing to keep apart. Use `moka export "
                f"--format {HF_BACKBONE}`, which merges all of it, or --format {LORA}."
            )
        elif path != TEXT:
            return f"modality: {path!r} is not in a plain LoRA, which has one path for all; leave it out."
        elif getattr(config, "use_dora", False) or getattr(config, "lora_bias", False):
            return "DoRA and lora_bias cannot be exported; a plain LoRA can."
        return ""

    def _read_updates(self) -> list[Update]:
        """Return the updates of the language model's layers; adapted encoders of a plain LoRA are lost with the encoders."""
        updates = []
        for path, module in self.base.named_modules():
            inside = path.startswith(self.inside)
            if isinstance(module, AuxiliaryTrainingWrapper) and inside:
                raise MokaError(f"{path} is in modules_to_save, and inside the language model; it cannot be exported.")
            if not isinstance(module, BaseTunerLayer) or not (inside or self.is_moka):
                continue
            layer: Any = module
            if inside and isinstance(module, MokaLinear):
                row = list(self.config.modalities).index(self.modality)
                A, B = layer.moka_A["default"]()[row], layer.moka_B["default"]()
                B = B if self.config.share_b else B[row]
                r, alpha, scale = layer.moka_r, layer.moka_alpha, layer.moka_scaling
            elif inside and "default" in getattr(layer, "lora_A", {}):
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                r, alpha, scale = layer.r, layer.lora_alpha, layer.scaling
            else:
                raise MokaError(
                    f"{path}: an adapted {type(module).__name__}{'' if inside else ' outside of the language model'} cannot be "
                    "exported; linear layers of the language model can."
                )
            A, B = A.detach().float().contiguous(), B.detach().float().contiguous()
            transposed = isinstance(layer.get_base_layer(), Conv1D)
            name = path.removeprefix(self.inside)
            updates.append(Update(name, A, B, r["default"], alpha["default"], scale["default"], transposed))
        return updates

    def _check_not_tied(self) -> None:
        model = self.root
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        tied = [u.name for u in self.updates if uses[id(model.get_submodule(u.name).get_base_layer().weight)] > 1]
        if tied:
            raise MokaError(
                f"{', '.join(tied)}: this weight is tied to another (tie_word_embeddings), which a merge would change as well. "
                f"Use --format {LORA}, or train without it in adapter.target_modules."
            )


def merged_copy(language_model: nn.Module, updates: Sequence[Update] | None = None) -> Any:
    """Return a copy of an adapted model with the text path (of a LoRA: all of it) in its weights, and no adapter.

    peft's ``merge_and_unload`` (0.21) fails if a full encoder is in ``modules_to_save``.

    Args:
        updates: what is added to the weights instead.
    """
    routed = {id(m.moka_model): m.moka_model for m in language_model.modules() if isinstance(m, MokaLinear)}
    for one in routed.values():
        one.detach()  # the copy has no routing, so it gets no hooks
    try:
        # Given as copied already: each refers to the full composed model, with its encoders.
        copied: Any = copy.deepcopy(language_model, dict(routed))
    finally:
        for one in routed.values():
            one.attach()
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if updates is None:
                module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, module.get_base_layer())
    for update in updates or ():
        weight: Any = copied.get_submodule(update.name).weight
        weight.data += update.delta().to(weight)
    return copied


def write(source: Source, folder: Path) -> None:
    """Write the export's tensors and configurations into an empty folder."""
    {TEXT_MERGED: _write_text_merged, HF_BACKBONE: _write_backbone, LORA: _write_lora}[source.format](source, folder)


def _write_text_merged(source: Source, folder: Path) -> None:
    fingerprint = _write_backbone(source, folder / BACKBONE)
    source.config.text_merged = True
    try:
        save_adapter(source.model, source.live.processor, folder / ADAPTER)
    finally:
        source.config.text_merged = False
    relative = f"../{BACKBONE}"
    own = {"backbone": relative, "backbone_relative": True, "backbone_fingerprint": fingerprint}
    for name, changes in ((MODEL_CONFIG, own), (CONFIG_NAME, {"base_model_name_or_path": relative})):
        path = folder / ADAPTER / name
        write_json(path, {**read_json(path), **changes})


def _write_backbone(source: Source, folder: Path) -> str:
    """Write the merged language model with tokenizer, chat template and generation config; return its fingerprint."""
    model = merged_copy(source.root)
    # The token that ends an answer may be another than the backbone's own.
    model.generation_config = _saveable(source.base.generation_config)
    model.save_pretrained(str(folder))
    _save_processor(source, folder)
    return fingerprint(model)


def _saveable(config: Any) -> Any:
    """Some published generation configs hold sampling settings without sampling, which cannot be written again."""
    config = copy.deepcopy(config)
    try:
        config.validate(strict=True)
    except ValueError:
        for name in _SAMPLING:
            setattr(config, name, None)
    return config


def _save_processor(source: Source, folder: Path) -> None:
    """Write the processor of a Hugging Face multimodal LLM; of a language model its tokenizer, with the chat template."""
    if source.info.hf:
        source.live.processor.save_pretrained(folder)
        return
    tokenizer = copy.deepcopy(source.live.processor.tokenizer)
    tokenizer.chat_template = source.live.processor.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(str(folder))


def _write_lora(source: Source, folder: Path) -> None:
    updates = source.updates
    tensors = {}
    for update in updates:
        tensors[f"base_model.model.{update.name}.lora_A.weight"] = update.A.cpu().clone()
        tensors[f"base_model.model.{update.name}.lora_B.weight"] = update.B.cpu().clone()
    r, alpha = Counter((u.r, u.alpha) for u in updates).most_common(1)[0][0]
    config = LoraConfig(
        r=r,
        lora_alpha=_whole_number(alpha),
        rank_pattern={u.name: u.r for u in updates if u.r != r},
        alpha_pattern={u.name: _whole_number(u.alpha) for u in updates if u.alpha != alpha},
        use_rslora=source.config.use_rslora,
        lora_dropout=0.0,
        target_modules=_target_modules(source.root, [u.name for u in updates]),
        fan_in_fan_out=any(u.transposed for u in updates),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.backbone_place,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    # peft writes a set, in an order that differs from process to process.
    saved = read_json(folder / CONFIG_NAME)
    write_json(folder / CONFIG_NAME, {**saved, "target_modules": sorted(saved["target_modules"])})
    meta = {"format": "pt", "moka_path": source.modality, "moka_lost": "; ".join(source.lost())}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=meta)
    _save_processor(source, folder)


def _whole_number(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The layers' plain names where these match no other, as serving engines like them; else their full paths."""
    plain = {name.rpartition(".")[2] for name in names}
    matched = {
        path.removesuffix(".base_layer")
        for path, module in model.named_modules()
        if path.removesuffix(".base_layer").rpartition(".")[2] in plain
    }
    return sorted(plain) if matched == set(names) else sorted(names)
