"""The samples of one optimizer step, divided over processes, devices and accumulation steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments

from moka.errors import MokaError


def divided(section: dict[str, Any], processes: int, name: str) -> tuple[int, int] | None:
    """``divide`` for a section of a configuration; None where it gives no ``global_batch_size``."""
    total = section.get("global_batch_size")
    largest = section.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    return None if total is None else divide(total, largest, processes, name)


def divide(total: int, largest: int, processes: int, name: str = "training") -> tuple[int, int]:
    """(samples on a device at once, accumulation steps) whose product with ``processes`` is ``total``.

    Args:
        largest: what a device takes at once, ``per_device_train_batch_size``; fewer where ``total`` needs no more.
        name: of the section, for messages.
    Raises:
        MokaError: they do not divide ``total``; with what would.
    """
    if (parts := _parts(total, largest, processes)) is not None:
        return parts
    remedies = []
    if total % processes:
        message = f"{name}.global_batch_size: {total} cannot be divided over {processes} processes."
    else:
        message = (
            f"{name}.global_batch_size: {total} is no multiple of {largest} samples x {processes} processes = "
            f"{largest * processes}."
        )
        share = total // processes
        remedies.append(f"set per_device_train_batch_size to {_nearest(_divisors(share), largest)}")
    counts = [n for n in _divisors(total) if _parts(total, largest, n)]
    remedies.append(f"launch {_nearest(counts, processes)} processes")
    totals = [n for n in range(1, total + processes * largest + 1) if _parts(n, largest, processes)]
    remedies.append(f"set global_batch_size to {_nearest(totals, total, 2)}")
    text = ", or ".join(remedies)
    raise MokaError(f"{message} {text[0].upper()}{text[1:]}.")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _parts(total: int, largest: int, processes: int) -> tuple[int, int] | None:
    if total % processes:
        return None
    share = total // processes
    if share <= largest:
        return share, 1
    return None if share % largest else (largest, share // largest)


def _nearest(numbers: Iterable[int], wanted: int, count: int = 4) -> str:
    """The few that are nearest to ``wanted``, as "2, 4 or 8"."""
    chosen = [str(n) for n in sorted(sorted(numbers, key=lambda n: (abs(n - wanted), n))[:count])]
    return " or ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
