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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from moka.adapter import MokaConfig
from moka.adapter.checks import read_tensors
from moka.adapter.config import PRESETS
from moka.adapter.matching import PREFIX
from moka.errors import MokaError, nearest
from moka.io import atomic_dir, read_json, write_json
from moka.modeling.projectors import import_official

RECORD, PROJECTORS, EXTRA = "official.json", "projectors.safetensors", "extra.safetensors"
OTHERS = "non_lora_trainables"  # LLaVA's name for what is trained next to the adapter

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """One of the authors' layouts: the names of the A of each modality, in ``moka_A``'s order, and of the shared B."""

    preset: str
    a: tuple[str, ...]
    b: str
    pattern: str  # groups: module, part

    def slot(self, key: str) -> tuple[str, str] | None:
        """Module and part (one of ``a``, or ``b``) of a key; None for a key that is not of this layout."""
        match = re.fullmatch(self.pattern, key)
        if match is None or match["part"] not in (*self.a, self.b):
            return None
        return match["module"], match["part"]


# An adapter's name may stand inside, depending on how the checkpoint was saved.
LAYOUTS = {
    "official-avt": Layout(
        "official-avt",
        ("lora_A0", "lora_A1", "lora_A2"),
        "lora_B0",
        r"(?P<module>.+)\.(?P<part>lora_[AB]\d)(?:\.(?!weight$)\w+)?(?:\.weight)?",
    ),
    "official-vt": Layout(
        "official-vt",
        ("lora_A.text", "lora_A.image"),
        "lora_B.text",
        r"(?P<module>.+)\.(?P<part>lora_[AB]\.(?:text|image))(?:\.default)?(?:\.weight)?",
    ),
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
    _check_output(source, output, overwrite)
    settings = _read_settings(source)
    ours = settings.get("peft_type") == "MOKA"
    if to is not None:
        if not ours:
            raise MokaError(
                f"{source} has {_kind_of(source, settings)}; --to takes a moka adapter folder (peft_type MOKA in "
                f"{CONFIG_NAME}). To read the authors' checkpoint, leave --to out."
            )
        return _to_official(source, output, LAYOUTS[to], backbone)
    if ours:
        raise MokaError(
            f"{source} has a moka adapter already. To write it in the authors' layout, add --to {' or --to '.join(LAYOUTS)}."
        )
    return _to_moka(source, output, settings, backbone)


# ---------------------------------------------------------------- the authors' to ours


def _to_moka(source: Path, output: Path, settings: dict[str, Any], backbone: str | None) -> Summary:
    weights = _file(source, Path(WEIGHTS_NAME).stem)
    if weights is None:
        found = some(sorted(path.name for path in source.iterdir())) or "nothing"
        raise MokaError(
            f"{source} has neither {WEIGHTS_NAME} nor {SAFETENSORS_WEIGHTS_NAME}; found: {found}. Give the folder of the "
            "authors' checkpoint that has one of them."
        )
    tensors = read_tensors(weights)
    layout = _layout_of(weights, tensors)
    parts = _gather(weights, layout, tensors)
    rank = _check_shapes(weights, layout, parts, tensors)
    _check_finite(weights, tensors)
    summary = Summary(source, output, layout.preset, layers=len(parts), rank=rank, mapped=len(tensors))
    config = _config(settings, layout, parts, rank, backbone, summary)

    adapter: Tensors = {}
    names: dict[str, dict[str, str]] = {}
    for module, keys in parts.items():
        name = _our_module(module)
        if name in names:
            raise MokaError(f"{weights} has {name} with and without the prefix {PREFIX!r}; one adapter is allowed.")
        adapter[f"{name}.moka_A.weight"] = torch.stack([tensors[keys[part]] for part in layout.a])  # [M, r, in]
        adapter[f"{name}.moka_B.weight"] = tensors[keys[layout.b]]  # [out, r]
        names[name] = keys

    others = _file(source, OTHERS)
    projectors, renamed, extra = _split(others) if others else ({}, {}, {})
    summary.projectors, summary.aside = len(projectors), sorted(extra)
    record = {
        "layout": layout.preset,
        "adapter_config": settings,
        "adapter": names,
        "projectors": renamed,
        OTHERS: others is not None,
    }
    with atomic_dir(output) as part:
        config.save_pretrained(str(part))
        _save(adapter, part / SAFETENSORS_WEIGHTS_NAME)
        for file, some_tensors in ((PROJECTORS, projectors), (EXTRA, extra)):
            if some_tensors:
                _save(some_tensors, part / file)
        write_json(part / RECORD, record)
    known = {CONFIG_NAME, weights.name, others.name if others else ""}
    unread = sorted(path.name for path in source.iterdir() if path.name not in known)
    if unread:
        summary.notes.append(f"not read: {some(unread)}")
    model = config.base_model_name_or_path or "BACKBONE"
    summary.notes.append(
        f'next, in Python: import moka; PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), '
        f'"{output}")'
    )
    return summary


def _layout_of(weights: Path, tensors: Tensors) -> Layout:
    counts = {name: sum(layout.slot(key) is not None for key in tensors) for name, layout in LAYOUTS.items()}
    fitting = [name for name, count in counts.items() if count]
    if len(fitting) == 1:
        return LAYOUTS[fitting[0]]
    allowed = "lora_A0/A1/A2 with lora_B0 (official-avt), or lora_A.text/lora_A.image with lora_B.text (official-vt)"
    if fitting:
        raise MokaError(
            f"{weights} mixes the layouts {' and '.join(fitting)} ({some(tensors)}); allowed is one: {allowed}."
        )
    if not tensors:
        raise MokaError(f"{weights} has no tensors; allowed: {allowed}. Copy the checkpoint again.")
    if any(re.search(r"\.lora_[AB](\.\w+)?(\.weight)?$", key) for key in tensors):
        raise MokaError(
            f"{weights} has a plain LoRA adapter ({some(sorted(tensors))}), which knows no modalities; allowed: {allowed}. "
            "Load it with peft itself: PeftModel.from_pretrained(backbone, folder)."
        )
    raise MokaError(f"{weights} has other tensors ({some(sorted(tensors))}); allowed: {allowed}.")


def _gather(weights: Path, layout: Layout, tensors: Tensors) -> dict[str, dict[str, str]]:
    """Module -> part -> key, complete."""
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        slot = layout.slot(key)
        if slot is None:
            unknown.append(key)
            continue
        module, part = slot
        keys = parts.setdefault(module, {})
        if part in keys:
            raise MokaError(f"{weights} has {part} of {module} twice ({keys[part]}, {key}); one adapter is allowed.")
        keys[part] = key
    if unknown:
        raise MokaError(
            f"{weights} has {len(unknown)} tensors that layout {layout.preset} does not know: {', '.join(sorted(unknown))}. "
            f"Known: {', '.join((*layout.a, layout.b))}. Nothing was written."
        )
    lacking = [
        f"{module} lacks {', '.join(p for p in (*layout.a, layout.b) if p not in keys)}"
        for module, keys in parts.items()
        if len(keys) < len(layout.a) + 1
    ]
    if lacking:
        raise MokaError(
            f"{weights}: {len(lacking)} of {len(parts)} layers are incomplete: {'; '.join(lacking)}. Copy the checkpoint again."
        )
    return parts


def _check_shapes(weights: Path, layout: Layout, parts: dict[str, dict[str, str]], tensors: Tensors) -> int:
    """The one rank of all layers."""
    ranks: dict[int, str] = {}
    for module, keys in parts.items():
        shapes = {part: list(tensors[key].shape) for part, key in keys.items()}
        a, b = shapes[layout.a[0]], shapes[layout.b]
        fits = len(a) == 2 and len(b) == 2 and 0 not in (*a, *b) and b[1] == a[0]
        if not fits or any(shapes[part] != a for part in layout.a):
            raise MokaError(
                f"{weights}: the shapes of {module} do not belong together: {shapes}. Each A must be [r, in], equally, and B "
                "[out, r]; gather a sharded (ZeRO-3) checkpoint first."
            )
        dtypes = {tensors[key].dtype for key in keys.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise MokaError(
                f"{weights}: {module} has dtypes {sorted(map(str, dtypes))}; one floating dtype is allowed."
            )
        ranks.setdefault(a[0], module)
    if len(ranks) > 1:
        raise MokaError(
            f"{weights}: the ranks differ: {', '.join(f'{r} in {m}' for r, m in ranks.items())}; one is allowed."
        )
    return next(iter(ranks))


def _check_finite(path: Path, tensors: Tensors) -> None:
    damaged = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise MokaError(
            f"{path} has values that are not finite ({some(damaged)}); copy it again, or take an earlier one."
        )


def _config(
    settings: dict[str, Any],
    layout: Layout,
    parts: dict[str, dict[str, str]],
    rank: int,
    backbone: str | None,
    summary: Summary,
) -> MokaConfig:
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            raise MokaError(
                f"{CONFIG_NAME}: {name} is {settings[name]!r}; the authors' layouts have one r and one lora_alpha."
            )
    leaves = sorted({module.rpartition(".")[2] for module in parts})
    values = _basic(settings)
    if "r" not in values:
        summary.notes.append(f"r: {rank}, from the tensors")
    elif values["r"] != rank:
        raise MokaError(
            f"{CONFIG_NAME}: r is {settings['r']!r}, but the tensors have rank {rank}. Take the file that belongs to them."
        )
    if "alpha" not in values:
        summary.notes.append(f"lora_alpha is not given in {CONFIG_NAME}: alpha 16 is taken, the authors' default")
    if not values.get("target_modules"):
        values["target_modules"] = leaves
        summary.notes.append(f"target_modules: {', '.join(leaves)}, from the tensors")
    targets = values["target_modules"]
    _check_targets(targets)
    for module in parts:
        inner = _our_module(module).removeprefix(PREFIX)
        if isinstance(targets, str):
            hit = re.fullmatch(targets, inner) is not None
        else:
            hit = any(inner == name or inner.endswith(f".{name}") for name in targets)
        if not hit:
            raise MokaError(
                f"{CONFIG_NAME}: target_modules {targets!r} leaves out {inner}, which the tensors hold. Take the file that "
                "belongs to them."
            )
    config = MokaConfig.preset(layout.preset, **{"r": rank, **values})
    config.task_type = settings.get("task_type") or "CAUSAL_LM"
    config.base_model_name_or_path = backbone or settings.get("base_model_name_or_path")
    config.inference_mode = True
    summary.modalities = list(config.modalities)
    return config


def _basic(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of LoRA's settings that MokA has too, under our names; checked."""
    values: dict[str, Any] = {}
    r = settings.get("r")
    if isinstance(r, list):
        if not r or len(set(map(str, r))) != 1:
            raise MokaError(f"{CONFIG_NAME}: r is {r!r}; all modalities share one rank, so the numbers must agree.")
        r = r[0]
    checks = (
        ("r", "r", r, (int,), "an integer, or a list of one number repeated"),
        ("alpha", "lora_alpha", settings.get("lora_alpha"), (int, float), "a number"),
        ("dropout", "lora_dropout", settings.get("lora_dropout"), (int, float), "a number"),
        (
            "target_modules",
            "target_modules",
            settings.get("target_modules"),
            (str, list),
            "a list of names, or one regex",
        ),
    )
    for ours, theirs, value, types, allowed in checks:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, types):
            raise MokaError(f"{CONFIG_NAME}: {theirs} is {value!r}; allowed: {allowed}.")
        values[ours] = value
    if settings.get("use_rslora"):
        values["use_rslora"] = True
    return values


def _split(path: Path) -> tuple[Tensors, dict[str, str], Tensors]:
    """Tensors trained next to the adapter: projectors under our names, those names -> the original ones, and the rest."""
    tensors = read_tensors(path)
    _check_finite(path, tensors)
    projectors: Tensors = {}
    names: dict[str, str] = {}
    extra: Tensors = {}
    for key, tensor in tensors.items():
        short = re.sub(r"^base_model\.(model\.)?(?=(model\.)?(vl|al)_projector\.)", "", key)
        match = re.match(r"(?:model\.)?(?:vl_projector\.(visual)|al_projector\.(audio))_", short)
        try:
            state = import_official({short: tensor})[0] if match else {}
        except MokaError:
            state = {}
        if match and state:
            name = f"projectors.{match[1] or match[2]}.{next(iter(state))}"
            if name in projectors:
                raise MokaError(f"{path} has {names[name]} and {key}, which are one tensor of one projector; keep one.")
            projectors[name], names[name] = tensor, key
        else:
            extra[key] = tensor
    return projectors, names, extra


# ---------------------------------------------------------------- ours to the authors'


def _to_official(source: Path, output: Path, layout: Layout, backbone: str | None) -> Summary:
    config: Any = MokaConfig.from_pretrained(str(source))
    _check_preset(source, config, layout)
    record = _record(source)
    same = record.get("layout") == layout.preset
    names = record.get("adapter", {}) if same else {}
    weights = _file(source, Path(WEIGHTS_NAME).stem)
    if weights is None:
        raise MokaError(f"{source} has no {SAFETENSORS_WEIGHTS_NAME}; copy the full adapter folder.")
    tensors = read_tensors(weights)
    official: Tensors = {}
    others: Tensors = {}
    modules = set()
    for key, tensor in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")  # format 1 has no .weight
        if part not in ("moka_A", "moka_B"):
            others[key] = tensor
            continue
        modules.add(module)
        known = names.get(module, {})
        if part == "moka_B":
            official[known.get(layout.b, f"{module}.{layout.b}.weight")] = tensor.clone()
            continue
        if len(tensor) != len(layout.a):
            raise MokaError(f"{key} is {list(tensor.shape)}; layout {layout.preset} has {len(layout.a)} modalities.")
        for name, matrix in zip(layout.a, tensor, strict=True):
            official[known.get(name, f"{module}.{name}.weight")] = matrix.clone()
    summary = Summary(source, output, layout.preset, len(modules), list(config.modalities), config.r, len(official))
    if others:
        summary.notes.append(
            f"{len(others)} tensors next to the adapter ({some(others)}) go to {OTHERS}.bin as they are"
        )
    for file in (PROJECTORS, EXTRA):
        if (source / file).is_file():
            renamed = record.get("projectors", {}) if file == PROJECTORS else {}
            found = read_tensors(source / file)
            lost = [key for key in found if file == PROJECTORS and key not in renamed]
            if lost:
                raise MokaError(
                    f"{source / RECORD} does not say the original names of {some(lost)}; copy the full folder as "
                    "`moka convert` wrote it."
                )
            others |= {renamed.get(key, key): tensor for key, tensor in found.items()}
            summary.projectors += len(found) if file == PROJECTORS else 0
            summary.aside += sorted(found) if file == EXTRA else []
    settings = _official_settings(config, record, backbone)
    with atomic_dir(output) as folder:
        torch.save(official, folder / WEIGHTS_NAME)
        if others or record.get(OTHERS):
            torch.save(others, folder / f"{OTHERS}.bin")
        write_json(folder / CONFIG_NAME, settings)
    summary.notes.append(
        "next: load the folder with the authors' code, on the backbone that the adapter was trained on"
    )
    return summary


def _check_preset(source: Path, config: MokaConfig, layout: Layout) -> None:
    """The authors' code computes what the preset says and nothing else."""
    preset = MokaConfig.preset(layout.preset)
    if list(config.modalities) != list(preset.modalities):
        raise MokaError(
            f"{source}: its modalities are {list(config.modalities)}; layout {layout.preset} has {list(preset.modalities)}. "
            + _fitting(config)
        )
    lambdas = {config.weight_of(name) for name in config.modalities if name != "text"}
    given = {
        "scale_position": config.scale_position,
        "interaction": config.interaction,
        "interaction_weight": lambdas.pop() if len(lambdas) == 1 else config.interaction_weight,
        "share_b": config.share_b,
        "adapt": config.adapt if config.adapted != list(config.modalities) else None,
        "text_merged": config.text_merged,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": config.bias,
    }
    for name, value in given.items():
        allowed = getattr(preset, name)
        if value != allowed:
            raise MokaError(
                f"{source}: its {name} is {value!r}; the authors' code of layout {layout.preset} has {allowed!r}, so it would "
                f"compute something else. {_fitting(config)}"
            )


def _fitting(config: MokaConfig) -> str:
    for name, preset in PRESETS.items():
        if name in LAYOUTS and all(getattr(config, key) == value for key, value in preset.items()):
            return f"Its settings are those of --to {name}."
    return f"Train with one of the presets {' and '.join(LAYOUTS)} to write the authors' layout."


def _record(source: Path) -> dict[str, Any]:
    path = source / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    shapes = {"adapter": dict, "projectors": dict, "adapter_config": dict}
    if not isinstance(record, dict) or any(not isinstance(record.get(k, t()), t) for k, t in shapes.items()):
        raise MokaError(f"{path} is damaged; copy the folder as `moka convert` wrote it, or delete the file.")
    return record


def _official_settings(config: Any, record: dict[str, Any], backbone: str | None) -> dict[str, Any]:
    settings = dict(record.get("adapter_config", {}))
    targets = config.target_modules
    ours = {
        "r": config.r,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets or []),
    }
    theirs = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}
    before = _basic(settings)
    if isinstance(before.get("target_modules"), list):
        before["target_modules"] = sorted(before["target_modules"])
    if settings:  # as they were, but for what was changed since
        settings |= {theirs[name]: value for name, value in ours.items() if name in before and before[name] != value}
    else:
        settings = {"peft_type": "LORA", "task_type": config.task_type, "bias": "none", "inference_mode": True}
        settings |= {theirs[name]: value for name, value in ours.items()}
        settings["base_model_name_or_path"] = config.base_model_name_or_path
        if config.use_rslora:
            settings["use_rslora"] = True
    if backbone:
        settings["base_model_name_or_path"] = backbone
    return settings


# ---------------------------------------------------------------- files


def _check_targets(targets: str | list) -> None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise MokaError(f"{CONFIG_NAME}: target_modules {targets!r} is no regular expression ({error}).") from error
    elif not all(isinstance(name, str) for name in targets):
        raise MokaError(f"{CONFIG_NAME}: target_modules {targets!r} has what is no name; it is a list of strings.")


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    inside, place = source.resolve(), output.resolve()
    if place == inside or place in inside.parents or inside in place.parents:
        raise MokaError(f"--output {output} is the source, has it or is in it; give another folder.")
    for folder in (output, *output.parents):
        if folder.is_file():
            raise MokaError(f"--output {output}: {folder} is a file; give a folder.")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise MokaError(f"--output {output} is not empty; give another folder, or add --overwrite to replace it.")
        if not (output / CONFIG_NAME).is_file():
            raise MokaError(
                f"--output {output} has no adapter ({CONFIG_NAME}), so it is not replaced; give another folder."
            )


def _read_settings(source: Path) -> dict[str, Any]:
    path = source / CONFIG_NAME
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise MokaError(
            f"{path} has a {type(settings).__name__}; an object with peft's fields is expected. Copy the folder again."
        )
    return settings


def _kind_of(source: Path, settings: dict[str, Any]) -> str:
    if not settings:
        return f"no {CONFIG_NAME}"
    return f"a {settings.get('peft_type', 'nameless')} adapter"


def _file(folder: Path, stem: str) -> Path | None:
    """The file of that name, as safetensors if there is one, or pickled."""
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    return None


def _our_module(module: str) -> str:
    return module if module.startswith(PREFIX) else PREFIX + module.removeprefix("base_model.")


def _save(tensors: Tensors, path: Path) -> None:
    # safetensors refuses views and tensors that share their memory.
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path, {"format": "pt"})


def some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")
