"""Batches grouped by length: less padding, nothing lost, the same on every process and after a resume."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from torch.utils.data import BatchSampler

from moka.data.batching import LengthGroupedSampler, padding_share
from moka.data.lengths import Lengths
from moka.training.dataloading import prepare_loader

BATCH, WORLD, ACCUMULATED = 4, 2, 2
STEP = BATCH * WORLD * ACCUMULATED


def mixed(size=1000, seed=0):
    """Text only, pictures, and films with sound: lengths over two orders of magnitude."""
    random = np.random.default_rng(seed)
    visual = random.choice([0, 0, 1, 1, 10], size)
    audio = np.where(visual == 10, random.integers(0, 11, size), 0)
    tokens = random.integers(10, 120, size) + 32 * visual + 25 * audio
    return Lengths(tokens, {"visual": visual, "audio": audio})


@pytest.fixture
def lengths():
    return mixed()


def order(lengths, epoch=0, seed=7, step=STEP):
    sampler = LengthGroupedSampler(lengths, step, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("size", [1, 3, STEP, 100, 1000, 1003])
def test_every_sample_comes_once_an_epoch(size):
    lengths = mixed(size)
    assert len(LengthGroupedSampler(lengths, STEP)) == size
    for epoch in range(3):
        assert sorted(order(lengths, epoch)) == list(range(size))


def test_most_of_the_padding_goes(lengths):
    random = np.random.default_rng(1).permutation(len(lengths)).tolist()
    before = padding_share(lengths.tokens, random, BATCH)
    after = padding_share(lengths.tokens, order(lengths), BATCH)
    assert before > 0.3
    assert after < 0.1


def test_padding_share_is_what_a_padded_batch_has():
    assert padding_share(np.array([4, 2, 3, 3]), [0, 1, 2, 3], 2) == pytest.approx(2 / 14)
    assert padding_share(np.array([5, 5, 5]), [0, 1, 2], 2) == 0


def test_steps_cost_their_processes_about_the_same(lengths):
    """Batches that processes compute at the same time are equally in tokens, and in items for the encoders."""
    grouped, random = order(lengths), np.random.default_rng(1).permutation(len(lengths)).tolist()

    def unlike(indices, values):
        batches = values[np.array(indices[: len(indices) // STEP * STEP])].reshape(-1, WORLD, BATCH).sum(-1)
        return float(np.abs(batches[:, 0] - batches[:, 1]).mean())

    for values in (lengths.tokens, lengths.media_items):
        assert unlike(grouped, values) < 0.35 * unlike(random, values)


def test_where_lengths_are_equal_media_decide():
    media = np.random.default_rng(0).integers(0, 5, 640)
    lengths = Lengths(np.full(640, 100), {"visual": media})
    batches = media[np.array(order(lengths))].reshape(-1, STEP)
    assert (np.ptp(batches, axis=1) <= 1).all()


def test_epochs_and_seeds_differ_and_are_repeatable(lengths):
    assert order(lengths, 1) == order(lengths, 1)
    assert order(lengths, 1) != order(lengths, 2)
    assert order(lengths, 1, seed=8) != order(lengths, 1)
    batches = [
        {tuple(sorted(one[k : k + STEP])) for k in range(0, 992, STEP)}
        for one in (order(lengths, 1), order(lengths, 2))
    ]
    assert len(batches[0] & batches[1]) < 3  # who shares a batch is drawn again


def test_the_longest_come_first_and_the_incomplete_batch_last(lengths):
    found = order(mixed(1003))
    assert mixed(1003).tokens[found[:STEP]].max() == mixed(1003).tokens.max()
    # Batches stand in no order of length.
    means = lengths.tokens[np.array(order(lengths)[:992])].reshape(-1, STEP).mean(1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.5


def test_the_order_does_not_depend_on_the_number_of_processes(lengths):
    """A step has the same samples, however they are shared out."""
    found = []
    for world in (1, 2, 4):
        shards = [
            list(BatchSamplerShard(BatchSampler(LengthGroupedSampler(lengths, STEP, 7), BATCH, False), world, rank))
            for rank in range(world)
        ]
        steps = STEP // (BATCH * world)
        found.append(
            [
                {index for shard in shards for batch in shard[k * steps : (k + 1) * steps] for index in batch}
                for k in range(992 // STEP)
            ]
        )
    assert found[0] == found[1] == found[2]


# --- two processes, as accelerate shares out batches


def loader(lengths, rank, world=WORLD):
    sampler = LengthGroupedSampler(lengths, STEP, seed=7)
    shard = BatchSamplerShard(BatchSampler(sampler, BATCH, drop_last=False), world, rank)
    made = DataLoaderShard(list(range(len(lengths))), batch_sampler=shard, collate_fn=list)
    prepare_loader(made)
    return made


def epoch_of(made, epoch):
    made.set_epoch(epoch)
    return list(made)


def test_processes_see_different_samples_and_all_of_them(lengths):
    for epoch in range(2):
        parts = [[i for batch in epoch_of(loader(lengths, rank), epoch) for i in batch] for rank in range(WORLD)]
        assert not set(parts[0][:-BATCH]) & set(parts[1][:-BATCH])  # the last batches are filled up from the first
        assert set(parts[0]) | set(parts[1]) == set(range(len(lengths)))
        assert [len(part) for part in parts] == [500, 500]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_epoch_resumes_where_it_was(lengths, epoch, world):
    for rank in range(world):
        through = loader(lengths, rank, world)
        for earlier in range(epoch):
            epoch_of(through, earlier)
        full = epoch_of(through, epoch)
        resumed = skip_first_batches(loader(lengths, rank, world), 5)
        assert epoch_of(resumed, epoch) == full[5:]
