"""AVE and MUSIC-AVQA as tasks of lmms-eval, read from the published folders and scored as `moka score` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask

from moka.data.schema import media_parts
from moka.data.sources import open_samples
from moka.errors import MokaError
from moka.evaluation.answers import unanswered
from moka.evaluation.benchmarks import score


class FolderTask(ConfigurableTask):
    """A task whose documents are the test split of a format of moka; a variable of the environment names the folder.

    Args:
        config: of the YAML file.
    """

    format: ClassVar[str]
    root_variable: ClassVar[str]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: Any = None) -> None:
        """Read the documents; nothing is downloaded.

        Raises:
            MokaError: the variable is not set, or the folder or one of its videos is not there.
        """
        root = os.environ.get(self.root_variable)
        if not root:
            raise MokaError(f"task {self.format}: set {self.root_variable} to the folder of the published data.")
        samples = open_samples(
            {"format": self.format, "root": str(Path(root).absolute())}, "test", require_answer=False
        )
        if missing := samples.missing_media(limit=1):
            raise MokaError(f"task {self.format}: {'; '.join(missing)}")
        documents = [_document(samples[index]) for index in range(len(samples))]
        self.dataset = self.dataset_no_image = DatasetDict({"test": Dataset.from_list(documents)})


class Ave(FolderTask):
    format, root_variable = "ave", "AVE_ROOT"


class MusicAvqa(FolderTask):
    format, root_variable = "music-avqa", "MUSIC_AVQA_ROOT"


def _document(sample: dict[str, Any]) -> dict[str, Any]:
    record = unanswered(sample)
    # Pictures and sound of a sample are one file, which is named once.
    return {**record, "video": next(str(medium) for _, medium in media_parts(sample))}


def videos(document: dict[str, Any]) -> list[str]:
    """Return the file of the video, with its sound."""
    return [document["video"]]


def ave_results(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return the record that `ave_accuracy` takes."""
    return {"segment_accuracy": {**_scored(document), "prediction": results[0]}}


def music_avqa_results(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return the record that `music_avqa_accuracy` takes."""
    return {"accuracy": {**_scored(document), "prediction": results[0]}}


def _scored(document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("id", "reference", "category") if key in document}


def ave_accuracy(records: list[dict[str, Any]]) -> float:
    """Return the accuracy over one-second segments, in percent; an answer that cannot be read is wrong."""
    return _figure("ave", records)


def music_avqa_accuracy(records: list[dict[str, Any]]) -> float:
    """Return the accuracy over all questions, in percent; an answer that cannot be read is wrong."""
    return _figure("music-avqa", records)


def _figure(name: str, records: list[dict[str, Any]]) -> float:
    (figure,) = score(name, records, "paper")["overall"]["figures"].values()
    return figure["all"]["value"]
