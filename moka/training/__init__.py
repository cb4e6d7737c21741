"""Training: configuration, trainer, run folder."""

from .arguments import RunConfig, config_from_dict, load_config
from .run import run_training

__all__ = ["RunConfig", "config_from_dict", "load_config", "run_training"]
