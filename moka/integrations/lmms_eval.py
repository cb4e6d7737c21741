"""Runs of `moka train` as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), behind its entry point.

python -m lmms_eval --model moka --model_args pretrained=runs/mine --tasks mme --batch_size 8

AVE and MUSIC-AVQA are in ``lmms_eval_tasks``, for ``--include_path``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

import moka
from moka.data.media_io import has_sound
from moka.errors import MokaError
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.media import Waveform

_SOUND = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest("moka", simple_class_path="moka.integrations.lmms_eval.Moka")


class Moka(lmms):
    """A run, or an adapter folder.

    Args:
        pretrained: its folder.
        batch_size: questions at once.
        max_new_tokens: of an answer, if the task does not say.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_new_tokens: int | str = 64,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise MokaError(
                f"--model_args: unknown {', '.join(kwargs)}; allowed: pretrained, batch_size, max_new_tokens."
            )
        self.loaded = moka.load(pretrained, device=device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer the requests, in their order."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="moka", disable=self.rank != 0) as bar:
            for start in range(0, len(requests), self.batch_size):
                batch = [request.args for request in requests[start : start + self.batch_size]]
                settings = dict(batch[0][1])
                chats = [[{"role": "user", "content": self._content(one)}] for one in batch]
                found = self.loaded.generate_batch(
                    chats, max_new_tokens=int(settings.get("max_new_tokens", self.max_new_tokens))
                )
                until = settings.get("until") or []
                for one in found:
                    for stop in [until] if isinstance(until, str) else until:
                        one = one.split(stop)[0] if stop else one
                    answers.append(one)
                bar.update(len(batch))
        return answers

    def _content(self, request: tuple) -> list[dict[str, Any]]:
        context, _, doc_to_visual, doc_id, task, split = request
        media = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        parts = [part for medium in media for part in self._parts(medium)]
        return [*parts, {"type": "text", "text": context}]

    def _parts(self, medium: Any) -> list[dict[str, Any]]:
        """Return a medium as parts of a message: of a video its pictures, and its sound if the model hears."""
        part = _part(medium)
        specs = self.loaded.processor.modalities.values()
        hears = any(MEDIA_TYPE_IDS["audio"] in spec["type_ids"] for spec in specs)
        with_sound = part["type"] == "video" and hears and has_sound(medium)
        return [part, {"type": "audio", "audio": medium}] if with_sound else [part]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: these tasks are scored by generated answers here."""
        raise NotImplementedError(
            "moka: tasks that compare likelihoods are not supported; use one that generates answers."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: one question and one answer only."""
        raise NotImplementedError("moka: tasks of several rounds are not supported.")


def _part(medium: Any) -> dict[str, Any]:
    """Return a medium of lmms-eval as a part of a message."""
    if isinstance(medium, Image.Image):
        return {"type": "image", "image": medium}
    if isinstance(medium, dict) and "array" in medium:
        samples = np.asarray(medium["array"], np.float32)
        return {
            "type": "audio",
            "audio": Waveform(samples.mean(-1) if samples.ndim == 2 else samples, medium["sampling_rate"]),
        }
    if isinstance(medium, str):
        kind = "audio" if medium.lower().endswith(_SOUND) else "video"
        return {"type": kind, kind: medium}
    raise MokaError(f"a {type(medium).__name__} of lmms-eval is no picture, sound or video that moka knows.")
