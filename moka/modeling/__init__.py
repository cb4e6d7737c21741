"""The composed multimodal LLM: encoders, projectors, model and processor."""

from .configuration import MokaModelConfig
from .encoders import ENCODERS, build_encoder
from .model import MokaForConditionalGeneration, fingerprint
from .processing import MokaProcessor, TooLongError
from .projectors import PROJECTORS, build_projector

__all__ = [
    "ENCODERS",
    "PROJECTORS",
    "MokaForConditionalGeneration",
    "MokaModelConfig",
    "MokaProcessor",
    "TooLongError",
    "build_encoder",
    "build_projector",
    "fingerprint",
]
