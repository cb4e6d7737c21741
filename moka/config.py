"""One YAML, one run: the sections of a run's configuration, read with overrides and checked key by key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from moka.errors import MokaError, nearest
from moka.modeling.encoders import tiny_encoder
from moka.modeling.projectors import tiny_projector
from moka.modeling.quantization import QUANTIZATIONS
from moka.testing import tiny

METHODS = ("moka", "lora", "none")
PRESETS = ("paper", "official-avt", "official-vt")
INTERACTIONS = ("own_turn", "first_turn")
DTYPES = ("auto", "float32", "bfloat16")
BAD_MEDIA = ("error", "skip", "substitute")
SECTIONS = {1: "alignment", 2: "training"}  # of each stage
Source = str | dict[str, Any] | list[Any] | None
# What only MokA knows; with share_b the settings that tell its variants apart.
LORA_HAS_NOT = ("interaction", "interaction_weight", "scale_position", "adapt")


def _help(text: str, minimum: float | None = None, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"help": text, "minimum": minimum, "choices": choices}


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
        metadata=_help(
            "What stage 2 starts from: stage-1 results (RUN/connector), or published projector files "
            "(visual_pretrain.bin, audio_pretrain.bin, mm_projector.bin)."
        ),
    )
    chat_template: str | None = field(
        default=None, metadata=_help("chatml, bare (shortest), plain, or Jinja text; default: the tokenizer's own.")
    )
    interaction: str = field(
        default="own_turn",
        metadata=_help("Which question a medium interacts with: own_turn or first_turn.", choices=INTERACTIONS),
    )
    dtype: str = field(
        default="auto",
        metadata=_help("float32, bfloat16 or auto: bfloat16 where the accelerator computes in it.", choices=DTYPES),
    )
    quantization: str | None = field(
        default=None,
        metadata=_help(
            "nf4 (4 bits) or int8: the frozen backbone's linear layers, by bitsandbytes.", choices=QUANTIZATIONS
        ),
    )
    max_length: int | None = field(
        default=None, metadata=_help("Longest sample in tokens; default: the backbone's context length.", 1)
    )
    attn_implementation: str | None = field(default=None, metadata=_help("sdpa, eager, flash_attention_2, ..."))
    tiny: bool = field(
        default=False, metadata=_help("Tiny random parts of the same architecture: the full run in seconds.")
    )


@dataclass
class AdapterSection:
    method: str = field(
        default="moka", metadata=_help("moka, lora (peft's LoRA on the same layers) or none.", choices=METHODS)
    )
    preset: str = field(default="paper", metadata=_help("paper, official-avt or official-vt.", choices=PRESETS))
    r: int = field(default=4, metadata=_help("Rank.", 1))
    alpha: float = field(default=16, metadata=_help("Scale numerator (alpha / r)."))
    dropout: float = field(default=0.05, metadata=_help("Dropout on the adapter's input.", 0))
    target_modules: list[str] | str | None = field(
        default=None, metadata=_help("Linear layers of the language model; default: its seven projections.")
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata=_help("Layers to leave out."))
    interaction: str | None = field(default=None, metadata=_help("question, none, reversed or mean."))
    interaction_weight: float | dict[str, float] | None = field(default=None, metadata=_help("lambda."))
    scale_position: str | None = field(default=None, metadata=_help("output or input."))
    share_b: bool = field(
        default=True, metadata=_help("false: one B per modality (uni-modal LoRA, with interaction: none).")
    )
    adapt: list[str] | None = field(default=None, metadata=_help("Modalities that go through the adapter."))
    use_rslora: bool = field(default=False, metadata=_help("Scale by alpha / sqrt(r)."))


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
    on_bad_media: str = field(
        default="error",
        metadata=_help(
            "error; skip (all files are tried before training) or substitute, within the budget.", choices=BAD_MEDIA
        ),
    )
    bad_media_budget: float = field(default=0.01, metadata=_help("Share of samples that may be bad.", 0))
    feature_cache: str | None = field(
        default=None, metadata=_help("Folder of `moka cache`: frozen encoders' features, read instead of media.")
    )


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


@dataclass
class RunConfig:
    """A full run. ``training`` and ``alignment`` take the names of ``transformers.TrainingArguments``, and ours."""

    stages: list[int] = field(default_factory=lambda: [2], metadata=_help("[1], [2] or [1, 2]."))
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    alignment: dict[str, Any] = field(default_factory=dict, metadata=_help("Stage 1's training settings."))
    training: dict[str, Any] = field(default_factory=dict, metadata=_help("Stage 2's training settings."))
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    output: OutputSection = field(default_factory=OutputSection)

    def section(self, stage: int) -> dict[str, Any]:
        """The training settings of a stage."""
        return getattr(self, SECTIONS[stage])

    def seed(self, stage: int) -> int:
        """Return the seed of a stage's new weights and dropout: its section's, or else that of ``training``."""
        return int(self.section(stage).get("seed", self.training.get("seed", 42)))

    def data_seed(self, stage: int) -> int:
        """Return the seed by which a stage draws its questions: ``data_seed`` of its section, or else its seed."""
        given = self.section(stage).get("data_seed")
        return self.seed(stage) if given is None else int(given)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def configs_folder() -> Path:
    """Return the folder of the shipped configurations: in the package of a wheel, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Return the names of the shipped runs, such as "quickstart/audio_visual_text"."""
    folder = configs_folder()
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in found if name.split("/")[0] not in ("accelerate", "shared"))


def find_config(path: str | Path) -> Path:
    """Return the file of a configuration: a path, or the name of a shipped one.

    Raises:
        MokaError: there is no such file, and no such name.
    """
    path = Path(path)
    if path.exists():
        return path
    named = configs_folder() / f"{path}.yaml"
    if path.suffix not in (".yaml", ".yml") and named.is_file():
        return named
    names = config_names()
    raise MokaError(
        f"No configuration file {path}, and none of the {len(names)} shipped ones has that name, such as "
        f"quickstart/audio_visual_text.{nearest(str(path), names)}"
    )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, or a shipped one by its name, on top of those that its ``base`` names; apply overrides, check every key.

    Raises:
        MokaError: unreadable file, unknown key (with the nearest name), or a value of the wrong type.
    """
    path = find_config(path)
    raw = _read(path, ())
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
    config.alignment = training_section(config.alignment, where, "alignment")
    config.training = training_section(config.training, where, "training")
    if config.model.tiny:
        make_tiny(config)
    _check_together(config, where)
    return config


_TINY_STEPS = 20  # at most, where a configuration asks for more; 2 where it asks for epochs


def make_tiny(config: RunConfig) -> None:
    """Put tiny random parts of the same architecture instead of published ones; a second time changes nothing."""
    model = config.model
    model.backbone = tiny.PREFIX + tiny.tiny_kind(model.backbone)
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


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file as a mapping, merged over its ``base``: one file or a list, relative to it, later ones on top."""
    if path.resolve() in above:
        raise MokaError(f"{path}: base: it is, by way of others, its own base ({', '.join(map(str, above))}).")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8")) or {}
    except IsADirectoryError:
        raise MokaError(f"{path} is a folder; give one of the YAML files in it.") from None
    except FileNotFoundError:
        where = f"{above[-1]}: base: no" if above else "No"
        raise MokaError(f"{where} configuration file {path}; shipped ones are in configs/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MokaError(f"{path} cannot be read as YAML: {_reason(error)}. Correct the file.") from error
    if not isinstance(raw, dict):
        raise MokaError(f"{path}: the top level must be a mapping of sections: {', '.join(_names(RunConfig))}.")
    bases = raw.pop("base", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise MokaError(
                f"{path}: base: {base!r} is no path; give a YAML file, relative to this one, or a list of them."
            )
        merged = _merge(merged, _read(path.parent / base, (*above, path.resolve())))
    return _merge(merged, raw)


class _Loader(yaml.SafeLoader):
    """YAML without what a configuration never means: dates (they are text), and keys that occur twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping; a key that occurs twice is an error (the first value would be lost silently)."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1 and key != "<<"), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_MAX_NODES = 100_000  # an alias of an alias of an alias may mean more than fits into memory


def load_yaml(text: str) -> Any:
    """Return plain values from YAML text; aliases become copies.

    Raises:
        yaml.YAMLError: the text is not YAML, or is nested or repeated beyond any configuration.
    """
    nodes = 0

    def copied(value: Any) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > _MAX_NODES:
            raise yaml.YAMLError(f"it expands to more than {_MAX_NODES:,} values")
        if isinstance(value, dict):
            return {key: copied(one) for key, one in value.items()}
        return [copied(one) for one in value] if isinstance(value, list) else value

    try:
        return copied(yaml.load(text, _Loader))
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply, or contains itself") from error
    except (ValueError, TypeError) as error:  # a number of thousands of digits, a list as a key
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _merge(below: Any, above: Any) -> Any:
    """``above`` over ``below``, mappings key by key. One that names another ``type`` or ``format`` replaces the full:
    the fields of an encoder mean nothing to another.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if any(key in above and above[key] != below.get(key) for key in ("type", "format")):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


def check_complete(config: RunConfig, where: str = "config") -> None:
    """Refuse a run without the data that its stages train on, or evaluate on while they train.

    Raises:
        MokaError: names the key that is not set.
    """
    for stage in config.stages:
        name = "train" if stage == 2 else "alignment"
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
    if 2 in config.stages and config.adapter.method == "none":
        raise MokaError(
            f"{where}: adapter.method: none leaves stage 2 nothing to train. Set stages: [1], or moka or lora."
        )
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
    if config.adapter.method == "lora":
        for name in ("share_b", *LORA_HAS_NOT):
            default = name == "share_b"
            if getattr(config.adapter, name) not in (None, default):
                raise MokaError(f"{where}: adapter.{name} has no meaning for method lora; take it out, or use moka.")


def _reason(error: Exception) -> str:
    """Return what is wrong and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'syntax error'}"


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MokaError(
            f"Override {override!r} is not of the form section.key=value, such as training.learning_rate=1e-4."
        )
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise MokaError(f"Override {override!r}: the value is no YAML ({_reason(error)}). Quote it.") from error
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # absent, or a heading with nothing under it
            node[parent] = {}
        node = node[parent]
        if isinstance(node, list):
            raise MokaError(
                f"Override {override!r}: {parent!r} is a list; give all of it, as {parent}=[{{...}}, {{...}}]."
            )
        if not isinstance(node, dict):
            raise MokaError(f"Override {override!r}: {parent!r} is a value, not a section.")
    node[leaf] = value


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _build(cls: type, raw: Any, where: str, prefix: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise MokaError(f"{where}: {prefix.rstrip('.')}: a section of keys is expected, got {raw!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in fields:
            known = list(fields)
            raise MokaError(
                f"{where}: unknown key {prefix + str(key)!r}; known: {', '.join(known)}.{nearest(str(key), known)}"
            )
        hint, at = hints[key], f"{where}: {prefix}{key}"
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, where, f"{prefix}{key}.")
            continue
        if value is None and fields[key].default_factory is dict:
            value = {}  # a heading with nothing under it
        bounds = fields[key].metadata
        if bounds.get("choices") and value is not None:
            one_of(at, value, bounds["choices"])
        values[key] = convert(value, hint, at)
        if isinstance(values[key], float) and not math.isfinite(values[key]):
            raise MokaError(f"{at}: {value!r} is not a finite number.")
        if bounds.get("minimum") is not None:
            at_least(at, values[key], bounds["minimum"])
    return cls(**values)


def describe() -> str:
    """All keys with their help, for `moka train --help-config` and the reference page."""
    lines = []
    hints = typing.get_type_hints(RunConfig)
    for top in dataclasses.fields(RunConfig):
        lines.append(f"{top.name}:" + (f"  # {top.metadata['help']}" if "help" in top.metadata else ""))
        if dataclasses.is_dataclass(hints[top.name]):
            for f in dataclasses.fields(hints[top.name]):
                default = f.default_factory() if callable(f.default_factory) else f.default
                lines.append(f"  {f.name}: {default!r}  # {f.metadata['help']}")
        elif top.name == "alignment":
            lines.append("  # the keys of training, below")
        elif top.name == "training":
            lines += [f"  {line}" for line in describe_training()]
    return "\n".join(lines)


OBJECTIVES = ("language_modeling", "embedding")
# transformers has one more, "batch_rebalance", which would read every sample for its length.
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")

# Keys of `training` and `alignment` that transformers does not have.
OWN_TRAINING_KEYS = {
    "global_batch_size": "Samples per optimizer step over all processes; accumulation follows, a device takes no more.",
    "encoder_learning_rate": "Learning rate of trainable encoders (default: learning_rate).",
    "projector_learning_rate": "Learning rate of projectors (default: learning_rate).",
    "objective": "Stage 1: language_modeling, or embedding (no pass through the language model).",
    "packing": "Fill rows of model.max_length tokens with several samples; batch sizes then count rows.",
}
_OWN_TYPES = {
    "global_batch_size": int,
    "encoder_learning_rate": float,
    "projector_learning_rate": float,
    "objective": str,
    "packing": bool,
    "fsdp": bool | str,  # annotated as text for the command line only
}

_ALWAYS = "moka sets it as its batches need it"
_RESERVED = {
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
}
# What would otherwise fail late, or mean something else: max_steps: 0 trains for three epochs.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "global_batch_size": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "encoder_learning_rate": 0,
    "projector_learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_NOT_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")


def one_of(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MokaError(f"{where}: {value!r} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def at_least(where: str, value: Any, minimum: float, zero: bool = True) -> None:
    """Refuse numbers below ``minimum`` (and zero itself without ``zero``), NaN too; what is no number passes."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= minimum:
        raise MokaError(f"{where}: {value!r} is too small; at least {minimum} is expected.")
    if not zero and value == 0:
        raise MokaError(f"{where}: {value!r} is too small; a number above 0 is expected.")


def convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotated type; YAML reads 1e-4 as text, which is a number here."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _as(value, option)
        if fits:
            return converted
    due = " or ".join(dict.fromkeys(_type_name(option) for option in options))
    hint = " Quote it." if "text" in due and isinstance(value, (int, float)) else ""
    raise MokaError(f"{where}: {value!r} is {_type_name(type(value))}; {due} is expected.{hint}")


def _as(value: Any, option: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(option) or option
    if origin is Any:
        return True, value
    if origin is type(None):
        return value is None, value
    if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if isinstance(origin, type) and issubclass(origin, Enum):
        return isinstance(value, str), value
    if origin in (list, dict) and type(value) is origin:
        inner = typing.get_args(option)
        if not inner:
            return True, value
        pairs = [_as(item, inner[-1]) for item in (value if origin is list else value.values())]
        fits = all(fit for fit, _ in pairs) and (origin is list or all(isinstance(key, str) for key in value))
        items = [item for _, item in pairs]
        return fits, items if origin is list else dict(zip(value, items, strict=True))
    return origin in (int, bool, str) and type(value) is origin, value


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}

_PLURALS = {int: "integers", float: "numbers", str: "texts", dict: "mappings"}


def _type_name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if isinstance(origin, type) and issubclass(origin, Enum):
        return "text"
    inner = typing.get_args(option)
    if origin is list and inner and inner[0] in _NAMES:
        return f"a list of {_PLURALS.get(inner[0], _NAMES[inner[0]])}"
    return _NAMES.get(origin, getattr(origin, "__name__", str(option)))


def training_section(raw: dict[str, Any], where: str, section: str) -> dict[str, Any]:
    """The checked keys of ``training`` or ``alignment``: ours, and those of ``transformers.TrainingArguments``."""
    hints = typing.get_type_hints(TrainingArguments)
    known = [name for name in training_keys() if name not in _RESERVED]
    checked = {}
    for key, value in raw.items():
        at = f"{where}: {section}.{key}"
        if key in _RESERVED:
            raise MokaError(f"{at} cannot be chosen: {_RESERVED[key]}; take it out.")
        if key not in known:
            raise MokaError(
                f"{where}: unknown key {f'{section}.{key}'!r}; known: the fields of transformers.TrainingArguments and "
                f"{', '.join(OWN_TRAINING_KEYS)}.{nearest(str(key), known)}"
            )
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare `no` as false
        checked[key] = convert(value, _OWN_TYPES.get(key) or hints[key], at)
        if key in _AT_LEAST:
            at_least(at, checked[key], _AT_LEAST[key], zero=key not in _NOT_ZERO)
        if isinstance(checked[key], float) and not math.isfinite(checked[key]):
            raise MokaError(f"{at}: {value!r} is not a finite number.")
    if "max_steps" in checked and checked["max_steps"] != -1:
        at_least(f"{where}: {section}.max_steps", checked["max_steps"], 1)
    if "objective" in checked:
        one_of(f"{where}: {section}.objective", checked["objective"], OBJECTIVES)
    if "train_sampling_strategy" in checked:
        one_of(f"{where}: {section}.train_sampling_strategy", checked["train_sampling_strategy"], SAMPLING_STRATEGIES)
    return checked


def training_keys() -> list[str]:
    """All keys of ``training`` and ``alignment``: ours first."""
    return [*OWN_TRAINING_KEYS, *(f.name for f in dataclasses.fields(TrainingArguments) if f.init)]


def describe_training() -> list[str]:
    """One line for each key with its help, for `moka train --help-config`."""
    lines = [f"{name}:  # {text}" for name, text in OWN_TRAINING_KEYS.items()]
    for f in dataclasses.fields(TrainingArguments):
        if f.init and f.name not in _RESERVED:
            text = " ".join(str(f.metadata.get("help", "")).split()).split(". ")[0].rstrip(".")
            lines.append(f"{f.name}:" + (f"  # {text}." if text else ""))
    return lines
