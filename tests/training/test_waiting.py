"""A step of a training waits for the device only to read the ids of its batch: what is logged and guarded is read where
the trainer logs.

On a CPU nothing waits, so here a copy to the device is a real copy, and what is computed from copies and weights counts as
lying on the device.
"""

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import accelerate.data_loader
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import TrainerCallback

import moka
from moka.training import run as run_module
from moka.training.trainer import MokaTrainer

MOKA = str(Path(moka.__file__).parent)
OTHERS = ("transformers", "accelerate", "peft")
# Whose result, or the size of it, the host has to wait for.
READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
}


class Reads(TorchDispatchMode):
    """(file of moka, or library; operator) -> how often a value on the device was asked for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.there = {}  # kept, so that no other storage takes its place

    def put(self, *tensors):
        self.there |= {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if not any(one.untyped_storage().data_ptr() in self.there for one in given):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1]
        )
        if name in READS or by_mask or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.count(name)
        result = func(*args, **kwargs)
        self.put(*(one for one in tree_leaves(result) if isinstance(one, torch.Tensor)))
        return result

    def count(self, name):
        for frame in reversed(traceback.extract_stack()):
            package = next((other for other in OTHERS if f"site-packages/{other}/" in frame.filename), None)
            if frame.name == "training_step" and frame.filename == __file__:
                package = "test"
            if package or frame.filename.startswith(MOKA):
                self.found[package or frame.filename.removeprefix(MOKA), name] += 1
                return


class Copies(TorchFunctionMode):
    """Counts with `Reads` what on a CPU is no operator."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist") and args[0].untyped_storage().data_ptr() in self.reads.there:
            self.reads.count(name)
            if name == "cpu":  # a copy, which is not on the device; here `cpu()` would give the same tensor
                values = args[0].detach()
                return torch.tensor(values.tolist(), dtype=values.dtype).view(values.shape)
        return func(*args, **(kwargs or {}))


class Between(TrainerCallback):
    """Counts the reads of all steps from the first to the last given."""

    def __init__(self, first, last):
        self.first, self.last, self.reads, self.steps = first, last, Reads(), 0
        self.modes = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if step == self.first:
            model = kwargs["model"]
            self.reads.put(*model.parameters(), *(b for b in model.buffers() if b.numel()))
            self.modes.enter_context(self.reads)
            self.modes.enter_context(Copies(self.reads))
        self.steps += self.first <= step <= self.last

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            self.modes.close()


@pytest.fixture
def reads(train, tmp_path, monkeypatch):
    """``reads(stage, **changes)``: what steps 5 to 9 of a run ask the device for, of which the tenth is logged."""

    def run(stage, **changes):
        counter = Between(5, 9)
        own = run_module._callbacks
        send = accelerate.data_loader.send_to_device

        def copied(batch, device, **how):
            batch = tree_map_only(torch.Tensor, torch.clone, send(batch, device, **how))
            counter.reads.put(*(one for one in batch.values() if isinstance(one, torch.Tensor)))
            return batch

        monkeypatch.setattr(accelerate.data_loader, "send_to_device", copied)
        monkeypatch.setattr(run_module, "_callbacks", lambda run, number: [*own(run, number), counter])
        section = {"max_steps": 10, "logging_steps": 10, "save_strategy": "no"}
        sections = {f"{name}__{key}": value for name in ("alignment", "training") for key, value in section.items()}
        changes = {**sections, "stages": [stage], "data__validation": None, **changes}
        train(tmp_path / "run", **changes)
        assert counter.steps == 5
        return counter.reads.found

    return run


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {}),
        (2, {"adapter__method": "lora"}),
        (2, {"training__gradient_accumulation_steps": 2, "training__gradient_checkpointing": True}),
        (2, {"training__packing": True, "model__max_length": 120}),
        (1, {}),
        (1, {"alignment__objective": "language_modeling"}),
    ],
    ids=["moka", "lora", "accumulated, checkpointed", "packed", "alignment", "alignment by language modelling"],
)
def test_steps_between_two_logs_read_back_only_ids_at_the_start_of_a_forward(reads, stage, changes):
    found = reads(stage, **changes)
    forwards = 5 * changes.get("training__gradient_accumulation_steps", 1)
    # transformers looks whether a mask of attention masks anything.
    assert found.pop(("transformers", "_local_scalar_dense"), 0) <= 2 * forwards
    # The adapter reads what its routing needs.
    routing = {where for where in found if where[0].startswith("/adapter/")}
    assert {name for _, name in routing} <= {"cpu", "tolist"}
    assert sum(found.pop(where) for where in routing) <= 5 * forwards
    # Types and labels; with packing also positions and the mask of padding.
    assert set(found) <= {("/modeling/model.py", "cpu"), ("/training/alignment.py", "cpu")}
    assert sum(found.values()) <= (4 if "training__packing" in changes else 3) * forwards


@pytest.mark.parametrize("read", [float, torch.Tensor.tolist, lambda loss: loss[loss > 0], torch.Tensor.nonzero])
def test_a_step_that_reads_its_loss_is_seen(reads, monkeypatch, read):
    step = MokaTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        read(loss)
        return loss

    monkeypatch.setattr(MokaTrainer, "training_step", training_step)
    found = reads(2, adapter__method="lora")
    assert sum(count for (who, _), count in found.items() if who == "test") >= 5
