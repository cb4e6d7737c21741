"""Chat templates to segments: every role is known by construction, and a template that hides one is refused."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moka.errors import MokaError
from moka.modeling import chat
from moka.modeling.chat import TEMPLATES, Segment, resolve_template, segments

PICTURE = Image.new("L", (4, 4))
MARK = "\ue0000\ue001"  # what the renderer itself puts instead of the first part


def user(*parts):
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def image(value=PICTURE):
    return {"type": "image", "image": value}


def shown(parts):
    return [(s.role, s.turn, s.medium or s.text) for s in parts]


def test_segments_of_a_chat_in_order(tiny_tokenizer):
    messages = [
        {"role": "system", "content": "short"},
        user("one", image(), "two"),
        {"role": "assistant", "content": "yes"},
        user("three"),
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    assert shown(segments(messages, tiny_tokenizer, TEMPLATES["chatml"], False)) == [
        ("template", 0, "<|im_start|>system\n"),
        ("system", 0, "short"),
        ("template", 0, "<|im_end|>\n<|im_start|>user\n"),
        ("user", 1, "one"),
        ("user", 1, "image"),
        ("user", 1, "two"),
        ("template", 1, "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", 1, "yes"),
        ("template", 1, "<|im_end|>\n<|im_start|>user\n"),
        ("user", 2, "three"),
        ("template", 2, "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", 2, "no"),
        ("template", 2, "<|im_end|>\n"),
    ]


def test_two_user_messages_in_a_row_are_one_turn(tiny_tokenizer):
    messages = [user(image()), user("one"), {"role": "assistant", "content": "yes"}, user("two")]
    turns = [s.turn for s in segments(messages, tiny_tokenizer, None, False) if s.role == "user"]
    assert turns == [1, 1, 2]


def test_the_prompt_ends_where_the_answer_begins(tiny_tokenizer):
    """Also under a template whose generation prompt is not what it writes before an answer, or that has none."""
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    for prompt in ("", "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"):
        parts = segments([user("one")], tiny_tokenizer, own + prompt, True)
        assert shown(parts)[1:] == [("user", 1, "one"), ("template", 1, " assistant: ")]


def test_a_chat_that_ends_in_an_answer_gets_the_templates_own_prompt(tiny_tokenizer):
    messages = [user("one"), {"role": "assistant", "content": "yes"}]
    parts = segments(messages, tiny_tokenizer, TEMPLATES["chatml"], True)
    assert shown(parts)[-1] == ("template", 1, "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", [MARK, "\ue000", "\ue00017\ue001", "<image>", "<|im_end|>", "{{ bos_token }}", ""])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_people_write_is_never_read_as_a_mark(tiny_tokenizer, text, role):
    messages = [user(image(), "one"), {"role": "assistant", "content": "yes"}, user("two")]
    where = {"system": 0, "user": 1, "assistant": 2}[role]
    messages.insert(where, {"role": role, "content": [{"type": "text", "text": text}]})
    parts = segments(messages, tiny_tokenizer, TEMPLATES["chatml"], False)
    assert [s.text for s in parts if s.role == role and s.medium is None].count(text) == 1
    assert sum(s.medium is not None for s in parts) == 1
    assert not any("\ue000" in s.text for s in parts if s.role == "template")


def test_templates_that_strip_contents_keep_the_parts(tiny_tokenizer):
    template = "{% for m in messages %}[{{ m['content'] | trim }}]{{ m['content'].strip().split('</think>')[-1] | length }}{% endfor %}"
    parts = segments([user("  one ", image())], tiny_tokenizer, template, False)
    assert [s.text or s.medium for s in parts if s.role == "user"] == ["  one ", "image"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "drops"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "repeats"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}", "reorders"),
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
            "no system",
        ),
        ("{% for m in messages %}{{ m['content'] + nothing }}{% endfor %}", "refuses"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses"),
        ("{% for m in messages %}{{ m['content'] }}", "refuses"),
    ],
)
def test_a_template_that_loses_or_refuses_messages_is_an_error(tiny_tokenizer, template, problem):
    messages = [{"role": "system", "content": "short"}, user("one"), {"role": "assistant", "content": "yes"}]
    with pytest.raises(MokaError, match=problem):
        segments(messages, tiny_tokenizer, template, False)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}"
DOUBLES = "{% set ns = namespace(x='abcdefgh') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 'a' * 10**15 }}", "MemoryError"),
        (LOOPS, "MAX_TEMPLATE_SECONDS"),
        (DOUBLES, "MAX_TEMPLATE_BYTES"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_does_not_end_well_is_ended(tiny_tokenizer, monkeypatch, template, problem):
    monkeypatch.setattr(chat, "MAX_TEMPLATE_SECONDS", 1.0)
    monkeypatch.setattr(chat, "MAX_TEMPLATE_BYTES", 1 << 26)
    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(MokaError, match=problem):
        segments([user("one")], tiny_tokenizer, template, False)
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no messages"),
        (["one"], "A message is"),
        ([{"content": "one"}], "A message is"),
        ([{"role": "user"}], "The content of a message"),
        ([{"role": "user", "content": None}], "The content of a message"),
        ([{"role": "user", "content": ["one"]}], "The content of a message"),
        ([user({"type": "text"})], "type 'text' has no 'text'"),
        ([user({"type": "text", "text": 7})], "a string is expected"),
        ([user({"type": "picture", "picture": PICTURE})], "Unknown content part 'picture'; known: text, image"),
        ([user({"type": "images", "images": PICTURE})], "Did you mean 'image'"),
        ([user({"image": PICTURE})], "Unknown content part None"),
        ([user({"type": "image"})], "type 'image' has no 'image'"),
        ([user({"type": "video", "video": []})], "type 'video' has no 'video'"),
        ([user(image("a/b.png"))], r"decoded media, and got the path 'a/b.png'.*decode_sample"),
        ([user(image(Path("a/b.png")))], "got the path 'a/b.png'"),
        ([user({"type": "video", "video": ["1.png", "2.png"]})], "got the path '1.png'"),
    ],
)
def test_bad_messages_are_named(tiny_tokenizer, messages, problem):
    with pytest.raises(MokaError, match=problem):
        segments(messages, tiny_tokenizer, None, False)


def test_decoded_media_pass_whatever_they_are(tiny_tokenizer):
    frames = [PICTURE, PICTURE]
    array = np.zeros((2, 2))
    parts = segments([user({"type": "video", "video": frames}, image(array))], tiny_tokenizer, None, False)
    assert [s.value is value for s, value in zip([s for s in parts if s.medium], [frames, array], strict=True)] == [
        True
    ] * 2
    assert isinstance(parts[0], Segment)


def test_template_names(tiny_tokenizer):
    class Bare:
        chat_template = None

    assert resolve_template(None, tiny_tokenizer) is None
    assert resolve_template(None, Bare) == resolve_template("plain", Bare) == TEMPLATES["plain"]
    assert resolve_template("{{ 1 }}", tiny_tokenizer) == "{{ 1 }}"
    with pytest.raises(MokaError, match="Did you mean 'chatml'"):
        resolve_template("chatlm", tiny_tokenizer)
