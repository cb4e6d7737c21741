"""Two real processes under DistributedDataParallel: one has text only, the other media; gradients are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moka

ROOT = Path(moka.__file__).parents[1]
# What the two ranks have in each of two steps.
STEPS = [[["t q q t t"] * 2, ["t i i a q q t t"] * 2], [["i q i q t t"] * 3, ["t q t q t"]]]
SETTINGS = {"shared": {}, "own B": {"share_b": False, "interaction": "none"}, "visual only": {"adapt": ["visual"]}}
SETTINGS |= {"gate": {"method": "uni_mm_lora_gate"}, "gate, visual only": {"method": "loramoe", "adapt": ["visual"]}}


def loss_of(model, batch):
    logits = model(**batch.kwargs()).logits
    return logits.float().log_softmax(-1)[..., 7].mean()


def processes(rank, folder):
    """One of the two processes: writes its gradients for every setting."""
    import conftest
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, settings in SETTINGS.items():
        for checkpointing in (False, True):
            model = conftest.adapted(**settings).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # No search for unused parameters: each gets a gradient in every step on every rank.
            parallel = DistributedDataParallel(model)
            for layouts in STEPS:
                loss_of(parallel, conftest.rows(layouts[rank])).backward()
            torch.save(conftest.gradients(model), f"{folder}/{name}-{checkpointing}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's own end sometimes waits for a process that has left already


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_those_of_one_process(tiny, folder, name, checkpointing):
    model = tiny.adapted(**SETTINGS[name]).train()
    for layouts in STEPS:
        for own in layouts:
            (loss_of(model, tiny.rows(own)) / 2).backward()
    expected = tiny.gradients(model)
    assert len(expected) == (42 if "method" in SETTINGS[name] else 28)
    first, second = (torch.load(folder / f"{name}-{checkpointing}-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.equal(first[parameter], second[parameter])
        torch.testing.assert_close(first[parameter], gradient, atol=1e-6, rtol=1e-4, msg=parameter)


if __name__ == "__main__":
    processes(int(sys.argv[1]), sys.argv[2])
