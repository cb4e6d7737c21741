"""The backend that runs the model in a distributed run: none, DDP, DeepSpeed or FSDP.

Under DeepSpeed's ZeRO-3 each process has a part of every parameter, and outside a forward a parameter is empty; what reads
parameters elsewhere does so inside ``moka.modeling.sharding.gathered``, on all processes.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from moka.distributed import all_gather_object, broadcast_from_main, run_on_main
from moka.errors import MokaError, counted
from moka.modeling.sharding import is_sharded, is_sharded_tensor, zero_settings, zero_stage

UNIVERSAL = ".universal."  # prefix of a temporary folder next to the checkpoints


def describe(trainer: Any) -> dict[str, Any]:
    """Describe how a ``Trainer`` whose training has begun (or an ``Accelerator``) runs its model.

    Returns:
        "processes"; "distributed_type": NO, MULTI_CPU, MULTI_GPU, DEEPSPEED or FSDP; "wrapper": class of the wrapped
        model (None for an ``Accelerator``); "zero_stage" and "offload" (which of "optimizer" and "parameters"), both None
        without DeepSpeed.
    """
    accelerator = getattr(trainer, "accelerator", trainer)
    wrapped = getattr(trainer, "model_wrapped", None)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero = zero_settings(plugin)
    parts = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
    offloaded = [part for part, key in parts.items() if (zero.get(key) or {}).get("device") not in (None, "none")]
    return {
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "wrapper": None if wrapped is None else type(wrapped).__name__,
        "zero_stage": None if plugin is None else int(zero.get("stage", 0)),
        "offload": None if plugin is None else offloaded,
    }


def in_words(backend: dict[str, Any]) -> str:
    """Return what ``describe`` returned as "DEEPSPEED ZeRO-3 (offload: optimizer), 2 processes, DeepSpeedEngine"."""
    if backend["distributed_type"] == "NO":
        return f"one process, {backend['wrapper']}"
    kind = backend["distributed_type"]
    if backend["zero_stage"] is not None:
        kind += f" ZeRO-{backend['zero_stage']}"
    if backend["offload"]:
        kind += f" (offload: {', '.join(backend['offload'])})"
    return f"{kind}, {counted(backend['processes'], 'process', 'processes')}, {backend['wrapper']}"


class BackendNote(TrainerCallback):
    """Prints at the start of a stage how its model is run, and stores it in ``backends`` under the stage's number."""

    def __init__(self, trainer: Any, stage: int, backends: dict[int, dict[str, Any]]) -> None:
        self.trainer, self.stage, self.backends = trainer, stage, backends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.backends[self.stage] = describe(self.trainer)
        if state.is_world_process_zero:
            print(f"stage {self.stage}: {in_words(self.backends[self.stage])}")


def use_deepspeed(arguments: TrainingArguments, name: str) -> None:
    """Do what DeepSpeed needs between the arguments of a stage and its model; nothing without DeepSpeed.

    Args:
        name: of the section, for messages.
    Raises:
        MokaError: DeepSpeed was asked for and would not run, or its file contradicts the section.
    """
    if arguments.deepspeed_plugin is None:
        return
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise MokaError(
            f"{name}: DeepSpeed is asked for, and ACCELERATE_USE_CPU in the environment would turn it off silently. Unset "
            "it; without a GPU the run is on the CPU anyway."
        )
    if arguments.deepspeed is not None:
        # Replace "auto" in the file, as transformers does, again: accumulation follows from the number of processes, which
        # is known later than the file is read.
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        arguments.hf_deepspeed_config = HfTrainerDeepSpeedConfig(arguments.deepspeed)
        arguments.hf_deepspeed_config.trainer_config_process(arguments)
        arguments.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=arguments.hf_deepspeed_config)
        differ = arguments.hf_deepspeed_config.mismatches
        if differ:
            raise MokaError(
                f"{name}.deepspeed: the file and {name} differ ({'; '.join(d.removeprefix('- ds ') for d in differ)}). "
                'Write "auto" in the file: the values then come from the section.'
            )
    _recompute_safely(arguments, name)
    if arguments.device.type == "cpu":
        import deepspeed
        import deepspeed.ops

        # Its shared-memory collectives would be compiled first; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # transformers has connected the processes only through torch, and DeepSpeed would partition among one.
        deepspeed.init_distributed(dist_backend="gloo")


def _recompute_safely(arguments: TrainingArguments, name: str) -> None:
    """Make checkpointing reentrant under ZeRO-3 if this DeepSpeed needs it.

    Non-reentrant checkpointing of an adapted model ends in an error if DeepSpeed does not account for frozen parameters that
    are gathered in a recomputation (transformers#47254, DeepSpeed#8148).
    """
    keys = [key for key in ("activation_checkpointing", "gradient_checkpointing") if hasattr(arguments, key)]
    settings = getattr(arguments, f"{keys[0]}_kwargs") or {}
    if zero_stage(arguments) < 3 or not getattr(arguments, keys[0]) or settings.get("use_reentrant"):
        return
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    if not hasattr(coordinator, "update_recompute_parameters"):
        setattr(arguments, f"{keys[0]}_kwargs", {**settings, "use_reentrant": True})
        if arguments.process_index == 0:
            print(f"note: {name}: checkpointing is reentrant, as this DeepSpeed's ZeRO-3 needs it. Upgrade deepspeed.")


def forget_engine(arguments: TrainingArguments) -> None:
    """Reset accelerate before the trainer of a stage is made: it keeps the engine and the precision of the stage before.

    With them the processes would be forgotten too, which are the same in all stages (``reset_partial_state``).
    """
    known = AcceleratorState._shared_state  # empty before the first trainer
    changed = bool(known) and AcceleratorState().mixed_precision != arguments.mixed_precision
    if changed or arguments.deepspeed_plugin is not None:
        AcceleratorState._reset_state()


def move_unsharded(model: Any, device: torch.device) -> None:
    """Move to the device what ZeRO-3 has not partitioned: DeepSpeed moves such parameters later, and buffers never."""
    if is_sharded(model):
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_sharded_tensor(tensor):
                tensor.data = tensor.data.to(device)


def load_checkpoint(engine: Any, checkpoint: Path, processes: int) -> None:
    """Load a DeepSpeed checkpoint into its engine; of another number of processes through DeepSpeed's universal form.

    Raises:
        MokaError: another number of processes wrote it, and it has no universal form (optimizers other than Adam).
    """
    wrote = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if wrote in (0, processes):
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=False)
        return
    universal = broadcast_from_main(lambda: tempfile.mkdtemp(prefix=UNIVERSAL, suffix=".tmp", dir=checkpoint.parent))
    run_on_main(lambda: _convert(checkpoint, Path(universal), wrote, processes))
    engine._config.load_universal_checkpoint = True
    try:
        deepspeed_load_checkpoint(engine, universal, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    all_gather_object(None)  # all have read it
    run_on_main(lambda: shutil.rmtree(universal, ignore_errors=True))


def _convert(checkpoint: Path, universal: Path, wrote: int, processes: int) -> None:
    """Write the universal form of ``checkpoint``: every parameter and its two moments, as full tensors."""
    from deepspeed.checkpoint import ds_to_universal

    print(f"note: {checkpoint} was written with world size {wrote}; it is converted for {processes}.")
    source = next(checkpoint.glob("global_step*"))
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(source), "output_folder": str(universal / source.name)}
    try:
        with redirect_stdout(io.StringIO()):
            ds_to_universal.main(Namespace(**folders, inject_missing_state=True, **settings))
    except (AssertionError, AttributeError, KeyError, ValueError) as error:
        shutil.rmtree(universal, ignore_errors=True)
        raise MokaError(
            f"{checkpoint} was written with world size {wrote}, and DeepSpeed cannot convert it for {processes} ({error!r}; "
            f"it knows only Adam's states). Launch with world size {wrote}, or start a new run with model.connectors."
        ) from error
