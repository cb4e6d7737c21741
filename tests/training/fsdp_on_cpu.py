"""`moka` under FSDP2 on the CPU: a program to launch instead of `-m moka`.

accelerate turns FSDP into DDP on a CPU and is silent; torch's FSDP2 itself runs there. This puts accelerate on its
own way, which is that of a GPU, and changes nothing of ours.
"""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    from moka.cli.main import main

    sys.exit(main())
