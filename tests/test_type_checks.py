"""Values are compared with the type hints of the dataclass that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest

import moka
from moka.type_checks import check_types


class Colour(str, Enum):
    RED = "red"


@dataclass
class Settings:
    number: int = 1
    share: float = 0.5
    flag: bool = False
    name: str | None = None
    kind: Literal["new", "old", 3] = "new"
    names: list[str] | str | None = None
    ids: dict[str, list[int]] | None = None
    weights: float | dict[str, float] = 1.0
    extra: dict | None = None
    colour: Colour = Colour.RED
    anything: Any = None


FITS = {
    "number": [0, -3, 2**63 - 1],
    "share": [0.5, 1, -2.0],
    "flag": [True, False],
    "name": ["a", "", None],
    "kind": ["old", 3],
    "names": ["a", [], ["a", "b"], ("a",), {"a", "b"}, None],
    "ids": [{}, {"a": [1, 2], "b": ()}, None],
    "weights": [2, {"a": 1, "b": 0.5}],
    "extra": [{"a": object}, None],
    "colour": ["red", Colour.RED],
    "anything": [object(), None],
    "unknown": [float("nan")],
}
FAILS = {
    "number": [True, 1.0, "1", None, [1], 2**63, 10**400],
    "share": [float("nan"), float("inf"), -float("inf"), 10**400, "0.5", True, None],
    "flag": ["no", 0, None],
    "name": [1, ["a"]],
    "kind": ["ne", "3", 3.0, [], None],
    "names": [["a", 1], [None], {"a": 1}, 3],
    "ids": [["a"], {"a": 1}, {"a": [True]}, {1: [1]}, {"a": [1.0]}],
    "weights": ["1", {"a": float("nan")}, {"a": "1"}, [1.0]],
    "extra": [[], "a"],
    "colour": ["blue", None, []],
}


@pytest.mark.parametrize("name", FITS)
def test_values_that_fit(name):
    for value in FITS[name]:
        check_types(Settings, {name: value}, "settings.json")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FAILS.items() for value in values])
def test_values_that_do_not_fit_are_named_with_their_place(name, value):
    with pytest.raises(moka.MokaError) as error:
        check_types(Settings, {"number": 1, name: value}, "settings.json", "Write it again.")
    message = str(error.value)
    assert message.startswith(f"settings.json: {name} is {value!r}; allowed: ")
    assert message.endswith("Write it again.")


def test_the_message_lists_what_is_allowed():
    for name, value, allowed in [
        ("number", "1", "allowed: int."),
        ("weights", "1", "allowed: finite float | dict[str, finite float]."),
        ("kind", "olt", "allowed: new, old, 3. Did you mean 'old'?"),
    ]:
        with pytest.raises(moka.MokaError) as error:
            check_types(Settings, {name: value}, "here")
        assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("share_b", "no"), ("alpha", float("nan")), ("r", 4.0), ("modalities", {"text": 0})]
)
def test_fields_of_a_constructed_configuration(name, value):
    config = moka.MokaConfig()
    check_types(moka.MokaConfig, vars(config), "MokaConfig")
    with pytest.raises(moka.MokaError, match=f"MokaConfig: {name} is"):
        check_types(moka.MokaConfig, {**vars(config), name: value}, "MokaConfig")
