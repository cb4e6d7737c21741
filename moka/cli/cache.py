"""Compute the features of frozen encoders once, for all runs on the same data:

moka cache CONFIG.yaml data.feature_cache=features     then: moka train CONFIG.yaml data.feature_cache=features
accelerate launch -m moka cache CONFIG.yaml key=value ...

Training then reads features instead of decoding media and running the encoder. Killed and started again, it continues.
"""

from __future__ import annotations

import argparse

from moka.distributed import is_main
from moka.errors import MokaError
from moka.features.build import cache_features
from moka.features.cache import DTYPES
from moka.training import load_config

from .train import with_tiny

SPLITS = ("train", "alignment", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a run; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.feature_cache=features")
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], default="all", help="which data (default: all that the stages read)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures, frames or clips at once (default 32)")
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES],
        default="float32",
        help="float32: training equals that from media (default); the others take half the space, and round",
    )
    parser.add_argument("--shard-mib", type=int, default=256, help="size of a file in MiB (default 256)")
    parser.add_argument("--workers", type=int, help="threads that decode, in each process (default: its cores)")
    parser.add_argument("--tiny", action="store_true", help="as `moka train --tiny`")


def run(arguments: argparse.Namespace) -> None:
    for name in ("batch_size", "shard_mib", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MokaError(f"--{name.replace('_', '-')}: {value} is too small; at least 1 is expected.")
    lines = cache_features(
        load_config(arguments.config, with_tiny(arguments)),
        splits=None if arguments.split == "all" else [arguments.split],
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        workers=arguments.workers,
        shard_bytes=arguments.shard_mib * 2**20,
    )
    if is_main():
        print("\n".join(lines))
