"""Training: configuration, trainer, run folder."""

from .arguments import RunConfig, config_from_dict, load_config
from .opening import Run, open_run
from .run import finish, run_training, train_adapter, train_connectors

__all__ = [
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
