"""The MokA adapter, on torch and peft only. Importing it registers ``PeftType.MOKA``."""

from ._register import register_classes, register_type  # isort: skip

register_type()

from .config import MokaConfig  # noqa: E402
from .diagnostics import active_modalities, gradient_norms, interaction_weights, modality_norms  # noqa: E402
from .layer import MokaLinear  # noqa: E402
from .model import MokaModel  # noqa: E402
from .turns import turn_markers  # noqa: E402
from .wrapping import routing  # noqa: E402

__all__ = [
    "MokaConfig",
    "MokaLinear",
    "MokaModel",
    "active_modalities",
    "gradient_norms",
    "interaction_weights",
    "modality_norms",
    "routing",
    "turn_markers",
]


register_classes(MokaConfig, MokaModel)
