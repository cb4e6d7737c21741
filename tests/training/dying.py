"""`moka` that is signalled, or gets a full disk, at a given place: python dying.py PLACE,STAGE,STEP,RANK,TARGET,SIGNAL train CONFIG ...

PLACE is a method of the trainer: the signal comes when it has returned, at the first call after STEP steps of STAGE on
process RANK. TARGET is "self", "launcher" for the process that started this one, or "group" for this one and all that it
started. With "disk" no signal comes: from there on the process can write no file of more than SIGNAL bytes.
"""

import functools
import os
import resource
import signal
import sys

from moka.cli.main import main
from moka.training.trainer import MokaTrainer


def plan(place, stage, step, rank, target, name):
    full = getattr(MokaTrainer, place)
    done = []

    @functools.wraps(full)
    def signalled(self, *args, **kwargs):
        result = full(self, *args, **kwargs)
        here = f"stage{stage}" in self.args.output_dir and self.state.global_step == int(step)
        if here and os.environ.get("RANK", "0") == rank and not done:
            done.append(True)
            if target == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(name), resource.RLIM_INFINITY))
                return result
            number = getattr(signal, name)
            if target == "group":
                os.killpg(0, number)
            else:
                os.kill(os.getpid() if target == "self" else os.getppid(), number)
        return result

    if target == "group":
        os.setpgrp()  # the tests are no part of it
    setattr(MokaTrainer, place, signalled)


if __name__ == "__main__":
    plan(*sys.argv.pop(1).split(","))
    sys.exit(main())
