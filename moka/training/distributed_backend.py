"""What wraps the model in a distributed run: nothing, DDP, DeepSpeed or FSDP.

Under DeepSpeed's ZeRO-3 each process holds a part of every parameter, and outside a forward a parameter is empty; what
reads parameters elsewhere does so inside ``moka.modeling.sharding.gathered``, on all processes.
"""

from __future__ import annotations

import functools
import io
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from moka.distributed import all_gather_object, run_on_main
from moka.errors import MokaError, counted
from moka.modeling.sharding import is_sharded, is_sharded_tensor, zero_settings, zero_stage


def describe(trainer: Any) -> dict[str, Any]:
    """How a ``Trainer`` whose training has begun (or an ``Accelerator``) runs its model.

    Returns:
        "processes"; "distributed_type": NO, MULTI_CPU, MULTI_GPU, DEEPSPEED or FSDP; "wrapper": class of the wrapped
        model (None for an ``Accelerator``); "zero_stage" and "offload" (of "optimizer" and "parameters", which are),
        both None without DeepSpeed.
    """
    accelerator = getattr(trainer, "accelerator", trainer)
    wrapped = getattr(trainer, "model_wrapped", None)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero = zero_settings(plugin)
    return {
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "wrapper": None if wrapped is None else type(wrapped).__name__,
        "zero_stage": None if plugin is None else int(zero.get("stage", 0)),
        "offload": None if plugin is None else _offloaded(zero),
    }


def in_words(engine: dict[str, Any]) -> str:
    """What ``describe`` returned as "DEEPSPEED ZeRO-3 (offload: optimizer), 2 processes, DeepSpeedEngine"."""
    if engine["distributed_type"] == "NO":
        return f"one process, {engine['wrapper']}"
    kind = engine["distributed_type"]
    if engine["zero_stage"] is not None:
        kind += f" ZeRO-{engine['zero_stage']}"
    if engine["offload"]:
        kind += f" (offload: {', '.join(engine['offload'])})"
    return f"{kind}, {counted(engine['processes'], 'process', 'processes')}, {engine['wrapper']}"


def use_deepspeed(arguments: TrainingArguments, name: str) -> None:
    """What DeepSpeed needs between the arguments of a stage and its model; without DeepSpeed nothing happens.

    Args:
        name: of the section, for messages.
    Raises:
        MokaError: DeepSpeed was asked for and would not run, or its file contradicts the section.
    """
    if arguments.deepspeed_plugin is None:
        return
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise MokaError(
            f"{name}: DeepSpeed is asked for, and ACCELERATE_USE_CPU in the environment would turn it off without a word. "
            "Unset it; without a GPU the run is on the CPU anyway."
        )
    if arguments.deepspeed is not None:
        # Accumulation follows from the number of processes, which is known later than the file is read.
        _fill(arguments)
        _check_sizes(arguments, name)
    _recompute_safely(arguments, name)
    if arguments.device.type == "cpu":
        import deepspeed
        import deepspeed.ops

        # Its shared-memory collectives would be compiled first; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # transformers has connected the processes through torch alone, and DeepSpeed would partition among one.
        deepspeed.init_distributed(dist_backend="gloo")


def _recompute_safely(arguments: TrainingArguments, name: str) -> None:
    """Non-reentrant checkpointing of an adapted model under ZeRO-3 ends in an error where DeepSpeed does not account for
    frozen parameters gathered in a recomputation (transformers#47254, DeepSpeed#8148).
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


def _fill(arguments: TrainingArguments) -> None:
    """Put the arguments' values in the place of "auto" in DeepSpeed's configuration, as transformers does."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments.hf_deepspeed_config = HfTrainerDeepSpeedConfig(arguments.deepspeed)
    arguments.hf_deepspeed_config.trainer_config_process(arguments)
    arguments.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=arguments.hf_deepspeed_config)


def _check_sizes(arguments: TrainingArguments, name: str) -> None:
    differ = arguments.hf_deepspeed_config.mismatches
    if differ:
        raise MokaError(
            f"{name}.deepspeed: the file and {name} differ ({'; '.join(d.removeprefix('- ds ') for d in differ)}). Write "
            '"auto" in the file: the values then come from the section.'
        )


def forget_engine(arguments: TrainingArguments) -> None:
    """Before the trainer of a stage is made: accelerate keeps the engine of the stage before, and takes no second."""
    if arguments.deepspeed_plugin is not None:
        AcceleratorState._reset_state()


def place(model: Any, device: torch.device) -> None:
    """Move what ZeRO-3 has not partitioned yet: DeepSpeed takes parameters along later, and leaves buffers where they are."""
    if is_sharded(model):
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_sharded_tensor(tensor):
                tensor.data = tensor.data.to(device)


def leave_frozen_out(engine: Any) -> None:
    """Keep the frozen backbone out of a DeepSpeed engine's checkpoints; transformers does so for adapters alone."""
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def load_checkpoint(engine: Any, checkpoint: Path, processes: int) -> None:
    """Load a DeepSpeed checkpoint into its engine; one of another number of processes by way of DeepSpeed's universal form.

    Raises:
        MokaError: another number of processes wrote it, and it has no universal form (optimizers other than Adam).
    """
    wrote = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if wrote in (0, processes):
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=False)
        return
    universal = checkpoint.with_name("universal")
    run_on_main(lambda: _convert(checkpoint, universal, wrote, processes))
    engine._config.load_universal_checkpoint = True
    try:
        deepspeed_load_checkpoint(engine, str(universal), load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    all_gather_object(None)  # have read it
    run_on_main(lambda: shutil.rmtree(universal, ignore_errors=True))


def _convert(checkpoint: Path, universal: Path, wrote: int, processes: int) -> None:
    """Write the universal form of ``checkpoint``: every parameter and its two moments, whole."""
    from deepspeed.checkpoint import ds_to_universal

    print(f"note: {checkpoint} was written with world size {wrote}; it is converted for {processes}.")
    shutil.rmtree(universal, ignore_errors=True)
    source = next(checkpoint.glob("global_step*"))
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    try:
        with redirect_stdout(io.StringIO()):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(source),
                    output_folder=str(universal / source.name),
                    inject_missing_state=True,
                    **settings,
                )
            )
    except (AssertionError, AttributeError, KeyError, ValueError) as error:
        shutil.rmtree(universal, ignore_errors=True)
        raise MokaError(
            f"{checkpoint} was written with world size {wrote}, and DeepSpeed cannot convert it for {processes} ({error!r}; "
            f"it knows Adam's states alone). Launch with world size {wrote}, or start a new run with model.connectors."
        ) from error


def _offloaded(zero: dict[str, Any]) -> list[str]:
    parts = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
    return [part for part, key in parts.items() if (zero.get(key) or {}).get("device") not in (None, "none")]


class EngineNote(TrainerCallback):
    """Says at the start of a stage what runs it, and keeps it in ``engines`` under the stage's number."""

    def __init__(self, trainer: Any, stage: int, engines: dict[int, dict[str, Any]]) -> None:
        self.trainer, self.stage, self.engines = trainer, stage, engines

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engines[self.stage] = describe(self.trainer)
        if state.is_world_process_zero:
            print(f"stage {self.stage}: {in_words(self.engines[self.stage])}")
