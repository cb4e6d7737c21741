"""``PeftType.MOKA``: peft's list of methods is an enum, which has no public way to grow."""

from __future__ import annotations

from peft.utils import PeftType


def register() -> None:
    """Add the member ``MOKA`` to ``PeftType``, once."""
    if "MOKA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "MOKA")
    member._name_ = "MOKA"
    member._value_ = "MOKA"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append("MOKA")
    PeftType._member_map_["MOKA"] = member
    PeftType._value2member_map_["MOKA"] = member
    type.__setattr__(PeftType, "MOKA", member)
