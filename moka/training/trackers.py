"""Where the logged numbers go beside RUN/metrics.jsonl: ``report_to`` as in transformers, and RUN/tensorboard."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
    is_tensorboard_available,
)

from moka.errors import MokaError, nearest

from .run_dir import RunFolder

_PIP_NAMES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}


def check_reports(report_to: Any, where: str) -> None:
    """Refuse a service that is unknown or whose library is missing, before training.

    Raises:
        MokaError: naming it, and the command that installs it.
    """
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in report_to if isinstance(report_to, list) else [report_to or "none"]:
        if name not in known:
            raise MokaError(f"{where}: {name!r} is not one of {', '.join(known)}.{nearest(str(name), known)}")
        if name not in ("all", "none", *get_available_reporting_integrations()):
            raise MokaError(
                f"{where}: {name} is not installed. Install it with `pip install {_PIP_NAMES.get(name, name)}`, or set "
                "report_to: none."
            )


def place_tensorboard(trainer: Any, folder: RunFolder, stage: int, step: int, chosen: Any) -> None:
    """TensorBoard's files into RUN/tensorboard/stageN: where ``report_to`` names it, or says nothing and it is there.

    Args:
        step: the stage goes on from it; what an earlier process wrote after it is hidden.
        chosen: ``report_to`` of the configuration, None where it has none.
    """
    arguments: TrainingArguments = trainer.args
    named = "tensorboard" in (arguments.report_to or [])
    trainer.remove_callback(TensorBoardCallback)  # transformers' own writes into the checkpoints
    if arguments.process_index or not (named or (chosen is None and is_tensorboard_available())):
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / f"tensorboard/stage{stage}"), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))
