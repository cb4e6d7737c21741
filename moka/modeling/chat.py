"""From chat messages to segments with known roles, through any Jinja chat template.

The template is rendered with a mark instead of every content part, and the text between the marks is the
template's own scaffold. So each token's role is known by construction: nothing is found again by comparing strings,
and what a user types can neither imitate a placeholder nor a special token.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moka.errors import MokaError, nearest

from .configuration import MEDIA_TYPE_IDS

# Private-use characters: they survive a template's `trim` and stand in no real text of a template.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")

# A chat template comes with a checkpoint, and is a program.
MAX_TEMPLATE_SECONDS = 10.0
MAX_TEMPLATE_BYTES = 1 << 30
_TICK_S = 0.05

TEMPLATES = {
    # ChatML without the default system prompt that some models add: short prompts for small machines.
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Nothing but the contents and the token that ends each: the shortest prompt there is.
    "bare": "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}",
    # For base models that ship no template.
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Answer: ' + message['content'] + (eos_token or '') + '\n' }}{% else %}{{ message['content'] + '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    ),
}


@dataclass(frozen=True)
class Segment:
    """A run of the prompt of one kind.

    ``role``: "template" (scaffold), or the role of the message; ``turn``: number of the user turn it belongs to, from 1
    (0: before the first); ``medium``: "image", "video" or "audio" and its decoded ``value``, else None and ``text``.
    """

    role: str
    turn: int
    text: str = ""
    medium: str | None = None
    value: object = None


def segments(messages: list[dict], tokenizer, template: str | None, add_generation_prompt: bool) -> list[Segment]:
    """Render ``messages`` (content: text or typed parts) with the tokenizer's or the given template.

    With ``add_generation_prompt`` the segments end where the text of the next answer begins.

    Raises:
        MokaError: a part without its medium, an unknown part type, or a template that refuses the messages.
    """
    _check_messages(messages)
    # What is before an answer is rendered with an answer in its place: the template's own generation prompt is
    # often shorter (a space, an empty thought), and what it leaves out would be in training and not in inference.
    opens_answer = add_generation_prompt and messages[-1]["role"] != "assistant"
    if opens_answer:
        messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
    parts: list[Segment] = []
    marked = []
    turn, answered = 0, True
    for message in messages:
        role = message["role"]
        if role == "user" and answered:
            turn, answered = turn + 1, False
        answered = answered or role == "assistant"
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        marks = ""
        for part in content:
            marks += f"{_OPEN}{len(parts)}{_CLOSE}"
            parts.append(_segment(part, role, turn))
        marked.append({"role": role, "content": marks})
    try:
        with _limits():
            rendered = tokenizer.apply_chat_template(
                marked,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not opens_answer,
                chat_template=template,
            )
    except Exception as error:  # a template is a program: it divides by zero, recurses, or raises on purpose
        raise MokaError(
            f"The chat template refuses these messages: {str(error) or type(error).__name__}. Choose another with the template "
            f"setting: {', '.join(TEMPLATES)}, or Jinja text."
        ) from error
    pieces = _MARK.split(rendered)  # scaffold, number, scaffold, number, ..., scaffold
    order = [int(number) for number in pieces[1::2]]
    if order != list(range(len(parts))):
        raise MokaError(
            "The chat template drops, repeats or reorders message contents, so tokens have no certain role. Choose "
            f"another with the template setting: {', '.join(TEMPLATES)}, or a Jinja file."
        )
    if opens_answer:
        order, pieces, parts = order[:-1], pieces[:-2], parts[:-1]
    result = [Segment("template", 0, pieces[0])] if pieces[0] else []
    for number, scaffold in zip(order, pieces[2::2], strict=True):
        result.append(parts[number])
        if scaffold:
            result.append(Segment("template", parts[number].turn, scaffold))
    return result


@contextmanager
def _limits() -> Iterator[None]:
    """End what a template does after `MAX_TEMPLATE_SECONDS`, or once it has taken `MAX_TEMPLATE_BYTES`.

    transformers runs templates in Jinja's sandbox, which keeps them from files and attributes, but not from looping. Only the
    main thread of a process can be interrupted so (also that of a data loader's worker); elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    end, at_first = time.monotonic() + MAX_TEMPLATE_SECONDS, 0

    def check(signum: int, frame: object) -> None:
        nonlocal at_first
        at_first = at_first or _memory()  # at the first tick, which most templates never see
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than MAX_TEMPLATE_SECONDS ({MAX_TEMPLATE_SECONDS:g} s)")
        if _memory() > at_first + MAX_TEMPLATE_BYTES:
            raise MemoryError(f"it takes more memory than MAX_TEMPLATE_BYTES ({MAX_TEMPLATE_BYTES:,})")

    before = signal.signal(signal.SIGALRM, check)
    timer = signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _memory() -> int:
    """Return the bytes of this process in memory, or 0 if the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _check_messages(messages: list[dict]) -> None:
    if not messages:
        raise MokaError("The chat has no messages; give at least one of the user.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MokaError(f'A message is {{"role": ..., "content": ...}}; got {message!r}.')
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)) or not (
            isinstance(content, str) or all(isinstance(part, dict) for part in content)
        ):
            raise MokaError(f"The content of a message is a text or a list of typed parts; got {content!r}.")


def _segment(part: dict, role: str, turn: int) -> Segment:
    kind = part.get("type")
    known = ["text", *MEDIA_TYPE_IDS]
    if kind not in known:
        raise MokaError(f"Unknown content part {kind!r}; known: {', '.join(known)}.{nearest(str(kind), known)}")
    value = part.get(kind)
    if value is None or (kind != "text" and isinstance(value, (list, tuple)) and not value):
        raise MokaError(f'A content part of type {kind!r} has no {kind!r}: write {{"type": "{kind}", "{kind}": ...}}.')
    if kind == "text":
        if not isinstance(value, str):
            raise MokaError(f"A content part of type 'text' has {value!r}; a string is expected.")
        return Segment(role, turn, text=value)
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, (str, os.PathLike)):
            raise MokaError(
                f"The processor takes decoded media, and got the path {str(one)!r}; decode it with "
                "moka.data.MediaDecoding().decode_sample, or use moka.load(...).generate, which does."
            )
    return Segment(role, turn, medium=kind, value=value)


def resolve_template(name: str | None, tokenizer) -> str | None:
    """A template by name ("chatml", "bare", "plain"), as Jinja text, or None: the tokenizer's own, "plain" without one."""
    if name is None:
        return None if tokenizer.chat_template else TEMPLATES["plain"]
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" in name:
        return name
    raise MokaError(
        f"Unknown chat template {name!r}; known: {', '.join(TEMPLATES)}, or Jinja text.{nearest(name, TEMPLATES)}"
    )
