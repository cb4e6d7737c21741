"""Training: configuration, trainer, run folder."""

from moka.config import MokaTrainingArguments, RunConfig, config_from_dict, load_config

from .run import finish, run_training, train_adapter, train_connectors
from .setup import Run, open_run

__all__ = [
    "MokaTrainingArguments",
    "Run",
    "RunConfig",
    "config_from_dict",
    "finish",
    "load_config",
    "open_run",
    "run_training",
    "train_adapter",
    "train_connectors",
]
