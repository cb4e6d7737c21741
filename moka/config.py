"""One YAML, one run: the sections of a run's configuration, checked key by key.

The sections ``adapter``, ``alignment`` and ``training`` are the fields of `moka.MokaConfig` and of ``transformers.TrainingArguments``,
with a few of moka's own (`AdapterSection`, `MokaTrainingArguments`); in a `RunConfig` they are plain values, from which adapter
and arguments are built once model and processes are known.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import transformers
from peft import LoraConfig
from transformers import TrainingArguments

import moka
from moka.adapter.config import PRESETS, TEXT, MokaConfig
from moka.balance.balance import check_modalities
from moka.balance.registry import build_strategies
from moka.errors import MokaError, nearest
from moka.modeling.encoders import tiny_encoder
from moka.modeling.hf_model import check_hf_run
from moka.modeling.processing import Interaction
from moka.modeling.projectors import tiny_projector
from moka.modeling.quantization import Quantization
from moka.type_checks import check_types, type_schema
from moka.yaml_files import find_config, read_config

SECTIONS = {1: "alignment", 2: "training"}  # of each stage
DATA = {1: "alignment", 2: "train"}  # the training data of each stage
Source = str | dict[str, Any] | list[Any] | None


def _help(text: str, minimum: float | None = None) -> dict[str, Any]:
    return {"help": text, "minimum": minimum}


@dataclass
class ModelSection:
    kind: Literal["composed", "hf"] = field(
        default="composed",
        metadata=_help(
            "composed: backbone, encoders and projectors; hf: a Hugging Face multimodal LLM as it is (name)."
        ),
    )
    name: str | None = field(
        default=None, metadata=_help("Of kind hf: folder or hub name, such as Qwen/Qwen2.5-Omni-7B.")
    )
    backbone: str = field(
        default="embedded:smollm2-135m",
        metadata=_help("Hub name or folder of a causal language model, or embedded:smollm2-135m."),
    )
    modalities: dict[str, dict] = field(
        default_factory=dict,
        metadata=_help("Modality -> {encoder: {type, ...}, projector: {type, ...}, type_ids: [...]}."),
    )
    connectors: list[str] = field(
        default_factory=list,
        metadata=_help(
            "What stage 2 starts from: stage-1 results (RUN/connector), or published projector files "
            "(visual_pretrain.bin, audio_pretrain.bin, mm_projector.bin)."
        ),
    )
    chat_template: str | None = field(
        default=None, metadata=_help("chatml, bare (shortest), plain, or Jinja text; default: the tokenizer's own.")
    )
    interaction: Interaction = field(
        default="own_turn",
        metadata=_help("Which question a medium interacts with: own_turn or first_turn."),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata=_help("float32, bfloat16 or auto: bfloat16 where the accelerator computes in it."),
    )
    quantization: Quantization | None = field(
        default=None,
        metadata=_help("nf4 (4 bits) or int8: the frozen backbone's linear layers, by bitsandbytes."),
    )
    max_length: int | None = field(
        default=None, metadata=_help("Longest sample in tokens; default: the backbone's context length.", 1)
    )
    attn_implementation: str | None = field(default=None, metadata=_help("sdpa, eager, flash_attention_2, ..."))
    tiny: bool = field(
        default=False, metadata=_help("Tiny random parts of the same architecture: the full run in seconds.")
    )


@dataclass
class AdapterSection(MokaConfig):
    """The keys of ``adapter``: the fields of `MokaConfig`, and their method and preset. Not instantiated."""

    method: Literal[
        "moka",
        "lora",
        "dora",
        "multiple_lora",
        "loramoe",
        "hydralora",
        "uni_mm_lora",
        "uni_mm_lora_gate",
        "imod",
        "none",
    ] = field(  # type: ignore[assignment]  # more than MokaConfig has
        default="moka",
        metadata=_help("moka; lora or dora (peft's, on the same layers); a method of docs/comparison.md; or none."),
    )
    preset: Literal[
        "paper",
        "official-avt",
        "official-vt",
        "uni_modal_lora",
        "moka_no_interaction",
        "moka_reversed",
        "moka_mean",
    ] = field(  # type: ignore[assignment]  # a method of MokaConfig
        default="paper",
        metadata=_help(
            "Where defaults come from: paper, official-avt, official-vt, or a baseline that is a setting of MokA."
        ),
    )


_SOURCE = (
    "JSONL file, tar shards, embedded:TASK, {format: NAME, root: FOLDER, split: ...}, a list of these, or a mixture: a list of "
    "{source: ..., weight: 0.3, streaming: true}."
)


@dataclass
class DataSection:
    train: Source = field(default=None, metadata=_help(f"{_SOURCE} For stage 2."))
    alignment: Source = field(default=None, metadata=_help("The same, for stage 1."))
    validation: Source = field(default=None, metadata=_help("The same; loss during training."))
    test: Source = field(default=None, metadata=_help("The same; only `moka eval` reads it."))
    media_root: str | None = field(default=None, metadata=_help("Folder that media paths are relative to."))
    train_size: int | None = field(default=None, metadata=_help("Use that many training samples.", 1))
    validation_size: int | None = field(default=None, metadata=_help("Use that many validation samples.", 1))
    video_frames: int = field(default=10, metadata=_help("Pictures taken from each video.", 1))
    audio_windows: dict | None = field(
        default=None,
        metadata=_help("Sound as several clips: {count: 10, seconds: 1.0, every: 1.0, first: 0.5}, in seconds."),
    )
    audio_track: int = field(
        default=0, metadata=_help("Which audio stream, from 0, of files that have several (languages).", 0)
    )
    on_bad_media: Literal["error", "skip", "substitute"] = field(
        default="error",
        metadata=_help("error; skip (all files are tried before training) or substitute, within the budget."),
    )
    bad_media_budget: float = field(default=0.01, metadata=_help("Share of samples that may be bad.", 0))
    feature_cache: str | None = field(
        default=None, metadata=_help("Folder of `moka cache`: frozen encoders' features, read instead of media.")
    )


def _inherited(name: str, default: Any) -> Any:
    """Return a field of ``TrainingArguments`` with another default."""
    return field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class MokaTrainingArguments(TrainingArguments):
    """The keys of ``training`` and ``alignment``: the fields of ``transformers.TrainingArguments``, and moka's own."""

    global_batch_size: int | None = field(
        default=None,
        metadata=_help(
            "Samples per optimizer step over all processes; accumulation follows, a device takes no more.", 1
        ),
    )
    encoder_learning_rate: float | None = field(
        default=None, metadata=_help("Learning rate of trainable encoders (default: learning_rate).", 0)
    )
    projector_learning_rate: float | None = field(
        default=None, metadata=_help("Learning rate of projectors (default: learning_rate).", 0)
    )
    objective: Literal["language_modeling", "embedding"] = field(
        default="language_modeling",
        metadata=_help("Stage 1: language_modeling, or embedding (no pass through the language model)."),
    )
    packing: bool = field(
        default=False,
        metadata=_help("Fill rows of model.max_length tokens with several samples; batch sizes then count rows."),
    )
    observe_modalities: int = field(
        default=0,
        metadata=_help(
            "Stage 2: every that many steps, split B's gradient by modality and log the shares (0: never).", 0
        ),
    )

    fsdp: bool | str | None = _inherited("fsdp", None)  # type: ignore[assignment]  # text for the command line only
    # transformers has one more, "batch_rebalance", which would read every sample for its length.
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = _inherited(
        "train_sampling_strategy", "random"
    )
    logging_steps: float = _inherited("logging_steps", 10)
    logging_first_step: bool = _inherited("logging_first_step", True)
    # The filter would put the mean of earlier steps instead of NaN, and hide a run that diverged.
    logging_nan_inf_filter: bool = _inherited("logging_nan_inf_filter", False)
    disable_tqdm: bool | None = _inherited("disable_tqdm", False)
    # Every parameter has a gradient in every step; to look for others breaks reentrant checkpointing.
    ddp_find_unused_parameters: bool | None = _inherited("ddp_find_unused_parameters", False)
    remove_unused_columns: bool = _inherited("remove_unused_columns", False)
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    prediction_loss_only: bool = _inherited("prediction_loss_only", True)


@dataclass
class EvaluationSection:
    size: int | None = field(default=None, metadata=_help("Number of test questions; default: all.", 1))
    blank_size: int | None = field(default=None, metadata=_help("Questions asked again with a modality blanked.", 1))
    blank: bool = field(default=True, metadata=_help("Repeat with each modality blanked."))
    batch_size: int = field(default=32, metadata=_help("Questions generated at once.", 1))
    max_new_tokens: int = field(default=16, metadata=_help("Longest answer in tokens.", 1))
    benchmarks: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("Benchmark -> its data, as in data.test: what `moka eval RUN --benchmark NAME` asks."),
    )


@dataclass
class OutputSection:
    dir: str = field(default="runs/moka", metadata=_help("Run folder; must not hold another run."))
    samples: int = field(default=8, metadata=_help("Validation questions answered at the end.", 0))


_DERIVED = "moka sets it from the model and its files"
_ALWAYS = "moka sets it as its batches need it"
# Keys that cannot be chosen, and why.
_RESERVED: dict[type, dict[str, str]] = {
    AdapterSection: {
        "modalities": "they are those of model.modalities",
        "modules_to_save": "they are the projectors and the encoders with trainable: true",
        **dict.fromkeys(
            (
                *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
                *("inference_mode", "format_version", "text_merged"),
                *("modality_token_ids", "structure_token_ids", "turn_markers"),
            ),
            _DERIVED,
        ),
    },
    MokaTrainingArguments: {
        "output_dir": "it is set by output.dir",
        "resume_from_checkpoint": "it is set by `moka train --resume`",
        "enable_jit_checkpoint": "moka saves and ends on SIGTERM by itself",
        "remove_unused_columns": _ALWAYS,
        "label_names": _ALWAYS,
        "prediction_loss_only": _ALWAYS,
        "save_only_model": "a checkpoint without the optimizer could not be resumed from",
        "ignore_data_skip": "a resumed run would train on the same samples again",
        "auto_find_batch_size": "it would change the global batch, and on several processes stop them; lower the batch size",
        "average_tokens_across_devices": "moka always averages over the tokens of the full batch",
        "label_smoothing_factor": "moka computes the loss at the answer's positions only, which cannot be smoothed",
    },
}
# Of transformers' fields, what would otherwise fail late, or mean something else.
_MINIMUM = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit",), 1),
    **dict.fromkeys(("learning_rate", "dataloader_num_workers", "seed", "data_seed"), 0),
}
_ABOVE_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
PEFT_METHODS = ("lora", "dora")  # methods that are peft's LoraConfig
# The fields of `adapter` that mean nothing to them.
MOKA_ONLY = tuple(
    f.name
    for f in dataclasses.fields(MokaConfig)
    if f.name not in (*_RESERVED[AdapterSection], *LoraConfig.__dataclass_fields__, "alpha", "dropout", "method")
)


@dataclass
class RunConfig:
    """A full run."""

    stages: list[int] = field(default_factory=lambda: [2], metadata=_help("[1], [2] or [1, 2]."))
    model: ModelSection = field(default_factory=ModelSection)
    adapter: dict[str, Any] = field(
        default_factory=lambda: adapter_settings({}), metadata=_help("Stage 2's adapter: moka.MokaConfig.")
    )
    data: DataSection = field(default_factory=DataSection)
    alignment: dict[str, Any] = field(
        default_factory=dict, metadata=_help("Stage 1's training settings, with the keys of training, below.")
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("Stage 2's training settings: transformers.TrainingArguments and moka's own."),
    )
    balance: list[dict[str, Any]] = field(
        default_factory=list,
        metadata=_help(
            "Stage 2's balance strategies, none by default: [{name: ogm, alpha: 0.3}, ...]; docs/balance.md."
        ),
    )
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    output: OutputSection = field(default_factory=OutputSection)

    def section(self, stage: int) -> dict[str, Any]:
        """Return the training settings of a stage."""
        return getattr(self, SECTIONS[stage])

    def seed(self, stage: int) -> int:
        """Return the seed of a stage's new weights and dropout: its section's, or else that of ``training``."""
        return int(self.section(stage).get("seed", self.training.get("seed", 42)))

    def data_seed(self, stage: int) -> int:
        """Return the seed by which a stage draws its questions: ``data_seed`` of its section, or else its seed."""
        given = self.section(stage).get("data_seed")
        return self.seed(stage) if given is None else int(given)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which `config_from_dict` makes the same configuration."""
        return dataclasses.asdict(self)


_SCHEMAS: dict[str, type] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "data": DataSection,
    "alignment": MokaTrainingArguments,
    "training": MokaTrainingArguments,
    "evaluation": EvaluationSection,
    "output": OutputSection,
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, or a shipped one by its name, over those that its ``base`` names; apply overrides, check every key.

    Raises:
        MokaError: unreadable file, unknown key (with the nearest name), or a value of the wrong type.
    """
    path = find_config(path)
    return config_from_dict(read_config(path, overrides or []), str(path))


def config_from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Return a checked ``RunConfig`` from plain values; ``where`` begins the messages."""
    values = _checked(RunConfig, {key: value for key, value in raw.items() if key not in _SCHEMAS}, f"{where}: ")
    for name, schema in _SCHEMAS.items():
        section = _checked(schema, raw.get(name), f"{where}: {name}.")
        values[name] = section if schema in _RESERVED else schema(**section)
    values["adapter"] = adapter_settings(values["adapter"])
    config = RunConfig(**values)
    if config.stages not in ([1], [2], [1, 2]):
        raise MokaError(f"{where}: stages: {config.stages} is not one of [1], [2], [1, 2].")
    if config.model.kind == "hf":
        check_hf_run(config.model, config.stages, config.training, config.data.feature_cache, where)
        config.model.backbone = str(config.model.name)
    elif config.model.name is not None:
        raise MokaError(f"{where}: model.name: {config.model.name!r} needs model.kind: hf; else set model.backbone.")
    if config.model.tiny:
        make_tiny(config)
    _check_together(config, where)
    return config


def _checked(schema: type, raw: Any, where: str) -> dict[str, Any]:
    """Return the values of a section, if its keys are those of the schema's fields, and the values have their types and sizes.

    Args:
        where: opens each message, with the prefix of the keys: "run.yaml: training.".
    """
    raw = {} if raw is None else raw  # a heading with nothing under it
    if not isinstance(raw, dict):
        raise MokaError(f"{where.rstrip('. ')}: a mapping of keys is expected, got {raw!r}.")
    reserved = _RESERVED.get(schema, {})
    fields = {f.name: f for f in dataclasses.fields(schema) if f.name not in reserved}
    values = {}
    for key, value in raw.items():
        if key in reserved:
            raise MokaError(f"{where}{key} cannot be chosen: {reserved[key]}; take it out.")
        if key not in fields:
            raise MokaError(
                f"{where}{key}: unknown key.{nearest(str(key), fields)} `moka train --help-config` lists all keys."
            )
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare `no` as false
        if value is not None or not (fields[key].default_factory is dict or schema is AdapterSection):
            values[key] = value
    check_types(schema, values, where)
    for key, value in values.items():
        _check_size(f"{where}{key}", key, value, fields[key].metadata.get("minimum", _MINIMUM.get(key)))
    return values


def _check_size(where: str, key: str, value: Any, minimum: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if minimum is not None and value < minimum:
        raise MokaError(f"{where}: {value!r} is too small; at least {minimum} is expected.")
    if (key in _ABOVE_ZERO and value <= 0) or (key == "max_steps" and value < 1 and value != -1):
        raise MokaError(f"{where}: {value!r} is too small; a number above 0 is expected.")


def adapter_settings(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section ``adapter`` in full: its values over those of its preset, over the defaults of `MokaConfig`."""
    reserved = _RESERVED[AdapterSection]
    defaults = {f.name: _default(f) for f in dataclasses.fields(AdapterSection)}
    settings = {**defaults, **PRESETS[section.get("preset", "paper")], **section}
    return {key: value for key, value in settings.items() if key not in reserved}


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def describe() -> str:
    """Return all keys with their defaults and help, for `moka train --help-config` and the reference page."""
    lines = []
    for top in dataclasses.fields(RunConfig):
        lines.append(f"{top.name}:" + (f"  # {top.metadata['help']}" if top.metadata else ""))
        schema = _SCHEMAS.get(top.name)
        if schema is None or top.name == "alignment":
            continue
        own_first = sorted(dataclasses.fields(schema), key=lambda f: f.name not in schema.__annotations__)
        for f in (f for f in own_first if f.name not in _RESERVED.get(schema, {})):
            text = " ".join(str(f.metadata.get("help", "")).split())
            if f.name in TrainingArguments.__dataclass_fields__:
                text = text.split(". ")[0].rstrip(".") + "."  # its texts are paragraphs
            lines.append(f"  {f.name}: {json.dumps(_default(f))}  # {text}")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, by which editors complete and check keys."""

    def of(schema: type) -> dict[str, Any]:
        hints = get_type_hints(schema)
        keys: dict[str, Any] = {}
        for f in dataclasses.fields(schema):
            if f.name in _RESERVED.get(schema, {}):
                continue
            text, minimum = f.metadata.get("help"), f.metadata.get("minimum", _MINIMUM.get(f.name))
            keys[f.name] = type_schema(hints[f.name])
            if f.name.endswith("_strategy"):  # YAML reads a bare `no` as false
                keys[f.name] = {"anyOf": [keys[f.name], {"const": False}]}
            if text:
                keys[f.name]["description"] = " ".join(str(text).split())
            if minimum is not None and "type" in keys[f.name]:
                keys[f.name]["minimum"] = minimum
        return {"type": "object", "properties": keys, "additionalProperties": False}

    top = of(RunConfig)
    for name, schema in _SCHEMAS.items():
        top["properties"][name] = {"anyOf": [of(schema), {"type": "null"}]}
    top["properties"]["base"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Files, relative to this one, that it is written over.",
    }
    versions = f"moka {moka.__version__}, transformers {transformers.__version__}"
    draft = "http://json-schema.org/draft-07/schema#"
    return {"$schema": draft, "$comment": versions, "title": "A run of moka", **top}


_TINY_STEPS = 20  # at most, where a configuration asks for more; 2 where it asks for epochs


def make_tiny(config: RunConfig) -> None:
    """Put tiny random parts of the same architecture instead of published ones; a second time changes nothing."""
    from moka.testing import tiny, tiny_mllms  # by name only

    model = config.model
    stand_ins: Any = tiny_mllms if model.kind == "hf" else tiny
    model.backbone = stand_ins.PREFIX + stand_ins.tiny_kind(model.backbone)
    model.name = model.backbone if model.kind == "hf" else None
    model.dtype = "float32"
    for name, spec in model.modalities.items():
        if isinstance(spec.get("encoder"), dict) and isinstance(spec.get("projector"), dict):
            model.modalities[name] = {
                **spec,
                "encoder": tiny_encoder(spec["encoder"]),
                "projector": tiny_projector(spec["projector"]),
            }
    model.connectors = [_beside(folder) for folder in model.connectors]
    config.output.dir = _beside(config.output.dir)
    for section in (config.alignment, config.training):
        section.update({key: False for key in ("bf16", "fp16", "tf32") if key in section})
        steps = section.get("max_steps", -1)
        section.update({"dataloader_num_workers": 0, "max_steps": min(steps, _TINY_STEPS) if steps > 0 else 2})


def _beside(folder: str) -> str:
    """Tiny runs are next to the real ones, whose folders they must not take: RUN-tiny, RUN-tiny/connector."""
    path = Path(folder)
    run = path.parent if path.name == "connector" else path
    if path.suffix in (".bin", ".safetensors") or any(part.endswith("-tiny") for part in path.parts):
        return folder
    tiny_run = run.with_name(f"{run.name}-tiny")
    return str(tiny_run / path.name if path.name == "connector" else tiny_run)


def check_complete(config: RunConfig, where: str = "config") -> None:
    """Refuse a run without the data that its stages train on, or evaluate on while they train.

    Raises:
        MokaError: names the key that is not set.
    """
    for stage in config.stages:
        name = DATA[stage]
        if getattr(config.data, name) is None:
            raise MokaError(
                f"{where}: data.{name} is not set, and stage {stage} trains on it: a JSONL file, embedded:TASK or a format."
            )
    for stage in config.stages:
        strategy = config.section(stage).get("eval_strategy", "no")
        if strategy != "no" and config.data.validation is None:
            raise MokaError(
                f"{where}: {SECTIONS[stage]}.eval_strategy: {strategy!r} needs data.validation, which is not set. Set it, or {SECTIONS[stage]}.eval_strategy: no."
            )


def _check_together(config: RunConfig, where: str) -> None:
    """Refuse settings that are valid one by one and contradict each other, or lack what another needs."""
    if 1 in config.stages and config.model.connectors:
        raise MokaError(
            f"{where}: model.connectors: stages {config.stages} train new connectors, so those given would be "
            "lost. Take model.connectors out, or set stages: [2]."
        )
    _check_adapter(config, where)
    _check_balance(config, where)
    if "objective" in config.training:
        raise MokaError(f"{where}: training.objective: stage 2 always models language; set alignment.objective.")
    for name, section in (("alignment", config.alignment), ("training", config.training)):
        if section.get("packing") and section.get("objective") == "embedding":
            raise MokaError(
                f"{where}: {name}.packing: the embedding objective pairs each row's media with one caption, so a row is "
                f"one sample. Take {name}.packing out, or set {name}.objective: language_modeling."
            )
        if section.get("packing") and config.model.max_length is None:
            raise MokaError(
                f"{where}: {name}.packing fills rows up to model.max_length, which is not set. Set it to the tokens of a "
                "row, at least as many as the longest sample has (`moka data check` says), for example 2048."
            )
    if config.alignment.get("observe_modalities"):
        raise MokaError(
            f"{where}: alignment.observe_modalities: {config.alignment['observe_modalities']}: stage 1 trains no adapter. Set "
            "training.observe_modalities."
        )
    if config.training.get("observe_modalities") and 2 in config.stages and config.adapter["method"] != "moka":
        raise MokaError(
            f"{where}: training.observe_modalities: {config.training['observe_modalities']}: adapter.method "
            f"{config.adapter['method']} has no B that modalities share. Take it out, or use moka."
        )


def _check_balance(config: RunConfig, where: str) -> None:
    strategies = build_strategies(config.balance, f"{where}: balance")
    if not strategies:
        return
    first = strategies[0].name
    if 2 not in config.stages:
        raise MokaError(
            f"{where}: balance: {first}: stages {config.stages} train no adapter. Take it out, or set stages: [2]."
        )
    if config.training.get("packing"):
        raise MokaError(
            f"{where}: balance: {first}: scores samples, and with training.packing a row has several. Take one of the two out."
        )
    for strategy in strategies:
        needs = strategy.needs()
        if (needs.adapter or needs.parts_of_B) and config.adapter["method"] != "moka":
            raise MokaError(
                f"{where}: balance: {strategy.name}: acts on a MokA adapter, and adapter.method is "
                f"{config.adapter['method']}. Set it to moka, or take the strategy out."
            )
        if needs.parts_of_B and not config.adapter["share_b"]:
            raise MokaError(
                f"{where}: balance: {strategy.name}: acts on the B that modalities share, and adapter.share_b is false. Set it "
                "to true, or take the strategy out."
            )
        if needs.paths_of_B and config.adapter["interaction"] not in ("question", "mean"):
            raise MokaError(
                f"{where}: balance: {strategy.name}: compares what media learn through the question, and adapter.interaction is "
                f"{config.adapter['interaction']}. Set it to question or mean, or take the strategy out."
            )
        if needs.sample_ids and config.training.get("train_sampling_strategy", "random") != "random":
            raise MokaError(
                f"{where}: balance: {strategy.name}: draws samples itself, and training.train_sampling_strategy is "
                f"{config.training['train_sampling_strategy']}. Take one of the two out."
            )
        if needs.validation and config.data.validation is None:
            raise MokaError(f"{where}: balance: {strategy.name}: needs data.validation, which is not set. Set it.")
    if config.model.kind == "composed":
        try:
            check_modalities(strategies, list(config.model.modalities))
        except MokaError as error:
            raise MokaError(f"{where}: {error}") from error


def _check_adapter(config: RunConfig, where: str) -> None:
    section = config.adapter
    if 2 in config.stages and section["method"] == "none":
        raise MokaError(
            f"{where}: adapter.method: none leaves stage 2 nothing to train. Set stages: [1], or moka or another method."
        )
    defaults = adapter_settings({"preset": section["preset"]})
    method = section["method"]
    for name in MOKA_ONLY if method in PEFT_METHODS else ():
        if section[name] != defaults[name]:
            raise MokaError(f"{where}: adapter.{name} has no meaning for method {method}; take it out, or use moka.")
    settings = {key: value for key, value in section.items() if key != "preset"}
    if method in (*PEFT_METHODS, "none"):
        settings["method"] = "moka"
    if method == "imod" and config.training.get("fp16"):
        raise MokaError(
            f"{where}: training.fp16 scales the loss, and method imod adds gradients beside it. Use training.bf16, or float32."
        )
    if config.model.modalities:
        settings["modalities"] = {name: [i] for i, name in enumerate((TEXT, *config.model.modalities))}
    try:
        MokaConfig(**settings)
    except MokaError as error:
        raise MokaError(f"{where}: adapter.{error}") from error
