"""The MokA adapter, on torch and peft alone. Importing it registers ``PeftType.MOKA``."""

from ._register import register  # isort: skip

register()

from .config import MokaConfig  # noqa: E402
from .diagnostics import active_modalities, gradient_norms, interaction_weights, modality_norms  # noqa: E402
from .layer import MokaLayer, MokaLinear  # noqa: E402
from .model import MokaModel  # noqa: E402
from .turns import turn_markers
from .wrapping import routing  # noqa: E402

__all__ = [
    "MokaConfig",
    "MokaLayer",
    "MokaLinear",
    "MokaModel",
    "active_modalities",
    "gradient_norms",
    "interaction_weights",
    "modality_norms",
    "routing",
    "turn_markers",
]


def _register_method() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    if PeftType.MOKA not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="moka", config_cls=MokaConfig, model_cls=MokaModel)
    # A second import (a reload) makes new classes, and peft must use the ones that the caller sees.
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOKA] = MokaConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOKA] = MokaModel


_register_method()
