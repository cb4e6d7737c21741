"""Functions common to the processes of a run, on a group of one."""

import weakref

import pytest
import torch.distributed as dist

from moka import distributed as processes


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_every_connection_is_closed(group):
    """One that is still kept when the interpreter ends may abort it, after a run that went well."""
    assert processes.all_gather_object("here") == ["here"]
    assert processes.all_reduce_any(True)
    assert processes.broadcast_from_main(lambda: 3) == 3
    kept = weakref.ref(processes._group[1])
    assert kept() is not None
    processes.disconnect(success=True)
    assert kept() is None
    assert not processes.is_distributed()
    assert not processes.all_reduce_any(False)
