"""Look at data before training, and bring it into moka's own format.

moka data check CONFIG.yaml [key=value ...]     every sample and file, and what the model would get of them
moka data show CONFIG.yaml --index 3            one sample token by token: modality, interaction, what is learnt
moka data convert SOURCE --output DIR           any readable data set as JSONL with its media
moka data formats [NAME]                        the published layouts that can be read
"""

from __future__ import annotations

# `moka data formats` does not wait for torch: what needs it is imported where it is used.
import argparse
from inspect import cleandoc
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from moka.data.convert import MEDIA_MODES
from moka.data.formats import FORMATS
from moka.errors import MokaError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from moka.config import DataSection, RunConfig
    from moka.data.check import CheckReport

SPLITS = ("train", "alignment", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (help, add, _) in ACTIONS.items():
        sub = actions.add_parser(name, help=help, description=help)
        # Left out it must not undo the same option before the action.
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        add(sub)


def run(arguments: argparse.Namespace) -> None:
    ACTIONS[arguments.action][2](arguments)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a run; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.train=mine.jsonl")
    parser.add_argument("--tiny", action="store_true", help="as `moka train --tiny`: needs no checkpoint")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], default="all", help="which data (default: all that are set)"
    )
    parser.add_argument("--manifest", metavar="FILE", help="write the good samples of one split as JSONL")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads that try media (default: all cores)")
    parser.add_argument(
        "--limit", type=_positive, default=20, metavar="N", help="problems printed a split (default 20)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the full report")


def check(arguments: argparse.Namespace) -> None:
    """Exit code 0: no problem found; 1: some were."""
    from moka.data.check import check_samples
    from moka.data.convert import write_manifest
    from moka.data.media import MediaDecoding
    from moka.io import write_json
    from moka.training import load_config

    from .train import with_tiny

    config = load_config(arguments.config, with_tiny(arguments))
    splits = _splits(config.data, arguments.split)
    if arguments.manifest and len(splits) > 1:
        raise MokaError(f"--manifest has one split, and {', '.join(splits)} are checked. Name one by --split.")
    if arguments.manifest and Path(arguments.manifest).exists():
        raise MokaError(f"--manifest: {arguments.manifest} is there already. Name another file, or delete it.")
    processor, encoders, limit = _processor(config)
    reports: list[CheckReport] = []
    for split in splits:
        samples = _open(config, split)
        report = check_samples(
            samples,
            processor,
            encoders=encoders,
            max_length=limit,
            workers=arguments.workers,
            name=f"data.{split}",
            decoding=MediaDecoding.of(config.data),
        )
        reports.append(report)
        _show_report(report, list(samples.notes), arguments.limit)
        if arguments.manifest:
            root = write_manifest(arguments.manifest, samples, report.good)
            print(f"written: {arguments.manifest} ({len(report.good)} samples), to be read with data.media_root={root}")
    if arguments.json:
        write_json(Path(arguments.json), [report.to_dict() for report in reports])
        print(f"written: {arguments.json}")
    if any(report.problems for report in reports):
        raise SystemExit(1)


def _processor(config: RunConfig) -> tuple[Any, dict[str, Any], int | None]:
    """Return the processor, its encoders without weights (of a Hugging Face model none), and the longest sample in tokens."""
    from moka.modeling.build import build_processor, context_length
    from moka.modeling.hf_model import load_chat_processor, load_mllm_config

    if config.model.kind == "hf":
        assert config.model.name is not None
        limit = context_length(config.model, load_mllm_config(config.model.name))
        return load_chat_processor(config.model.name, config.model.interaction), {}, limit
    skeleton, processor = build_processor(config.model)
    return processor, dict(skeleton.encoders.items()), context_length(config.model, skeleton.config)


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--split", choices=SPLITS, default="train", help="which data (default train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, metavar="I", help="the sample at this position, from 0")
    which.add_argument("--id", help="the sample with this id")
    which.add_argument("--count", type=_positive, metavar="N", help="the first N samples (default 1)")


def show_samples(arguments: argparse.Namespace) -> None:
    from moka.data.media import MediaDecoding
    from moka.data.preview import show, spans
    from moka.modeling.processing import TooLongError
    from moka.training import load_config

    from .train import with_tiny

    config = load_config(arguments.config, with_tiny(arguments))
    _splits(config.data, arguments.split)
    samples = _open(config, arguments.split)
    wanted = _wanted(samples, arguments)
    processor, _, limit = _processor(config)
    for index in wanted:
        sample = MediaDecoding.of(config.data).decode_sample(samples[index])
        category = f", category {sample['category']!r}" if "category" in sample else ""
        title = f"data.{arguments.split}[{index}]: sample {sample['id']!r}{category}"
        try:
            encoded = processor.encode(sample["messages"], max_length=limit)
        except TooLongError as error:
            encoded = processor.encode(sample["messages"], max_length=limit, truncate=True)
            title += f"\nshortened as in training. {error}"
        show(spans(encoded, processor, sample), title)


def _wanted(samples: Any, arguments: argparse.Namespace) -> list[int]:
    if arguments.id is not None:
        found = next((i for i in range(len(samples)) if _id(samples, i) == arguments.id), None)
        if found is None:
            raise MokaError(f"--id: no sample of data.{arguments.split} has the id {arguments.id!r}.")
        return [found]
    if arguments.index is not None:
        if not 0 <= arguments.index < len(samples):
            raise MokaError(f"--index: {arguments.index} is not one of 0 to {len(samples) - 1}.")
        return [arguments.index]
    return list(range(min(arguments.count or 1, len(samples))))


def _id(samples: Any, index: int) -> str | None:
    """Return the id of a sample; None of one that cannot be read, which must not hide the others."""
    try:
        return samples[index]["id"]
    except MokaError:
        return None


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="a JSONL file, embedded:TASK, or with --format the data set's folder")
    parser.add_argument("overrides", nargs="*", metavar="option=value", help="options of the format")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must not hold anything")
    parser.add_argument("--format", metavar="NAME", help="a published layout; see `moka data formats`")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder, if not SOURCE; of JSONL: the media root")
    parser.add_argument(
        "--split", metavar="NAME", help="the format's split (default: its first) or the task's (default: train)"
    )
    parser.add_argument("--size", type=_positive, metavar="N", help="only the first N samples")
    parser.add_argument(
        "--media", choices=MEDIA_MODES, default="copy", help="copy, link (hard links) or leave files (default copy)"
    )


def convert_source(arguments: argparse.Namespace) -> None:
    import yaml

    from moka.data.convert import convert
    from moka.data.sources import attribution, open_samples
    from moka.io import write_text
    from moka.yaml_files import load_yaml

    source, root = arguments.source, arguments.root
    options = list(arguments.overrides)
    if arguments.format and source and "=" in source and not Path(source).exists():
        options, source = [source, *options], None  # the folder came by --root
    if arguments.format:
        if source and root:
            raise MokaError(f"moka data convert: the folder is {source!r} and --root {root!r}; give one of them.")
        try:
            values = load_yaml("\n".join(_option(option) for option in options)) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that cannot be
            reason = " ".join(str(error).split())
            raise MokaError(
                f"moka data convert: the options {' '.join(options)} are not valid YAML ({reason})."
            ) from error
        mapping = {"format": arguments.format, "root": source or root, "split": arguments.split, **values}
        given: Any = {k: v for k, v in mapping.items() if v is not None}
    elif source is None or options:
        what = f"the options {' '.join(options)} belong to a --format" if options else "nothing to convert is named"
        raise MokaError(f"moka data convert: {what}. Give a JSONL file, embedded:TASK, or --format NAME --root DIR.")
    else:
        given = source
    from_file = None if arguments.format else root
    split: Any = arguments.split or (FORMATS[arguments.format].splits[0] if arguments.format in FORMATS else "train")
    if arguments.format:
        given["split"] = split
    samples = open_samples(given, split, size=arguments.size, media_root=from_file, require_answer=False)
    path = convert(samples, arguments.output, arguments.media)
    write_text(path.parent / "ATTRIBUTION.md", attribution(given))
    stay = f", to be read with data.media_root={samples.media_root}" if arguments.media == "none" else ""
    for note in samples.notes:
        print(f"note: {note}")
    print(f"written: {path} ({len(samples)} samples{stay})")


def _option(text: str) -> str:
    name, equals, value = text.partition("=")
    if not equals:
        raise MokaError(f"Option {text!r} is not of the form option=value; see `moka data formats NAME`.")
    return f"{name}: {value}"


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="tell all of one format")


def list_formats(arguments: argparse.Namespace) -> None:
    name = arguments.name
    if name is None:
        width = max(map(len, FORMATS), default=0)
        for format in FORMATS.values():
            print(f"{format.name.ljust(width)}  {'(experimental) ' if format.experimental else ''}{format.about}")
        return
    if name not in FORMATS:
        raise MokaError(f"Format {name!r} is not known; there are {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
    format = FORMATS[name]
    print(f"{format.name}: {format.about}\n")
    splits = ", ".join(format.splits) + (", or any other" if format.any_split else "")
    print(f"media:   {', '.join(format.media)}\nsplits:  {splits} (default {format.splits[0]})")
    if format.experimental:
        print(f"experimental: {format.experimental} were not checked against the published files")
    if format.benchmark:
        print(f"scored:  moka score {format.benchmark} FILE")
    print(f"\nlayout:\n{indent(cleandoc(format.layout), '  ')}\n\nfields:")
    for field, meaning in format.fields.items():
        print(f"  {field}: {meaning}")
    if format.options:
        print("\noptions:")
        for option, (default, help, _) in format.options.items():
            print(f"  {option}={default}: {help}")


def _splits(data: DataSection, wanted: str) -> list[str]:
    """Return the splits to look at: those that are set, for "all"."""
    found = [name for name in SPLITS if getattr(data, name) is not None and wanted in (name, "all")]
    if not found:
        missing = (
            "data.train, data.alignment, data.validation and data.test are" if wanted == "all" else f"data.{wanted} is"
        )
        raise MokaError(f"{missing} not set; there is nothing to look at. Set it, or name another --split.")
    return found


def _open(config: RunConfig, split: str) -> Any:
    """Return the samples as the run will read them, media undecoded."""
    from moka.data.sources import open_samples

    data = config.data
    return open_samples(
        getattr(data, split),
        "train" if split == "alignment" else split,  # type: ignore[arg-type]
        stage=1 if split == "alignment" else 2,
        size={"train": data.train_size, "validation": data.validation_size}.get(split),
        seed=config.data_seed(1 if split == "alignment" else 2),
        media_root=data.media_root,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least 1 is expected")
    return number


def _show_report(report: CheckReport, notes: list[str], limit: int) -> None:
    from rich.console import Console

    from moka.data.preview import printable

    console = Console()
    console.print(_table(report))
    for note in notes:
        console.print(f"note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems[:limit]:
        console.print(f"{problem.kind}: {printable(problem.text)}", markup=False, highlight=False, soft_wrap=True)
    if len(report.problems) > limit:
        print(f"... and {len(report.problems) - limit} more problems (--limit, or --json FILE for all)")


def _table(report: CheckReport) -> Table:
    from rich.table import Table

    from moka.data.check import PROBLEMS

    table = Table(title=f"{report.name}: {len(report.good)} of {report.samples} samples are good", title_justify="left")
    table.add_column("what")
    table.add_column("found", overflow="fold")
    for kind, title in PROBLEMS.items():
        if found := report.of(kind):
            files = len({problem.file for problem in found if problem.file})
            table.add_row(
                title,
                f"{len(found)}" + (f" ({files} file{'s' if files > 1 else ''})" if files else ""),
                style="bold red",
            )
    if not report.problems:
        table.add_row("problems", "none")
    table.add_section()
    table.add_row("media per sample", _counted(report.layouts))
    table.add_row("categories", _counted(report.categories))
    if report.sampling_rates:
        rates = ", ".join(f"{rate} Hz: {count}" for rate, count in sorted(report.sampling_rates.items()))
        table.add_row("sampling rates", f"{rates} (resampled: {report.resampled})")
        table.add_row("sounds longer than the encoder takes", str(report.cut))
    limit = f", limit {report.max_length}" if report.max_length else ""
    table.add_row(f"tokens, media expanded{limit}", _spread(report.lengths))
    table.add_row("of these, of media", _spread(report.media_tokens))
    table.add_row("supervised tokens", _spread(report.supervised))
    table.add_row("text shortened to fit", str(report.shortened))
    return table


def _counted(counts: Any, most: int = 12) -> str:
    from moka.data.preview import printable

    text = ", ".join(f"{printable(name)}: {count}" for name, count in counts.most_common(most))
    return text + (f", ... {len(counts) - most} more" if len(counts) > most else "") or "-"


def _spread(values: list[int]) -> str:
    from moka.data.check import spread

    return ", ".join(f"{name} {value}" for name, value in spread(values).items()) or "-"


ACTIONS: dict[str, Any] = {
    "check": ("try every sample and file of a configuration", _add_check, check),
    "show": ("print samples token by token", _add_show, show_samples),
    "convert": ("write any readable data set as JSONL with its media", _add_convert, convert_source),
    "formats": ("list the published layouts that can be read", _add_formats, list_formats),
}
