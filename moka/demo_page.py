"""A page in the browser to ask a trained run, built with Gradio: a chat with pictures, sound and video, answers with and
without each modality side by side, and the interaction over a picture.

    question, media -> ask      -> chat, streamed; tokens and seconds
                    -> compare  -> a table: all modalities, without each of them, text only
                    -> maps     -> the picture under the weights of words of the question

One answer is computed at a time; others wait. Only files that were uploaded are read.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moka.answer import Answer
from moka.data.schema import media_parts
from moka.diagnosis.examples import NO_GRID, interaction_words, sound_file
from moka.errors import MokaError, counted
from moka.evaluation.answers import before_answer, words
from moka.inference import LoadedModel
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.media import AudioFeatures, Waveform

# Before Gradio is imported: it reads this once.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError as error:
    raise MokaError('moka demo needs Gradio: pip install "moka-peft[page]".') from error

EXAMPLES = 8
LABELS = {"image": "picture", "audio": "sound", "video": "video"}
COLUMNS = ["asked with", "answer", "tokens of the prompt", "tokens of the answer", "seconds"]
# The system's own fonts: nothing is fetched from another host.
FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

Chat = list[dict[str, Any]]


def media_kinds(loaded: LoadedModel) -> list[str]:
    """Return the kinds of media that a model reads, of "image", "audio" and "video"."""
    taken = {type_id for spec in loaded.processor.modalities.values() for type_id in spec["type_ids"]}
    return [kind for kind in LABELS if MEDIA_TYPE_IDS[kind] in taken]


def build_page(
    loaded: LoadedModel,
    title: str = "moka",
    examples: Sequence[Sequence[Any]] = (),
    max_new_tokens: int = 64,
    seconds: float = 120.0,
) -> gr.Blocks:
    """Return the page.

    Args:
        examples: rows of `write_examples`.
        max_new_tokens: of the longest answer.
        seconds: that an answer may take.
    """
    kinds = media_kinds(loaded)
    asking = Asking(loaded, kinds, max_new_tokens, seconds)
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        chat = gr.State([])
        with gr.Row():
            with gr.Column():
                media = [_medium(kind) for kind in kinds]
                use = gr.CheckboxGroup(
                    [(LABELS[kind], kind) for kind in kinds],
                    value=kinds,
                    label="Answer with",
                    info="What is off is left out of all turns.",
                    elem_id="use",
                )
            with gr.Column():
                shown = gr.Chatbot(label="Chat", height=360, render_markdown=False, elem_id="chat")
                question = gr.Textbox(label="Question", placeholder="Ask something", elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                    clear = gr.Button("New chat", elem_id="clear")
                counts = gr.Markdown(elem_id="counts")
        with gr.Row():
            compare = gr.Button("Compare: with and without each modality", elem_id="compare")
            maps = gr.Button("Show what the picture reads from the question", elem_id="maps", visible="image" in kinds)
        table = gr.Dataframe(headers=COLUMNS, interactive=False, wrap=True, label="Compared", elem_id="compared")
        pictures = gr.HTML(elem_id="pictures")
        if examples:
            rows = gr.Examples([list(row) for row in examples], [*media, question], label="From the run's test data")
            rows.dataset.click(lambda: ([], [], ""), None, [shown, chat, counts], api_visibility="private")

        given = [question, use, chat, *media]
        asked = [
            gr.on(
                [ask.click, question.submit],
                asking.ask,
                given,
                [shown, chat, counts, question],
                api_name="ask",
                show_progress_on=counts,
                **one_at_a_time,
            )
        ]
        asked += [compare.click(asking.compare, given, table, api_name="compare", **one_at_a_time)]
        asked += [maps.click(asking.maps, given, pictures, api_name="maps", **one_at_a_time)]
        shown.clear(lambda: ([], ""), None, [chat, counts], api_visibility="private")
        stop.click(None, cancels=asked, api_visibility="private")
        clear.click(
            lambda: ([], [], "", None, ""), None, [shown, chat, counts, table, pictures], api_visibility="private"
        )
    return page


def _medium(kind: str) -> Any:
    """Return the input for a medium; its value is the path of the uploaded file, as it is."""
    label = LABELS[kind].capitalize()
    if kind == "audio":
        return gr.Audio(sources=["upload", "microphone"], type="filepath", label=label, elem_id=kind)
    if kind == "video":
        return gr.Video(sources=["upload", "webcam"], label=label, height=240, elem_id=kind)
    picture = gr.Image(sources=["upload", "webcam"], type="filepath", label=label, height=240, elem_id=kind)
    # Gradio would open the file itself, and answer a file that is no picture with a traceback.
    setattr(picture, "preprocess", lambda payload: payload and payload.path)  # noqa: B010
    return picture


class Asking:
    """The actions of the page. Each takes question, kinds of media in use, chat so far, and a path or None of each kind."""

    def __init__(self, loaded: LoadedModel, kinds: list[str], max_new_tokens: int, seconds: float) -> None:
        self.loaded, self.kinds, self.most, self.seconds = loaded, kinds, max_new_tokens, seconds

    def ask(self, question: str, use: list[str], chat: Chat, *media: str | None) -> Iterator[tuple]:
        """Yield what the page shows, the chat, the counts and the next question, as the answer grows."""
        chat = self._extended(question, chat, media)
        answer, text, begun = self._answer(_only(chat, use)), "", time.perf_counter()
        texts = answer.texts()
        with _told(chat):
            for part in texts:
                text += part
                yield _shown(chat, text), chat, "", question
        done = [*chat, {"role": "assistant", "content": [{"type": "text", "text": text or " "}]}]
        yield _shown(chat, text), done, _counts(answer, time.perf_counter() - begun), ""

    def compare(self, question: str, use: list[str], chat: Chat, *media: str | None) -> list[list[Any]]:
        """Return a row of `COLUMNS` for all modalities, for each of them left out, and for none."""
        chat = self._last(question, chat, media)
        present = [k for k in self.kinds if any(k == kind for kind, _ in media_parts({"messages": _only(chat, use)}))]
        with _told(chat):
            return [self._row(name, _only(chat, kept)) for name, kept in coalitions(present)]

    def _row(self, name: str, chat: Chat) -> list[Any]:
        answer, begun = self._answer(chat), time.perf_counter()
        text = "".join(answer.texts())
        return [name, text, answer.prompt_tokens, answer.new_tokens, round(time.perf_counter() - begun, 2)]

    def maps(self, question: str, use: list[str], chat: Chat, *media: str | None) -> str:
        """Return the picture of the last question under the weights of some of its words, as HTML."""
        chat = self._last(question, chat, media)
        with _told(chat):
            paths = [medium for kind, medium in media_parts({"messages": _only(chat, use)}) if kind == "image"]
            if len(paths) != 1:
                raise MokaError(f"Interaction: {counted(len(paths), 'picture')} in use; exactly one is expected.")
            batch = self.loaded.encode([_only(chat, use)], self.most)
            picture = self.loaded.decoding.decode("image", paths[0])
            decode = self.loaded.processor.tokenizer.decode
            found = interaction_words(self.loaded.model, batch, picture, decode)
            if not found:
                raise MokaError(f"Interaction: {NO_GRID if found is None else 'the question has no words'}.")
        figures = "".join(
            f'<figure style="display:inline-block;margin:4px"><img src="{one["uri"]}" alt="map">'
            f"<figcaption>{html.escape(one['word'])} ({one['low']:.3f} to {one['high']:.3f})</figcaption></figure>"
            for one in found
        )
        return f"<p>Weight of a word for each part of the picture, the mean over layers; yellow is high.</p>{figures}"

    def _answer(self, chat: Chat) -> Answer:
        return Answer(self.loaded, chat, self.most, self.seconds)

    def _extended(self, question: str, chat: Chat, media: Sequence[str | None]) -> Chat:
        """Return the chat with one more question; a medium is part of the turn that it was new in."""
        if not question.strip():
            raise _error("The question is empty; write one.", chat)
        known = [medium for _, medium in media_parts({"messages": chat})]
        parts = [
            {"type": kind, kind: path}
            for kind, path in zip(self.kinds, media, strict=True)
            if path is not None and path not in known
        ]
        return [*chat, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

    def _last(self, question: str, chat: Chat, media: Sequence[str | None]) -> Chat:
        """Return the chat up to the question that is written, or else up to the last that was answered."""
        if not question.strip() and chat:
            return before_answer(chat)
        return self._extended(question, chat, media)


def coalitions(kinds: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return name and kinds of media of each row of a comparison: all, each left out, and none."""
    rows = [("everything", list(kinds))] if kinds else []
    if len(kinds) > 1:
        rows += [(f"without {LABELS[kind]}", [k for k in kinds if k != kind]) for kind in kinds]
    return [*rows, ("text only", [])]


def _only(chat: Chat, kinds: Sequence[str]) -> Chat:
    """Return the chat with media of these kinds only."""
    kept = ("text", *kinds)
    return [{**m, "content": [part for part in m["content"] if part["type"] in kept]} for m in chat]


def _shown(chat: Chat, answer: str) -> list[dict[str, Any]]:
    """Return a chat as Gradio shows it."""
    found = []
    for message in chat:
        named = [f"[{LABELS[part['type']]}]" for part in message["content"] if part["type"] != "text"]
        found.append({"role": message["role"], "content": " ".join([*named, words([message])])})
    return [*found, {"role": "assistant", "content": answer}]


def _counts(answer: Answer, seconds: float) -> str:
    cut = ", cut at its longest" if answer.reason == "length" else ""
    new = counted(answer.new_tokens, "token")
    return f"prompt {counted(answer.prompt_tokens, 'token')}, answer {new}{cut}, {seconds:.2f} s"


class _told:
    """Show a mistake as one line in the page, without a traceback."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, MokaError):
            raise _error(str(error), self.chat) from None


def _error(message: str, chat: Chat) -> gr.Error:
    """Return an error for the page; files go by their names, not by their folders here."""
    for _, medium in media_parts({"messages": chat}):
        message = message.replace(str(medium), Path(medium).name)
    return gr.Error(html.escape(" ".join(message.split()), quote=False), print_exception=False)


def write_examples(
    loaded: LoadedModel, samples: Any, folder: str | Path, most: int = EXAMPLES
) -> list[list[str | None]]:
    """Write the media of the first questions into files; those with several media of a kind are left out.

    Returns:
        rows of the path or None of each of `media_kinds`, and the question.
    """
    kinds = media_kinds(loaded)
    rows: list[list[str | None]] = []
    for number in range(len(samples)):
        if len(rows) == most:
            break
        messages = before_answer(samples[number]["messages"])
        media = list(media_parts({"messages": messages}))
        if len({kind for kind, _ in media}) < len(media) or len(messages) > 1:
            continue
        files = {kind: _file(medium, Path(folder) / f"{number}") for kind, medium in media}
        if None not in files.values():
            rows.append([*(files.get(kind) for kind in kinds), words(messages)])
    return rows


def _file(medium: Any, stem: Path) -> str | None:
    """Return a file with a medium: its own if it has one; None for what a page cannot take."""
    if isinstance(medium, str):
        return medium
    if isinstance(medium, Image.Image):
        path = stem.with_suffix(".png")
        medium.save(path)
    elif isinstance(medium, AudioFeatures):
        path = stem.with_suffix(".npy")
        np.save(path, medium.values)
    elif isinstance(medium, Waveform):
        path = stem.with_suffix(".wav")
        path.write_bytes(sound_file(medium))
    else:
        return None
    return str(path)
