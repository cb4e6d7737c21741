"""The MokA authors' checkpoints, in both of their layouts, to a moka adapter folder and back.

    layout        text, visual, audio           shared B           preset
    official-avt  lora_A0, lora_A1, lora_A2     lora_B0            official-avt
    official-vt   lora_A.text, lora_A.image     lora_B.text        official-vt

A moka folder written here also has ``official.json`` (the original names and settings), ``projectors.safetensors`` (their
Q-Former projectors under our names) and ``extra.safetensors`` (whatever else was in ``non_lora_trainables.bin``), so that
going back gives every tensor under its own name, bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from moka.adapter import MokaConfig
from moka.adapter.checks import check_finite, read_tensors
from moka.adapter.config import PRESETS
from moka.adapter.matching import PREFIX, some
from moka.errors import MokaError, nearest
from moka.io import atomic_dir, check_output_folder, read_json, write_json
from moka.modeling.importers import official_projector_name
from moka.type_checks import check_types

RECORD, PROJECTORS, EXTRA = "official.json", "projectors.safetensors", "extra.safetensors"
OTHERS = "non_lora_trainables"  # LLaVA's name for what is trained next to the adapter

Tensors = dict[str, torch.Tensor]
Names = dict[str, dict[str, str]]  # layer -> part ("lora_A0", ...) -> the tensor's name


@dataclass(frozen=True)
class Layout:
    """Parts of an adapted layer: A [r, in] of each modality, in the order of ``moka_A`` [modalities, r, in], and B [out, r]."""

    a: tuple[str, ...]
    b: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.a, self.b)

    def match(self, key: str) -> re.Match[str] | None:
        """Find layer and part in a tensor's name; depending on how it was saved an adapter's name follows."""
        parts = "|".join(map(re.escape, self.parts))
        return re.fullmatch(rf"(?P<layer>.+)\.(?P<part>{parts})(?:\.(?!weight$)\w+)?(?:\.weight)?", key)


LAYOUTS = {
    "official-avt": Layout(("lora_A0", "lora_A1", "lora_A2"), "lora_B0"),
    "official-vt": Layout(("lora_A.text", "lora_A.image"), "lora_B.text"),
}
# Fields of their adapter_config.json -> ours.
SETTINGS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
}


@dataclass
class Summary:
    """The report of a conversion, to be printed."""

    source: Path
    output: Path
    layout: str
    layers: int = 0
    modalities: list[str] = field(default_factory=list)
    rank: int = 0
    mapped: int = 0
    projectors: int = 0
    aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        aside = f"{len(self.aside)} ({some(self.aside)})" if self.aside else "0"
        return [
            f"{self.source} -> {self.output} ({self.layout})",
            f"layers: {self.layers}; modalities: {', '.join(self.modalities)}; rank: {self.rank}",
            f"adapter tensors mapped: {self.mapped}; projector tensors mapped: {self.projectors}; kept aside: {aside}",
            *self.notes,
        ]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    backbone: str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Convert a checkpoint folder of the authors to a moka adapter folder; with ``to``, a moka adapter folder to theirs.

    Args:
        to: ``official-avt`` or ``official-vt``: the layout to write.
        backbone: name or folder of the language model, to be recorded in the adapter's configuration.
        overwrite: replace an adapter folder at ``output``.
    Raises:
        MokaError: not such a folder; tensors that are unknown, missing, of the wrong shape or not finite.
    """
    source, output = Path(source), Path(output)
    if to is not None and to not in LAYOUTS:
        raise MokaError(f"--to: {to!r} is not one of {', '.join(LAYOUTS)}.{nearest(to, LAYOUTS)}")
    if not source.is_dir():
        state = "is a file" if source.exists() else "does not exist"
        raise MokaError(f"{source} {state}; give the folder that has {WEIGHTS_NAME} and {CONFIG_NAME}.")
    if not (source / CONFIG_NAME).is_file() and (source / "adapter" / CONFIG_NAME).is_file():
        source = source / "adapter"  # a run folder
    check_output_folder(output, source, lambda folder: (folder / CONFIG_NAME).is_file(), overwrite)
    settings = read_json(source / CONFIG_NAME, dict) if (source / CONFIG_NAME).is_file() else {}
    weights = next((file for file in _candidates(source, Path(WEIGHTS_NAME).stem) if file.is_file()), None)
    method = settings.get("peft_type", "nameless")
    if (method == "MOKA") != (to is not None):
        remedy = f"to write it in the authors' layout, add --to {' or --to '.join(LAYOUTS)}"
        if to is not None:
            remedy = (
                "--to takes a moka adapter folder (peft_type MOKA). To read the authors' checkpoint, leave --to out"
            )
        raise MokaError(
            f"{source} has a {'moka' if to is None else method} adapter{' already' * (to is None)}; {remedy}."
        )
    if weights is None:
        found = some(sorted(path.name for path in source.iterdir())) or "nothing"
        raise MokaError(
            f"{source} has neither {WEIGHTS_NAME} nor {SAFETENSORS_WEIGHTS_NAME}; found: {found}. Copy the full folder."
        )
    if to is None:
        return _to_moka(source, weights, output, settings, backbone)
    return _to_official(source, weights, output, to, backbone)


def _candidates(folder: Path, stem: str) -> list[Path]:
    return [folder / f"{stem}.safetensors", folder / f"{stem}.bin"]


def _to_moka(source: Path, weights: Path, output: Path, settings: dict[str, Any], backbone: str | None) -> Summary:
    """Write the moka adapter folder of an authors' checkpoint."""
    tensors = read_tensors(weights)
    preset = _layout_of(weights, tensors)
    layout = LAYOUTS[preset]
    names = _layers_of(weights, layout, tensors)
    check_finite(tensors, str(weights))
    rank = len(tensors[next(iter(names.values()))[layout.a[0]]])
    summary = Summary(source, output, preset, layers=len(names), rank=rank, mapped=len(tensors))
    config = _config(settings, preset, [name.removeprefix(PREFIX) for name in names], rank, backbone, summary)
    adapter: Tensors = {}
    for layer, keys in names.items():
        adapter[f"{layer}.moka_A.weight"] = torch.stack([tensors[keys[part]] for part in layout.a])  # [M, r, in]
        adapter[f"{layer}.moka_B.weight"] = tensors[keys[layout.b]]  # [out, r]
    others = next((file for file in _candidates(source, OTHERS) if file.is_file()), None)
    projectors, renamed, extra = _split_others(others) if others else ({}, {}, {})
    summary.projectors, summary.aside = len(projectors), sorted(extra)
    record = {"layout": preset, "adapter_config": settings, "adapter": names, "projectors": renamed}
    with atomic_dir(output) as part:
        config.save_pretrained(str(part))
        for file, written in ((SAFETENSORS_WEIGHTS_NAME, adapter), (PROJECTORS, projectors), (EXTRA, extra)):
            if written:  # safetensors refuses views and tensors that share their memory
                save_file({k: v.clone().contiguous() for k, v in written.items()}, part / file, {"format": "pt"})
        write_json(part / RECORD, {**record, OTHERS: others is not None})
    known = {CONFIG_NAME, weights.name, others.name if others else ""}
    if unread := sorted(path.name for path in source.iterdir() if path.name not in known):
        summary.notes.append(f"not read: {some(unread)}")
    model = config.base_model_name_or_path or "BACKBONE"
    load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{output}")'
    summary.notes.append(f"next, in Python: import moka; {load}")
    return summary


def _layout_of(weights: Path, tensors: Tensors) -> str:
    """Return the name of the one layout that names of the file belong to."""
    fitting = [name for name, layout in LAYOUTS.items() if any(layout.match(key) for key in tensors)]
    if len(fitting) == 1:
        return fitting[0]
    problem, remedy = "has other tensors", "Give the folder of the authors' checkpoint."
    if fitting:
        problem = f"mixes the layouts {' and '.join(fitting)}"
    elif not tensors:
        problem = "has no tensors"
    elif any(re.search(r"\.lora_[AB](\.\w+)?(\.weight)?$", key) for key in tensors):
        problem, remedy = "has a plain LoRA adapter", "Load it with peft: PeftModel.from_pretrained(backbone, folder)."
    allowed = "; or ".join(f"{', '.join(layout.parts)} ({name})" for name, layout in LAYOUTS.items())
    raise MokaError(f"{weights} {problem} ({some(sorted(tensors))}); allowed: {allowed}. {remedy}")


def _layers_of(weights: Path, layout: Layout, tensors: Tensors) -> Names:
    """Return the names of the tensors by layer, under peft's name of the layer, and part.

    Raises:
        MokaError: a tensor that is unknown, missing, twice there, or of another shape or type than the others.
    """
    names: Names = {}
    problems = []
    for key in tensors:
        match = layout.match(key)
        if match is None:
            problems.append(f"{key} is not known")
            continue
        layer = PREFIX + match["layer"].removeprefix(PREFIX).removeprefix("base_model.")
        if (before := names.setdefault(layer, {}).setdefault(match["part"], key)) != key:
            problems.append(f"{match['part']} of {layer} is there twice ({before}, {key})")
    ranks: dict[int, str] = {}
    for layer, keys in names.items():
        if lacking := [part for part in layout.parts if part not in keys]:
            problems.append(f"{layer} lacks {', '.join(lacking)}")
            continue
        shapes = {part: list(tensors[key].shape) for part, key in keys.items()}
        a, b = shapes[layout.a[0]], shapes[layout.b]
        if not (
            len(a) == len(b) == 2 and b[1] == a[0] and all([*a, *b]) and all(shapes[part] == a for part in layout.a)
        ):
            problems.append(f"the shapes of {layer} do not belong together: {shapes}")
        dtypes = {tensors[key].dtype for key in keys.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            problems.append(f"{layer} has dtypes {sorted(map(str, dtypes))}, of which one floating dtype is allowed")
        ranks.setdefault(a[0] if a else 0, layer)
    if len(ranks) > 1:
        problems.append(f"the ranks differ: {', '.join(f'{rank} in {layer}' for rank, layer in ranks.items())}")
    if problems:
        raise MokaError(
            f"{weights}: {some(problems)}. Each layer needs {', '.join(layout.a)} [r, in] and {layout.b} [out, r] once. Copy "
            "the checkpoint again; gather a sharded (ZeRO-3) one first."
        )
    return names


def _config(
    settings: dict[str, Any], preset: str, layers: list[str], rank: int, backbone: str | None, summary: Summary
) -> MokaConfig:
    """Return the adapter's configuration: of their settings, or else of the tensors; notes say what was not given."""
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            raise MokaError(
                f"{CONFIG_NAME}: {name} is {settings[name]!r}; the authors' layouts have one r and one lora_alpha."
            )
    values = _our_settings(settings)
    if "r" not in values:
        summary.notes.append(f"r: {rank}, from the tensors")
    elif values["r"] != rank:
        raise MokaError(
            f"{CONFIG_NAME}: r is {settings['r']!r}, but the tensors have rank {rank}. Take the file that belongs to them."
        )
    if "alpha" not in values:
        summary.notes.append(f"lora_alpha is not given in {CONFIG_NAME}: alpha 16 is taken, the authors' default")
    if not values.get("target_modules"):
        values["target_modules"] = sorted({layer.rpartition(".")[2] for layer in layers})
        summary.notes.append(f"target_modules: {', '.join(values['target_modules'])}, from the tensors")
    config = MokaConfig.preset(preset, **{"r": rank, **values})
    try:
        left_out = [layer for layer in layers if not check_target_module_exists(config, layer)]
    except re.error as error:
        raise MokaError(
            f"{CONFIG_NAME}: target_modules {config.target_modules!r}: no regular expression ({error})."
        ) from error
    if left_out:
        raise MokaError(
            f"{CONFIG_NAME}: target_modules {settings['target_modules']!r} leaves out {some(left_out)}, of which there are "
            "tensors. Take the file that belongs to them."
        )
    config.task_type = settings.get("task_type") or "CAUSAL_LM"
    config.base_model_name_or_path = backbone or settings.get("base_model_name_or_path")
    config.inference_mode = True
    summary.modalities = list(config.modalities)
    return config


def _our_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of their settings that MokA has too, under our names; r may be a list of one number repeated."""
    given = {theirs: settings[theirs] for theirs in SETTINGS if settings.get(theirs) is not None}
    r = given.get("r")
    if isinstance(r, list) and r and r.count(r[0]) == len(r):
        given["r"] = r[0]
    for theirs, value in given.items():
        check_types(MokaConfig, {SETTINGS[theirs]: value}, f"{CONFIG_NAME}: {theirs}")
    return {SETTINGS[theirs]: value for theirs, value in given.items()}


def _split_others(path: Path) -> tuple[Tensors, dict[str, str], Tensors]:
    """Return what was trained next to the adapter: projectors under our names, those names -> the original ones, the rest."""
    tensors = read_tensors(path)
    check_finite(tensors, str(path))
    names: dict[str, str] = {}
    for key in tensors:
        medium, name = official_projector_name(key)
        if name:
            ours = f"projectors.{medium}.{name}"
            if names.setdefault(ours, key) != key:
                raise MokaError(f"{path} has {names[ours]} and {key}, which are one tensor of one projector; keep one.")
    projectors = {ours: tensors[key] for ours, key in names.items()}
    return projectors, names, {key: tensor for key, tensor in tensors.items() if key not in names.values()}


def _to_official(source: Path, weights: Path, output: Path, to: str, backbone: str | None) -> Summary:
    """Write the authors' checkpoint of a moka adapter folder."""
    layout = LAYOUTS[to]
    config: Any = MokaConfig.from_pretrained(str(source))
    _check_preset(source, config, to)
    record = _record(source)
    names: Names = record["adapter"] if record.get("layout") == to else {}
    official: Tensors = {}
    others: Tensors = {}
    layers = set()
    for key, tensor in read_tensors(weights).items():
        layer, _, part = key.removesuffix(".weight").rpartition(".")  # format 1 has no .weight
        if part not in ("moka_A", "moka_B"):
            others[key] = tensor
            continue
        if part == "moka_A" and len(tensor) != len(layout.a):
            raise MokaError(
                f"{key} is {list(tensor.shape)}; layout {to} has {len(layout.a)} modalities. Copy it again."
            )
        layers.add(layer)
        known = names.get(layer, {})
        for name, matrix in zip(layout.a, tensor, strict=True) if part == "moka_A" else [(layout.b, tensor)]:
            official[known.get(name, f"{layer}.{name}.weight")] = matrix.clone()
    summary = Summary(source, output, to, len(layers), list(config.modalities), config.r, len(official))
    if others:
        note = f"{len(others)} tensors next to the adapter ({some(list(others))}) go to {OTHERS}.bin as they are"
        summary.notes.append(note)
    projectors, extra = (read_tensors(source / f) if (source / f).is_file() else {} for f in (PROJECTORS, EXTRA))
    if lost := sorted(projectors.keys() - record["projectors"].keys()):
        raise MokaError(f"{source / RECORD} lacks the original names of {some(lost)}. Copy the full folder again.")
    summary.projectors, summary.aside = len(projectors), sorted(extra)
    others |= {record["projectors"][key]: tensor for key, tensor in projectors.items()} | extra
    settings = _their_settings(config, record["adapter_config"], backbone)
    with atomic_dir(output) as folder:
        torch.save(official, folder / WEIGHTS_NAME)
        if others or record.get(OTHERS):
            torch.save(others, folder / f"{OTHERS}.bin")
        write_json(folder / CONFIG_NAME, settings)
    summary.notes.append(
        "next: load the folder with the authors' code, on the backbone that the adapter was trained on"
    )
    return summary


def _check_preset(source: Path, config: MokaConfig, to: str) -> None:
    """Check that the authors' code, which computes what the preset names, would compute what this adapter does."""
    preset = MokaConfig.preset(to)
    weights = {config.weight_of(name) for name in config.modalities if name != "text"}
    given: dict[str, Any] = {"modalities": list(config.modalities)}
    for name in (
        "method",
        "scale_position",
        "interaction",
        "share_b",
        "text_merged",
        "rank_pattern",
        "alpha_pattern",
        "bias",
    ):
        given[name] = getattr(config, name)
    given["interaction_weight"] = weights.pop() if len(weights) == 1 else config.interaction_weight
    given["adapt"] = config.adapt if config.adapted != list(config.modalities) else None
    for name, value in given.items():
        allowed = list(preset.modalities) if name == "modalities" else getattr(preset, name)
        if value != allowed:
            fits = [other for other in LAYOUTS if all(getattr(config, k) == v for k, v in PRESETS[other].items())]
            raise MokaError(
                f"{source}: its {name} is {value!r}; the authors' code of layout {to} has {allowed!r}, so it would compute "
                f"something else. Its settings are those of --to {fits[0] if fits else 'no layout'}."
            )


def _record(source: Path) -> dict[str, Any]:
    """Return the original names and settings, each an empty mapping if the folder was not converted from theirs."""
    names = ("adapter", "projectors", "adapter_config")
    record = read_json(source / RECORD, dict) if (source / RECORD).is_file() else {}
    if not all(isinstance(record.setdefault(name, {}), dict) for name in names):
        raise MokaError(f"{source / RECORD} is damaged: {', '.join(names)} are no mappings. Copy the folder again.")
    return record


def _their_settings(config: Any, before: dict[str, Any], backbone: str | None) -> dict[str, Any]:
    """Return their ``adapter_config.json``: as it was before but for what was changed since, or a new one."""
    known = _our_settings(before)
    was = MokaConfig(**known)
    ours = {theirs: getattr(config, name) for theirs, name in SETTINGS.items()}
    if not isinstance(config.target_modules, str):
        ours["target_modules"] = sorted(config.target_modules or [])
    if before:
        changed = [t for t, name in SETTINGS.items() if name in known and getattr(was, name) != getattr(config, name)]
        settings = {**before, **{theirs: ours[theirs] for theirs in changed}}
    else:
        settings = {"peft_type": "LORA", "task_type": config.task_type, "bias": "none", "inference_mode": True}
        settings |= {theirs: value for theirs, value in ours.items() if value is not False}
        settings["base_model_name_or_path"] = config.base_model_name_or_path
    return settings | ({"base_model_name_or_path": backbone} if backbone else {})
