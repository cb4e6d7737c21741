"""What the processes of a run share, on a group of one."""

import weakref

import pytest
import torch.distributed as dist

from moka.training import processes


@pytest.fixture
def connected():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_leave_is_taken_of_every_connection(connected):
    """One that is still held when the interpreter ends may abort it, after a run that went well."""
    assert processes.everyones("here") == ["here"]
    assert processes.any_of(True)
    assert processes.of_main(lambda: 3) == 3
    held = weakref.ref(processes._group[1])
    assert held() is not None
    processes.disconnect(well=True)
    assert held() is None
    assert not processes.connected()
    assert not processes.any_of(False)
