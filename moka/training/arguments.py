"""One YAML, one run: the sections of a run's configuration, read with overrides and checked key by key."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from moka.errors import MokaError, nearest

METHODS = ("moka", "lora", "none")
OBJECTIVES = ("language_modeling", "embedding")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelSection:
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
        metadata=_help("Folders of stage-1 results (RUN/connector) to start stage 2 from; checked by their metadata."),
    )
    chat_template: str | None = field(
        default=None, metadata=_help("chatml, plain, or Jinja text; default: the tokenizer's own.")
    )
    interaction: str = field(
        default="own_turn", metadata=_help("Which question a medium interacts with: own_turn or first_turn.")
    )
    dtype: str = field(
        default="auto", metadata=_help("float32, bfloat16 or auto: bfloat16 where the accelerator computes in it.")
    )
    max_length: int | None = field(
        default=None, metadata=_help("Longest sample in tokens; default: the backbone's context length.")
    )
    attn_implementation: str | None = field(default=None, metadata=_help("sdpa, eager, flash_attention_2, ..."))


@dataclass
class AdapterSection:
    method: str = field(default="moka", metadata=_help("moka, lora (peft's LoRA on the same layers) or none."))
    preset: str = field(default="paper", metadata=_help("paper, official-avt or official-vt."))
    r: int = field(default=4, metadata=_help("Rank."))
    alpha: float = field(default=16, metadata=_help("Scale numerator (alpha / r)."))
    dropout: float = field(default=0.05, metadata=_help("Dropout on the adapter's input."))
    target_modules: list[str] | str | None = field(
        default=None, metadata=_help("Linear layers of the language model; default: its seven projections.")
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata=_help("Layers to leave out."))
    interaction: str | None = field(default=None, metadata=_help("question, none, reversed or mean."))
    interaction_weight: float | dict[str, float] | None = field(default=None, metadata=_help("lambda."))
    scale_position: str | None = field(default=None, metadata=_help("output or input."))
    share_b: bool = field(default=True, metadata=_help("false: multiple LoRA, one B per modality."))
    adapt: list[str] | None = field(default=None, metadata=_help("Modalities that go through the adapter."))
    use_rslora: bool = field(default=False, metadata=_help("Scale by alpha / sqrt(r)."))


@dataclass
class DataSection:
    train: str | None = field(default=None, metadata=_help("JSONL file, or embedded:TASK, for stage 2."))
    alignment: str | None = field(default=None, metadata=_help("JSONL file, or embedded:TASK, for stage 1."))
    validation: str | None = field(default=None, metadata=_help("JSONL file, or embedded:TASK; loss during training."))
    test: str | None = field(default=None, metadata=_help("JSONL file, or embedded:TASK; only `moka eval` reads it."))
    media_root: str | None = field(default=None, metadata=_help("Folder that media paths are relative to."))
    train_size: int | None = field(default=None, metadata=_help("Use that many training samples."))
    validation_size: int | None = field(default=None, metadata=_help("Use that many validation samples."))
    video_frames: int = field(default=10, metadata=_help("Pictures taken from each video."))
    on_bad_media: str = field(default="error", metadata=_help("error, or substitute within the budget."))
    bad_media_budget: float = field(default=0.01, metadata=_help("Share of samples that may be substituted."))


@dataclass
class EvaluationSection:
    size: int | None = field(default=None, metadata=_help("Number of test questions; default: all."))
    blank_size: int | None = field(default=None, metadata=_help("Questions asked again with a modality blanked."))
    blank: bool = field(default=True, metadata=_help("Repeat with each modality blanked."))
    batch_size: int = field(default=32, metadata=_help("Questions generated at once."))
    max_new_tokens: int = field(default=16, metadata=_help("Longest answer in tokens."))


@dataclass
class OutputSection:
    dir: str = field(default="runs/moka", metadata=_help("Run folder; must not hold another run."))
    samples: int = field(default=8, metadata=_help("Validation questions answered at the end."))


@dataclass
class RunConfig:
    """A whole run. ``training`` and ``alignment`` take the names of ``transformers.TrainingArguments``, and ours."""

    stages: list[int] = field(default_factory=lambda: [2], metadata=_help("[1], [2] or [1, 2]."))
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    alignment: dict[str, Any] = field(default_factory=dict, metadata=_help("Stage 1's training settings."))
    training: dict[str, Any] = field(default_factory=dict, metadata=_help("Stage 2's training settings."))
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    output: OutputSection = field(default_factory=OutputSection)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Keys of `training` and `alignment` that transformers does not have.
OWN_TRAINING_KEYS = {
    "global_batch_size": "Samples per optimizer step over all processes; accumulation follows from it.",
    "encoder_learning_rate": "Learning rate of trainable encoders (default: learning_rate).",
    "projector_learning_rate": "Learning rate of projectors (default: learning_rate).",
    "objective": "Stage 1: language_modeling, or embedding (no pass through the language model).",
}
_RESERVED = {"output_dir": "output.dir", "resume_from_checkpoint": "moka train --resume"}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, check every key.

    Raises:
        MokaError: unreadable file, unknown key (with the nearest name), or a value of the wrong type.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise MokaError(f"No configuration file {path}; shipped ones lie in configs/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MokaError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise MokaError(f"{path}: the top level must be a mapping of sections: {', '.join(_names(RunConfig))}.")
    for override in overrides or []:
        _apply(raw, override)
    return config_from_dict(raw, str(path))


def config_from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """A checked ``RunConfig`` from plain values; ``where`` begins the messages."""
    config = _build(RunConfig, raw, where, "")
    if (
        not config.stages
        or any(stage not in (1, 2) for stage in config.stages)
        or config.stages != sorted(set(config.stages))
    ):
        raise MokaError(f"{where}: stages: {config.stages} is not one of [1], [2], [1, 2].")
    for section in ("alignment", "training"):
        setattr(config, section, _training_section(getattr(config, section), where, section))
    _one_of(where, "adapter.method", config.adapter.method, METHODS)
    return config


def _one_of(where: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MokaError(f"{where}: {key}: {value!r} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MokaError(
            f"Override {override!r} is not of the form section.key=value, such as training.learning_rate=1e-4."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MokaError(f"Override {override!r}: the value is no YAML: {str(error).splitlines()[0]}") from error
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise MokaError(f"Override {override!r}: {parent!r} is a value, not a section.")
    node[leaf] = value


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _build(cls: type, raw: Any, where: str, prefix: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise MokaError(f"{where}: {prefix.rstrip('.')}: a section of keys is due, got {raw!r}.")
    hints = typing.get_type_hints(cls)
    known = _names(cls)
    values = {}
    for key, value in raw.items():
        if key not in known:
            raise MokaError(
                f"{where}: unknown key {prefix + str(key)!r}; known: {', '.join(known)}.{nearest(str(key), known)}"
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(hint, value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, hint, f"{where}: {prefix}{key}")
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotated type; YAML reads 1e-4 as text, which is a number here."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Any or (origin is type(None) and value is None):
            return value
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if origin in (int, bool, str, list, dict) and type(value) is origin:
            return value
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise MokaError(f"{where}: {value!r} is a {type(value).__name__}; {names} is due.")


def _training_section(raw: dict[str, Any], where: str, section: str) -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    checked = {}
    for key, value in raw.items():
        if key in _RESERVED:
            raise MokaError(f"{where}: {section}.{key} is set by {_RESERVED[key]}; take it out.")
        if key in OWN_TRAINING_KEYS:
            hint: Any = {"objective": str, "global_batch_size": int}.get(key, float)
        elif key in known:
            hint = hints[key]
        else:
            names = [*OWN_TRAINING_KEYS, *known]
            raise MokaError(
                f"{where}: unknown key {f'{section}.{key}'!r}; known: the fields of transformers.TrainingArguments and "
                f"{', '.join(OWN_TRAINING_KEYS)}.{nearest(str(key), names)}"
            )
        checked[key] = _number(value, hint, f"{where}: {section}.{key}")
    if "objective" in checked:
        _one_of(where, f"{section}.objective", checked["objective"], OBJECTIVES)
    return checked


def _number(value: Any, hint: Any, where: str) -> Any:
    """Check plain numbers and strings; leave what transformers checks itself (enums, unions of its own types)."""
    if hint in (int, float, bool, str):
        return _convert(value, hint, where)
    if isinstance(value, str):
        try:
            return float(value) if float in typing.get_args(hint) else value
        except ValueError:
            return value
    return value


def describe() -> str:
    """All keys with their help, for `moka train --help-config` and the reference page."""
    lines = []
    for top in dataclasses.fields(RunConfig):
        hint = typing.get_type_hints(RunConfig)[top.name]
        lines.append(f"{top.name}:" + (f"  # {top.metadata['help']}" if "help" in top.metadata else ""))
        if dataclasses.is_dataclass(hint):
            for f in dataclasses.fields(hint):
                default = f.default_factory() if f.default is dataclasses.MISSING else f.default
                lines.append(f"  {f.name}: {default!r}  # {f.metadata['help']}")
        elif top.name == "training":
            lines += [f"  {name}:  # {text}" for name, text in OWN_TRAINING_KEYS.items()]
    return "\n".join(lines)
