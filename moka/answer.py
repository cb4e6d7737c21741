"""One answer of a loaded model, text by text as it is computed, with a limit of time and the number of tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from moka.errors import MokaError
from moka.inference import LoadedModel


class _Ending(StoppingCriteria):
    """Ends an answer when nobody waits for it, at a stop text, or when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.asked = threading.Event()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = self.asked.is_set() or self.late
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)


@dataclass
class Answer:
    """One answer as it is computed: iterate over its texts, then read the numbers.

    Args:
        chat: messages of ``moka.data.schema``; the last is the user's.
        most: tokens of the longest answer.
        seconds: from the start of an answer to its end.
        stops: texts that end an answer; none is part of it.
        seed: of sampling.
        options: for ``generate`` of transformers; default: greedy.
        name: what errors call the chat.
    """

    loaded: LoadedModel
    chat: list[dict[str, Any]]
    most: int
    seconds: float
    stops: Sequence[str] = ()
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "the question"
    prompt_tokens: int = 0
    new_tokens: int = 0
    reason: str = "stop"
    ending: _Ending = field(init=False)

    def __post_init__(self) -> None:
        self.ending = _Ending(self.seconds)

    def texts(self) -> Generator[str, None, None]:
        """Yield the answer's text in parts, as soon as they are sure.

        Raises:
            MokaError: a medium that cannot be read, a chat that is too long, or an answer that takes too long.
        """
        batch = self.loaded.encode([self.chat], self.most, [self.name])
        self.prompt_tokens = int(batch["input_ids"].shape[1])
        tokenizer: Any = self.loaded.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        result: list[Any] = []

        def run() -> None:
            try:
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                criteria = StoppingCriteriaList([self.ending])
                options = {"streamer": streamer, "stopping_criteria": criteria, **self.options}
                result.append(self.loaded.generate_tokens(batch, self.most, **options))
            except Exception as error:  # raised again in the thread that reads
                result.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from _until_stop(streamer, self.stops, self.ending)
        finally:
            self.ending.asked.set()
            thread.join()
        if isinstance(result[0], Exception):
            raise result[0]
        self.new_tokens = int(result[0].shape[1])
        if self.ending.late:
            raise MokaError(f"The answer took longer than {self.seconds:g} s. Ask for a shorter one.")
        ends = self.loaded.model.generation_config.eos_token_id
        last = int(result[0][0, -1]) if self.new_tokens else None
        if self.new_tokens >= self.most and last not in (ends if isinstance(ends, list) else [ends]):
            self.reason = "length"


def _until_stop(texts: Iterator[str], stops: Sequence[str], ending: _Ending) -> Iterator[str]:
    """Yield ``texts`` up to the first stop text, without white space around the whole, as ``processor.decode`` returns it."""
    kept, begun = "", False
    longest = max(map(len, stops), default=1) - 1
    for text in texts:
        kept += text
        if not begun:
            kept = kept.lstrip()
        found = min((place for stop in stops if (place := kept.find(stop)) >= 0), default=None)
        if found is not None:
            ending.asked.set()
            kept = kept[:found]
            break
        sure = kept[: max(len(kept) - longest, 0)].rstrip()
        if sure:
            begun, kept = True, kept[len(sure) :]
            yield sure
    if kept.rstrip():
        yield kept.rstrip()
