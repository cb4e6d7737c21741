"""``PeftType.MOKA``: peft's list of methods is an enum, which has no public way to grow."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "MOKA"


def register_type() -> None:
    """Add the member ``MOKA`` to ``PeftType``, once."""
    if NAME in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register_classes(config: type, model: type) -> None:
    """Make the classes of the method known to peft."""
    member = PeftType[NAME]
    if member not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="moka", config_cls=config, model_cls=model)
    # A second import (a reload) makes new classes, and peft must use the ones that the caller sees.
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model
