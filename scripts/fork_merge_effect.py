"""Accuracy of a run's answers with Fork-Merge Decoding beside usual decoding, on the same test questions.

    python scripts/fork_merge_effect.py RUN --size 400 --fork-layers 2 4 8

Exact match of free answers; the difference to usual decoding is paired by question, with a bootstrapped 95 % interval.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

import moka
from moka.evaluation.answers import before_answer, words
from moka.evaluation.evaluate import open_questions
from moka.training import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run of `moka train` whose test questions have pictures and sound")
    parser.add_argument("--size", type=int, default=400, help="questions (default 400)")
    parser.add_argument("--fork-layers", type=int, nargs="+", default=[2, 4, 8], help="of each setting (default 2 4 8)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at once (default 32)")
    arguments = parser.parse_args()
    loaded = moka.load(arguments.run)
    samples = open_questions(load_config(f"{arguments.run}/config.yaml").data.test, "test", None)
    samples = [samples[index] for index in range(min(arguments.size, len(samples)))]
    truth = [words(sample["messages"][-1:]) for sample in samples]
    types = np.array([sample.get("category") or "all" for sample in samples])
    right: dict[str, np.ndarray] = {}
    for layers in [None, *arguments.fork_layers]:
        name = "usual" if layers is None else f"fork-merge, {layers} layers"
        how = {} if layers is None else {"decoding": "fork-merge", "fork_layers": layers}
        given: list[str] = []
        for start in tqdm(range(0, len(samples), arguments.batch_size), desc=name):
            chats = [before_answer(sample["messages"]) for sample in samples[start : start + arguments.batch_size]]
            given += loaded.generate_batch(chats, max_new_tokens=16, **how)
        right[name] = np.array([one == reference for one, reference in zip(given, truth, strict=True)])
    generator = np.random.default_rng(0)
    draws = generator.integers(len(samples), size=(2000, len(samples)))
    print(f"{len(samples)} questions; accuracy in %")
    for name, found in right.items():
        by_type = ", ".join(f"{one} {100 * found[types == one].mean():.1f}" for one in dict.fromkeys(types))
        change = 100 * (found.astype(float) - right["usual"])
        low, high = np.percentile(change[draws].mean(1), [2.5, 97.5])
        print(
            f"{name:24} {100 * found.mean():.1f} ({by_type}); {change.mean():+.1f} [{low:+.1f}, {high:+.1f}] to usual"
        )


if __name__ == "__main__":
    main()
