"""Free-running evaluation: what is asked when a modality is blanked."""

import copy
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from moka.demo.digit_tasks import EmbeddedTask
from moka.errors import MokaError
from moka.evaluation import evaluate
from moka.inference import LoadedModel, load


class Listening(LoadedModel):
    """Answers as the loaded model does, and keeps what it was asked."""

    def __init__(self, loaded):
        super().__init__(loaded.model, loaded.processor, loaded.folder)
        self.asked = []

    def generate_batch(self, chats, **kwargs):
        self.asked += copy.deepcopy(list(chats))
        return super().generate_batch(chats, **kwargs)


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load(trained_run)


def test_blanked_media_keep_their_size_and_lose_their_content(loaded):
    samples, listening = EmbeddedTask("audio-visual-text", "test", size=4), Listening(loaded)
    evaluate(listening, samples, size=2, max_new_tokens=2, progress=False)
    given, no_picture, no_sound = listening.asked[:2], listening.asked[2:4], listening.asked[4:]
    assert len(no_sound) == 2
    for before, dark, silent in zip(given, no_picture, no_sound, strict=True):
        (image, audio, text), (black, same_audio, _), (same_image, silence, same_text) = (
            chat[0]["content"] for chat in (before, dark, silent)
        )
        assert np.asarray(image["image"]).any()
        assert not np.asarray(black["image"]).any()
        assert black["image"].size == image["image"].size
        assert audio["audio"].values.any()
        assert not silence["audio"].values.any()
        assert silence["audio"].values.shape == audio["audio"].values.shape
        assert np.array_equal(same_audio["audio"].values, audio["audio"].values)
        assert np.array_equal(np.asarray(same_image["image"]), np.asarray(image["image"]))
        assert same_text == text


def test_answer_is_not_given_away(loaded):
    samples, listening = EmbeddedTask("audio-visual-text", "test", size=2), Listening(loaded)
    evaluate(listening, samples, blank=False, max_new_tokens=2, progress=False)
    assert [[message["role"] for message in chat] for chat in listening.asked] == [["user"], ["user"]]


def test_modalities_that_no_question_has_are_not_blanked(loaded):
    picture = Image.new("RGBA", (30, 20), (0, 0, 0, 255))

    def sample(i, *media):
        content = [*media, {"type": "text", "text": "Which?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "one"}]}
        return {"id": str(i), "messages": [{"role": "user", "content": content}, answer]}

    # The picture comes late: looking at the first sample only would miss it.
    samples = [sample(0), sample(1), sample(2, {"type": "image", "image": picture})]
    result = evaluate(loaded, samples, max_new_tokens=2, batch_size=2, progress=False)
    assert list(result["conditions"]) == ["as given", "visual blanked"]
    assert list(result["conditions"]["as given"]) == ["all", "overall"]


def test_category_called_overall_is_not_counted_twice(loaded):
    content = [{"type": "text", "text": "Which?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
    ]
    samples = [{"id": "a", "category": "overall", "messages": messages}]
    result = evaluate(loaded, samples, max_new_tokens=2, progress=False)
    assert result["conditions"]["as given"]["overall"]["n"] == 1


def test_sample_without_an_answer_is_named(loaded):
    samples = [{"id": "clip3", "messages": [{"role": "user", "content": "Which?"}]}]
    with pytest.raises(MokaError, match=r"'clip3'.*assistant"):
        evaluate(loaded, samples, progress=False)


@pytest.mark.slow
def test_two_processes_give_the_predictions_of_one_also_after_a_kill(trained_run, tmp_path, launch):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(trained_run, folder)
    options = ("--size", "200", "--batch-size", "2", "--blank-size", "30")
    assert launch("one", "eval", one, *options).returncode == 0
    killed = launch("accelerate", "eval", two, *options, start=True)
    parts = two / "evaluation.partial"
    while killed.poll() is None and len(list(parts.rglob("predictions.jsonl.part-*"))) < 2:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close(), killed.stderr.close()
    assert list(parts.rglob("predictions.jsonl.part-*"))
    assert not (two / "evaluation.json").exists()
    done = launch("accelerate", "eval", two, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (two, one))
    assert ours == theirs
    assert not parts.exists()
