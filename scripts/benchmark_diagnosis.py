"""Time of `moka.diagnose` beside that of evaluating the loss of the same samples once, in pairs.

    python scripts/benchmark_diagnosis.py RUN --size 200 --rounds 3

Both read the samples, decode and encode their media, and run the model without gradients, in batches of the same size. The
diagnosis is the default one (tokens ablated, so 4 coalitions of 2 modalities) with attention, gradients and interaction.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import moka
from moka.diagnosis.reading import open_model, open_reader
from moka.training import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run of `moka train`")
    parser.add_argument("--size", type=int, default=200, help="samples (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs (default 3)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of one pass (default 8)")
    arguments = parser.parse_args()
    source = load_config(f"{arguments.run}/config.yaml").data.test
    model, loaded = open_model(arguments.run)

    @torch.no_grad()
    def evaluate() -> None:
        reader = open_reader(model, source, loaded)
        for places in reader.batches(arguments.size, arguments.batch_size):
            model(**reader.load(places).inputs)

    def diagnose() -> None:
        moka.diagnose(loaded, source, size=arguments.size, batch_size=arguments.batch_size, progress=False)

    ratios, seconds = [], {"loss": [], "diagnose": []}
    for _ in range(arguments.rounds):
        for name, run in (("loss", evaluate), ("diagnose", diagnose)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        ratios.append(seconds["diagnose"][-1] / seconds["loss"][-1])
    for name, times in seconds.items():
        print(f"{name}: median {statistics.median(times):.1f} s of {[round(one, 1) for one in times]}")
    print(f"diagnose / loss: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
