"""Batches are the same whoever makes them, and reach the device as the machine allows."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from moka.data import EncodedDataset
from moka.data.media import BadMediaPolicy, DecodedDataset
from moka.io import read_jsonl
from moka.modeling import TooLongError
from moka.training import run as run_module

SHORT = {
    "data__train_size": 12,
    "alignment__max_steps": 4,
    "training__max_steps": 8,  # epochs of three steps
    "training__per_device_train_batch_size": 4,
    "training__eval_steps": 2,
    "training__save_strategy": "no",
    "alignment__save_strategy": "no",
}


class Seen(TrainerCallback):
    """The batches of each step; the processes that help, after each."""

    def __init__(self):
        self.batches, self.workers = [], []

    def on_batch(self, trainer, inputs, sample_ids):
        kept = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.batches.append((sample_ids, kept))

    def on_step_end(self, args, state, control, **kwargs):
        self.workers.append(children())


def children():
    """Process ids of the loaders' workers."""
    import psutil

    return {one.pid for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def observed(train, tmp_path, monkeypatch):
    def run(name, **changes):
        seen = Seen()
        own = run_module._callbacks
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_callbacks", lambda run, stage: [*own(run, stage), seen])
            folder = train(tmp_path / name, **SHORT, **changes)
        return folder, seen

    return run


@pytest.mark.parametrize("changes", [{}, {"training__packing": True, "model__max_length": 150}], ids=["rows", "packed"])
def test_a_run_is_the_same_with_and_without_workers(observed, same_run, capfd, changes):
    before = children()
    single, here = observed("single", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        helped, there = observed(
            "helped", **changes, training__dataloader_num_workers=2, alignment__dataloader_num_workers=2
        )
    assert len(here.batches) == len(there.batches) == 12
    for (ids, batch), (other_ids, other) in zip(here.batches, there.batches, strict=True):
        assert ids == other_ids
        assert batch.keys() == other.keys()
        for name, values in batch.items():
            assert torch.equal(values, other[name]), name
    same_run(helped, single)  # with dropout, evaluations and epochs in between
    assert all(workers <= before for workers in here.workers)
    assert len(there.workers[-1] - before) == 4  # two of training, two of evaluation, in their third epoch
    assert there.workers[-1] == there.workers[7]
    assert children() <= before
    assert "tokenizers" not in capfd.readouterr().err


def test_workers_that_stay_do_not_change_what_dropout_draws(observed, same_run):
    stay, _ = observed("stay", training__dataloader_num_workers=1)
    leave, _ = observed("leave", training__dataloader_num_workers=1, training__dataloader_persistent_workers=False)
    same_run(stay, leave)


class Refusing:
    """A processor for which every chat but that of sample 5 is too long."""

    def encode(self, messages, **how):
        (part,) = messages[0]["content"]
        if part["text"] != "5":
            raise TooLongError(part["text"])
        return {"input_ids": [1], "labels": [1]}


def test_a_substitute_that_cannot_be_used_is_reported_under_its_own_index(tmp_path):
    """Even samples have bad media; what takes their place is too long."""

    def sample(i):
        bad, text = {"type": "image", "image": str(tmp_path / "absent.png")}, {"type": "text", "text": str(i)}
        return {"id": f"s{i}", "messages": [{"role": "user", "content": [text if i % 2 else bad]}]}

    policy = BadMediaPolicy("substitute", 1.0)
    decoded = DecodedDataset([sample(i) for i in range(8)], policy=policy)
    encoded = EncodedDataset(decoded, Refusing(), 16, report_path=tmp_path / "dropped.jsonl")
    assert {encoded[index]["sample_id"] for index in range(8)} == {"s5"}
    records = read_jsonl(tmp_path / "dropped.jsonl")
    assert records
    assert all(record["id"] == f"s{record['index']}" == f"s{record['reason']}" for record in records)
