"""The command line of the programs in ``recipes/``."""

from __future__ import annotations

import argparse

from moka.errors import MokaError
from moka.training import RunConfig, load_config

from .train import with_tiny


def recipe_arguments(description: str, modalities: set[str]) -> tuple[list[RunConfig], bool]:
    """The configurations of a recipe's stages, in order, and whether interrupted runs are to continue.

    Raises:
        MokaError: a configuration that cannot be read, or is of another scenario; none is trained then.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, metavar="YAML", help="stages, in the order of training")
    parser.add_argument("--resume", action="store_true", help="continue with runs that were interrupted")
    parser.add_argument("--tiny", action="store_true", help="tiny random parts: the full path in a minute")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="changes to every configuration"
    )
    arguments = parser.parse_args()
    configs = [load_config(path, with_tiny(arguments)) for path in arguments.config]
    for path, config in zip(arguments.config, configs, strict=True):
        strange = sorted(set(config.model.modalities) - modalities)
        if strange:
            raise MokaError(f"{path}: modality {', '.join(strange)} is not of this recipe ({', '.join(modalities)}).")
    return configs, arguments.resume
