"""The interface of a benchmark, and the reading of prediction records.

records  ->  Benchmark.reference, Protocol.parse  ->  Items  ->  Benchmark.measure  ->  figures
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moka.errors import MokaError, nearest

from .intervals import proportion

Figures = dict[str, dict[str, Any]]  # name of a figure -> `intervals.figure`


class Item(NamedTuple):
    """One checked record.

    Attributes:
        answer: what the protocol read from the prediction; None is unparsable, and wrong.
        reference: in the form that `Benchmark.reference` gives.
        right: whether the answer is right (for benchmarks that count right answers).
        complete: whether every record of its group (and category) could be parsed.
    """

    id: str
    answer: Any
    reference: Any
    right: bool
    category: str | None
    group: str | None
    complete: bool = True


@dataclass(frozen=True)
class Protocol:
    """How answers are read from generated text.

    Attributes:
        parsing: one or two sentences, printed with every result.
        parse: prediction and its record -> answer, or None where there is none.
        right: answer and reference -> whether it is right.
        version: raised whenever a figure could change.
    """

    parsing: str
    parse: Callable[[str, Mapping[str, Any]], Any]
    right: Callable[[Any, Any], bool] = lambda answer, reference: answer == reference
    version: str = "1"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: what `moka score` calls it.
        about: one line.
        expects: what `reference` has to be, in words.
        figures: name of each figure -> its unit.
        reference: checks the reference of a record and gives the form compared; raises MokaError.
        measure: items, and whether they are those of all categories -> figures.
        protocols: name -> `Protocol`; all have "strict".
        required: fields besides id, prediction and reference.
        optional: fields that are used where a record has them -> what for.
        categories: the known categories in the order of the table; empty where any name goes.
        rollup: category -> further rows that its records count in.
        libraries: optional packages that its figures need, as modules.
        select: items and the protocol's name -> the items that count, and counts to report.
    """

    name: str
    about: str
    expects: str
    figures: Mapping[str, str]
    reference: Callable[[Mapping[str, Any]], Any]
    measure: Callable[[Sequence[Item], bool], Figures]
    protocols: Mapping[str, Protocol]
    required: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    rollup: Callable[[str], tuple[str, ...]] = lambda category: ()
    libraries: tuple[str, ...] = ()
    select: Callable[[list[Item], str], tuple[list[Item], dict[str, int]]] = lambda items, protocol: (items, {})

    @property
    def fields(self) -> tuple[str, ...]:
        return ("id", "prediction", "reference", *self.required)


def read_items(
    benchmark: Benchmark, protocol: Protocol, records: Iterable[Any], where: Callable[[int], str]
) -> list[Item]:
    """Check every record and parse its prediction.

    Raises:
        MokaError: no record; a record that is no object, lacks a field or has a wrong one; a duplicate id.
    """
    items: list[Item] = []
    places: dict[str, str] = {}
    for position, record in enumerate(records):
        place = where(position)
        problem = _field_problem(benchmark, record)
        if not problem and (name := str(record["id"])) in places:
            problem = (
                f"id {name!r} was given before, at {places[name]}. Each record needs an id of its own: is the file two runs "
                "in one, or `moka eval`'s with blanked conditions?"
            )
        if problem:
            raise MokaError(f"{place}: {problem}")
        places[name] = place
        try:
            reference, category = benchmark.reference(record), record.get("category")
            if category is not None and benchmark.categories:
                category = known_name(f"category of {benchmark.name}", category, benchmark.categories)
            # A question that could not be asked has no answer, whatever a protocol makes of an empty text.
            answer = None if record.get("error") else protocol.parse(record["prediction"], record)
        except MokaError as error:
            raise MokaError(f"{place}: {error}") from error
        right = answer is not None and protocol.right(answer, reference)
        group = record.get("group")
        items.append(Item(name, answer, reference, right, category, None if group is None else str(group)))
    if not items:
        raise MokaError(f"no records to score; {benchmark.name} needs objects with {', '.join(benchmark.fields)}.")
    broken = {(item.category, item.group) for item in items if item.answer is None and item.group is not None}
    return [item._replace(complete=(item.category, item.group) not in broken) for item in items]


def of_complete_groups(items: Sequence[Item]) -> list[Item]:
    """For figures over groups: all items, or, of parsable ones only, those whose full group is parsable."""
    parsable_only = all(item.answer is not None for item in items)
    return [item for item in items if item.complete] if parsable_only else list(items)


def _field_problem(benchmark: Benchmark, record: Any) -> str:
    """Return what is wrong with the fields of a record, or an empty string."""
    if not isinstance(record, Mapping):
        return f"is {type(record).__name__}; one object a record is expected."
    for name in benchmark.fields:
        if record.get(name) is None:
            close = nearest(name, [key for key in record if key not in benchmark.fields])
            state = "null" if name in record else "missing"
            return f"field {name!r} is {state}; {benchmark.name} needs {', '.join(benchmark.fields)}.{close}"
    for name in ("id", "group"):
        value = record.get(name)
        if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool) or value == ""):
            return f"field {name!r} is {value!r}; a string or a number is expected."
    for name in ("prediction", "category"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            return f"field {name!r} is {type(value).__name__}; text is expected."
    return ""


def known_name(what: str, given: Any, known: Iterable[str], shown: str = "") -> str:
    """Return a name as ``known`` spells it; case and space around it are ignored.

    Args:
        shown: the known names in words, if they are many.
    Raises:
        MokaError: no such name; with those that are allowed, and the nearest.
    """
    names = {name.casefold(): name for name in known}
    key = given.strip().casefold() if isinstance(given, str) else ""
    if key not in names:
        raise MokaError(
            f"{what} {given!r} is not known; allowed are {shown or ', '.join(names.values())}.{nearest(str(given), names.values())}"
        )
    return names[key]


def word_reference(allowed: Sequence[str], shown: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Return a check that the reference of a record is one of the allowed words, which gives the word as allowed spells it."""
    return lambda record: known_name("reference", record["reference"], allowed, shown)


def accuracy(items: Sequence[Item], overall: bool) -> Figures:
    """The share of right answers, in per cent."""
    return {"accuracy": proportion(sum(item.right for item in items), len(items))}


def by_category(benchmark: Benchmark, items: Iterable[Item]) -> dict[str, list[Item]]:
    """Category -> its items: known ones in their order, each after the rows it is rolled up in; others as they come."""
    found: dict[str, list[Item]] = {}
    for item in items:
        if item.category is not None:
            for name in (*benchmark.rollup(item.category), item.category):
                found.setdefault(name, []).append(item)
    order = [name for known in benchmark.categories for name in (*benchmark.rollup(known), known)]
    return {name: found[name] for name in dict.fromkeys([*order, *found]) if name in found}
