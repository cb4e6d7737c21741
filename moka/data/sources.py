"""From what the configuration names to a data set of samples.

"embedded:TASK" | {source: embedded:TASK, noise: ...} | "train.jsonl" | {format: ave, root: ...} | a list of these
    -> open_samples: checked samples, media as paths -> open_source: media decoded
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moka.data.dataset import SampleDataset
from moka.data.formats import FORMATS, open_format
from moka.data.jsonl import JsonlDataset
from moka.data.media import BadMediaPolicy, DecodedDataset, MediaDecoding
from moka.data.streaming import MixtureEntry, SampleStream, is_tar, open_stream
from moka.errors import MokaError, nearest
from moka.type_checks import from_mapping

# What published data sets call the splits of ours.
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
EMBEDDED = "embedded:"
PHOTOGRAPHS = "embedded:photographs"
SCENES = "embedded:scenes"
Split = Literal["train", "validation", "test"]
Source = str | dict[str, Any] | list[Any]


def is_embedded(source: Any) -> bool:
    """Return whether a source is one of moka's own small tasks, as it is or with knobs, whose media come decoded."""
    if isinstance(source, dict) and {"source"} < set(source) <= {"source", *_knob_names(source.get("source"))}:
        source = source["source"]
    return isinstance(source, str) and source.startswith(EMBEDDED)


def _knobs_class(source: Any) -> Any:
    from moka.demo.knobs import Knobs, SceneKnobs  # the embedded tasks are known by name only

    return SceneKnobs if source == SCENES else Knobs


def _knob_names(source: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(_knobs_class(source)))


def describe_source(source: Source | None) -> str:
    """Return a source on one line, for tables and messages."""
    if isinstance(source, dict) and "source" in source:
        weight = f" x {source['weight']}" if "weight" in source else ""
        knobs = "".join(f", {name} {source[name]}" for name in _knob_names(source["source"]) if name in source)
        return describe_source(source["source"]) + knobs + weight
    if isinstance(source, list):
        return " + ".join(describe_source(one) for one in source)
    if isinstance(source, dict):
        split = f", {source['split']}" if "split" in source else ""
        return f"{source.get('format')} in {source.get('root')}{split}"
    return str(source)


def open_samples(
    source: Source,
    split: Split,
    *,
    stage: int = 2,
    size: int | None = None,
    seed: int = 0,
    media_root: str | None = None,
    require_answer: bool = True,
) -> Any:
    """Open a `SampleDataset` whose media are still paths (those of embedded tasks are decoded), or a `SampleStream`.

    Args:
        source: ``embedded:TASK``, or ``{source: embedded:TASK, noise: ...}`` (see ``moka.demo.knobs``), the path of a JSONL
            file of chat messages, a mapping ``{format: NAME, root: FOLDER, split: ..., media_root: ..., option: value}``
            (see ``moka.data.formats``), a list of these, joined, or a mixture.
        split: which split of an embedded task or of a format that names none; a JSONL file is a split by itself.
        stage: 1 pairs single media with captions (embedded tasks), 2 asks questions.
        size: use that many samples, from the start.
        seed: of the embedded training questions, and of mixtures.
        media_root: where the media paths of a JSONL file start.

    Raises:
        MokaError: no such file, task or format; a mapping with unknown keys.
    """
    if not source or not isinstance(source, (str, Path, dict, list)):
        raise MokaError(
            f"data source: {source!r}; give a file, embedded:TASK, a mapping with format, or a list of these."
        )
    if is_embedded(source):
        return SampleDataset.concat([_open_task(source, split, size, seed, stage)])
    open_one = partial(
        open_samples, split=split, stage=stage, seed=seed, media_root=media_root, require_answer=require_answer
    )
    entries = mixture_of(source)
    if entries is not None and any(entry.streamed for entry in entries):
        return open_stream(entries, open_one, seed=seed, media_root=media_root)
    if entries is not None:
        parts = [open_one(entry.source) for entry in entries]
        samples = SampleDataset.mix(parts, [entry.weight for entry in entries], seed)
    elif isinstance(source, list):
        samples = SampleDataset.concat([open_one(one) for one in source])
    elif isinstance(source, dict):
        samples = _open_mapping(source, split, require_answer)
    else:
        samples = JsonlDataset(source, media_root=media_root, require_answer=require_answer)
    return samples.first(size)


def _open_task(source: Source, split: Split, size: int | None, seed: int, stage: int) -> Any:
    # The embedded tasks are known by name only: nothing else here needs them.
    from moka.demo.digit_tasks import EmbeddedTask
    from moka.demo.scene_tasks import ScenesTask
    from moka.demo.stamp_tasks import PhotographsTask

    knobs: dict[str, Any] = dict(source) if isinstance(source, dict) else {}
    name = str(knobs.pop("source", source))
    task: Any = {PHOTOGRAPHS: PhotographsTask, SCENES: ScenesTask}.get(name, EmbeddedTask)
    made = _knobs_class(name)(**knobs)
    return task(name.removeprefix(EMBEDDED), split, size=size, seed=seed, stage=stage, knobs=made)


def mixture_of(source: Source) -> list[MixtureEntry] | None:
    """Return the entries of a mixture: a mapping with ``source``, a list in which one has it, or tar shards; else None.

    Raises:
        MokaError: an unknown key, a weight or a buffer that is no positive number, an entry without a source.
    """
    listed = source if isinstance(source, list) else [source]
    if not any(is_tar(one) or (isinstance(one, dict) and "source" in one) for one in listed):
        return None
    entries = [one if isinstance(one, dict) and "source" in one else {"source": one} for one in listed]
    return [_mixture_entry(entry) for entry in entries]


def _mixture_entry(entry: dict[str, Any]) -> MixtureEntry:
    """Check an entry. The knobs of an embedded task, which are written next to ``source``, become a part of its source."""
    where, knobs = f"data source {describe_source(entry)!r}", {}
    if is_embedded(entry["source"]):
        names = _knob_names(entry["source"])
        known = (*(f.name for f in fields(MixtureEntry)), *names)
        for key in entry:
            if key not in known:
                raise MokaError(
                    f"{where}: unknown key {key!r}; allowed are {', '.join(known)}.{nearest(str(key), known)}"
                )
        knobs = {key: entry[key] for key in names if key in entry}
    if knobs:
        entry = {key: value for key, value in entry.items() if key not in knobs}
        entry["source"] = {"source": entry["source"], **knobs}
    return from_mapping(MixtureEntry, entry, where)


def is_streamed(source: Source | None) -> bool:
    """Return whether the samples of a source are streamed: it has tar shards, or an entry says so."""
    return any(entry.streamed for entry in (source and mixture_of(source)) or [])


def _open_mapping(source: dict[str, Any], split: Split, require_answer: bool) -> SampleDataset:
    options = dict(source)
    name, root = options.pop("format", None), options.pop("root", None)
    if name is None:
        colon = " YAML wants a space after each colon." if any(":" in str(key) for key in source) else ""
        raise MokaError(f"A data source has no 'format': {source!r}.{colon} Known: {', '.join(FORMATS)}.")
    if root is None and "hub" not in options:
        raise MokaError(f"A data source of format {name} has no 'root', the folder that has it: {source!r}.")
    chosen = options.pop("split", None) or _default_split(str(name), split)
    return open_format(name, root, chosen, require_answer=require_answer, **options)


def _default_split(name: str, split: Split) -> str | None:
    """Return what format ``name`` calls our split; None leaves the complaint about an unknown format to ``open_format``."""
    if name not in FORMATS:
        return None
    splits = FORMATS[name].splits
    if split == "test" and not any(theirs.startswith("train") for theirs in splits):
        return splits[0]  # all of it is for tests; the first is the one with published answers
    found = next((theirs for theirs in _SPLIT_NAMES[split] if theirs in splits), None)
    if found is None:
        raise MokaError(
            f"A data source of format {name} names no split, and none of it goes by {split!r}. It has "
            f"{', '.join(splits)}; say which one is meant (split: NAME, or --split NAME)."
        )
    return found


def open_source(
    source: Source,
    split: Split,
    *,
    decoding: MediaDecoding | None = None,
    policy: BadMediaPolicy | None = None,
    report_path: str | Path | None = None,
    look_for_files: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Open a map-style data set of samples with decoded media: ``open_samples``, and what to do about bad files.

    Args:
        decoding: how media become pictures and sound.
        policy: what to do about bad media; under "skip" the caller leaves samples out (``moka.data.media_validation``).
        report_path: a JSONL file that collects what was bad.
        look_for_files: under "error", ``check_files`` at once; otherwise the caller does.
        seed: of the data and of substitutes.
        settings: of `open_samples`.

    Raises:
        MokaError: as ``open_samples``; media that are not there.
    """
    samples = open_samples(source, split, seed=seed, **settings)
    if isinstance(samples, SampleStream) or is_embedded(source):
        return samples
    policy = policy or BadMediaPolicy()
    if look_for_files and policy.policy == "error":
        check_files(samples)
    return DecodedDataset(samples, decoding, policy, seed=seed, report_path=report_path)


def check_files(samples: SampleDataset, share: tuple[int, int] = (0, 1)) -> None:
    """Look for every media file of a data set of undecoded samples.

    Args:
        share: (k, n): of n processes that look for a part each, this is the k-th.

    Raises:
        MokaError: the first file that is not there.
    """
    missing = samples.missing_media(limit=1, share=share)
    if missing:
        raise MokaError(
            f"{'; '.join(missing)}. Put the files under the media root, or leave the samples out: `moka data check "
            "--manifest` writes what is good; in training data.on_bad_media=skip or substitute does without."
        )


def attribution(source: Source) -> str:
    """Return where the data come from and under which licence, for model cards."""
    if isinstance(source, list):
        return "".join(dict.fromkeys(attribution(one) for one in source))
    if isinstance(source, dict) and "source" in source:
        return attribution(source["source"])
    if isinstance(source, dict):
        about = FORMATS[source["format"]].about if source.get("format") in FORMATS else ""
        return f"- {describe_source(source)}: {about}\n"
    if source == PHOTOGRAPHS:
        from moka.demo.stamps import ATTRIBUTION as photographs

        return photographs
    if is_embedded(source):
        from moka.demo.embedded import ATTRIBUTION as digits

        return digits
    return f"- {source}\n"
