"""The sample format: what is normalised, and that each mistake is reported with its place, its field and its remedy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moka.data.schema import check_sample, map_media, media_parts
from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform

WHERE = "data/train.jsonl:12"
ANSWER = {"role": "assistant", "content": "Three."}


def ask(*parts, **keys):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **keys}


def test_a_string_content_becomes_one_text_part_and_a_missing_id_comes_from_the_place():
    checked = check_sample({"messages": [{"role": "user", "content": "Hello"}, ANSWER]}, WHERE)
    assert checked == {
        "id": "train.jsonl:12",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        ],
    }


def test_the_given_sample_is_left_unchanged_and_checking_twice_changes_nothing():
    sample = ask(
        {"type": "image", "image": Path("a.png"), "text": None}, {"type": "text", "text": "?"}, id=7, extra=[1]
    )
    before = copy.deepcopy(sample)
    once = check_sample(sample, WHERE)
    assert sample == before
    assert once["id"] == "7"
    assert once["extra"] == [1]
    assert once["messages"][0]["content"][0] == {"type": "image", "image": "a.png"}
    assert check_sample(once, "elsewhere:1") == once


def test_decoded_media_are_accepted_as_they_are():
    image, sound = Image.new("RGB", (2, 2)), Waveform(np.zeros(4, np.float32), 16000)
    features = AudioFeatures(np.zeros((3, 2), np.float32), "mfcc")
    given = [("image", image), ("audio", sound), ("audio", features), ("video", [image, image])]
    checked = check_sample(ask(*({"type": kind, kind: medium} for kind, medium in given)), WHERE)
    found = list(media_parts(checked))
    assert [kind for kind, _ in found] == [kind for kind, _ in given]
    assert found[0][1] is image
    assert found[1][1] is sound
    assert found[2][1] is features
    assert found[3][1] == [image, image]


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_the_bytes_of_a_file_are_a_medium(kind):
    checked = check_sample(ask({"type": kind, kind: b"RIFF"}), WHERE)
    assert list(media_parts(checked)) == [(kind, b"RIFF")]
    assert check_sample(checked, WHERE) == checked


def test_a_literal_placeholder_in_text_is_text():
    checked = check_sample(ask({"type": "text", "text": "What does <image> mean in HTML? <audio>"}), WHERE)
    assert list(media_parts(checked)) == []
    assert checked["messages"][0]["content"][0]["text"] == "What does <image> mean in HTML? <audio>"


def test_map_media_changes_media_only_and_copies():
    checked = check_sample(ask({"type": "image", "image": "a.png"}, {"type": "text", "text": "a.png"}), WHERE)
    mapped = map_media(checked, lambda kind, medium: f"{kind}/{medium}")
    assert mapped["messages"][0]["content"] == [
        {"type": "image", "image": "image/a.png"},
        {"type": "text", "text": "a.png"},
    ]
    assert checked["messages"][0]["content"][0]["image"] == "a.png"


IMAGE = {"type": "image", "image": "a.png"}
MISTAKES = {
    "not an object": ("hello", ["sample", "'hello' (str)", "messages"]),
    "no messages": ({"id": "1", "message": []}, ["messages is missing", "'id', 'message'"]),
    "messages of a wrong type": ({"messages": "hi"}, ["messages", "'hi' (str)", "a list is expected"]),
    "empty messages": ({"messages": []}, ["messages is empty", "Write"]),
    "message is text": ({"messages": ["hi"]}, ["messages[0]", "'role' and 'content'"]),
    "unknown role": (
        {"messages": [{"role": "User", "content": "x"}]},
        ["messages[0].role", "'User'", "system, user, assistant", "Did you mean 'user'?"],
    ),
    "role missing": ({"messages": [{"content": "x"}]}, ["messages[0].role is missing", "system, user, assistant"]),
    "role of a wrong type": ({"messages": [{"role": ["user"], "content": "x"}]}, ["messages[0].role", "(list)"]),
    "key of another format": (
        {"messages": [{"from": "human", "value": "x"}]},
        ["messages[0].from", "'role' and 'content'"],
    ),
    "content missing": ({"messages": [{"role": "user"}]}, ["messages[0].content is missing"]),
    "content empty": ({"messages": [{"role": "user", "content": []}]}, ["messages[0].content", "empty list"]),
    "part is a string": (ask(IMAGE, "What?"), ["messages[0].content[1]", '{"type": "text", "text": ...}']),
    "unknown part type": (
        ask({"type": "images", "images": "a.png"}),
        ["messages[0].content[0].type", "'images'", "text, image, audio, video", "Did you mean 'image'?"],
    ),
    "part type missing": (ask({"image": "a.png"}), ["messages[0].content[0].type is missing"]),
    "list of images": (
        ask({"type": "image", "image": ["a.png", "b.png"]}),
        ["messages[0].content[0].image", "list of 2", "one part of type 'image' for each image"],
    ),
    "placeholder without medium": (
        ask({"type": "image"}, {"type": "text", "text": "?"}),
        ["messages[0].content[0]", "a placeholder without a medium", "only 'type'", "or a PIL image"],
    ),
    "placeholder with null": (ask({"type": "audio", "audio": None}), ["a placeholder without a medium"]),
    "empty path": (ask({"type": "audio", "audio": ""}), ["messages[0].content[0].audio", "''", "Waveform"]),
    "empty bytes": (
        ask({"type": "image", "image": b""}),
        ["messages[0].content[0].image", "b''", "the bytes of a file"],
    ),
    "bytes as text": (ask({"type": "text", "text": b"x"}), ["messages[0].content[0].text", "(bytes)"]),
    "medium of a wrong type": (ask({"type": "audio", "audio": 5}), ["messages[0].content[0].audio", "5 (int)"]),
    "frames as paths": (ask({"type": "video", "video": ["1.png"]}), ["messages[0].content[0].video", "PIL images"]),
    "no frames": (ask({"type": "video", "video": []}), ["messages[0].content[0].video", "at least one"]),
    "address": (
        ask({"type": "image", "image": "https://x.org/a.png"}),
        ["content[0].image", "a local path is expected"],
    ),
    "two media in one part": (ask({**IMAGE, "audio": "a.wav"}), ["content[0].audio", "one part per medium"]),
    "text of a wrong type": (ask({"type": "text", "text": 3}), ["messages[0].content[0].text", "3 (int)"]),
    "media next to the messages": (ask(images=["a.png"]), ["images", "would be ignored", "as a part"]),
    "media next to the content": (
        {"messages": [{"role": "user", "content": "<image>?", "images": ["a.png"]}, ANSWER]},
        ["messages[0].images", "would be ignored"],
    ),
    "id of a wrong type": (ask(IMAGE, id=["x"]), ["id", "(list)"]),
    "category of a wrong type": (ask(IMAGE, category=3), ["category", "3 (int)", "a string"]),
    "no answer": ({"messages": [{"role": "user", "content": "?"}]}, ["no assistant message", "require_answer=False"]),
    "blank answer": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": " \n"}]},
        ["every assistant message is blank"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line_with_place_field_and_remedy(mistake):
    sample, printed = MISTAKES[mistake]
    with pytest.raises(MokaError) as error:
        check_sample(sample, WHERE)
    message = str(error.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    for words in printed:
        assert words in message


def test_a_sample_without_an_answer_passes_where_none_is_required():
    question = {"messages": [{"role": "user", "content": "?"}]}
    assert len(check_sample(question, WHERE, require_answer=False)["messages"]) == 1
