"""``moka generate``: a user's own media go through the front end of training; wrong ones are reported."""

import shutil

import numpy as np
import pytest
from PIL import Image

from moka.data import load_audio, load_image
from moka.inference import load


def test_own_media_of_any_size_and_rate_are_answered(moka, trained_run, media):
    done = moka("generate", trained_run, "--image", media / "0.png", "--audio", media / "0.wav", "Which digit is it?")
    assert done.code == 0
    expected = load(trained_run).generate("Which digit is it?", image=media / "0.png", audio=media / "0.wav")
    assert done.out == expected + "\n"


def test_media_reach_the_model(trained_run, media):
    """The same question with other media gives other inputs: nothing is ignored on the way."""
    loaded = load(trained_run)
    assert Image.open(media / "0.png").size == (300, 200)
    assert load_audio(media / "0.wav").rate == 44100

    def inputs(image, audio):
        content = [
            {"type": "image", "image": load_image(media / image)},
            {"type": "audio", "audio": load_audio(media / audio)},
            {"type": "text", "text": "Which?"},
        ]
        return loaded.processor.encode([{"role": "user", "content": content}])

    first, other = inputs("0.png", "0.wav"), inputs("5.png", "5.wav")
    assert first["pixel_values"].shape == (1, 1, 28, 28)
    # Ink is bright, paper dark, as in the drawings of training.
    assert first["pixel_values"].mean() < 0.5 * first["pixel_values"].max()
    assert not np.allclose(first["pixel_values"], other["pixel_values"])
    assert not np.allclose(first["input_features"], other["input_features"])


def test_fork_merge_decoding_is_that_of_the_library_and_needs_both_media(moka, refused, trained_run, media):
    both = ("--image", media / "0.png", "--audio", media / "0.wav", "Which digit is it?")
    done = moka(
        "generate", trained_run, *both, "--decoding", "fork-merge", "--fork-layers", "1", "--visual-weight", "0.2"
    )
    expected = load(trained_run).generate(
        "Which digit is it?",
        image=media / "0.png",
        audio=media / "0.wav",
        decoding="fork-merge",
        fork_layers=1,
        visual_weight=0.2,
    )
    assert done.out == expected + "\n"
    plain = moka("generate", trained_run, *both)
    assert plain.out == moka("generate", trained_run, *both, "--decoding", "fork-merge", "--fork-layers", "0").out
    line = refused("generate", trained_run, *both[:2], "Which?", "--decoding", "fork-merge")
    assert "fork-merge" in line
    assert "no sound" in line
    line = refused("generate", trained_run, *both, "--decoding", "fork-merge", "--fork-layers", "9")
    assert "fork_layers" in line
    assert "9" in line


def test_question_without_media_is_answered(moka, trained_run):
    done = moka("generate", trained_run, "Which digit is written?", "--max-new-tokens", "3")
    assert done.code == 0
    assert done.out == load(trained_run).generate("Which digit is written?", max_new_tokens=3) + "\n"


def test_adapter_folder_only_is_enough(moka, trained_run, tmp_path):
    shutil.copytree(trained_run / "adapter", tmp_path / "mine")
    assert moka("generate", tmp_path / "mine", "Which?").out == moka("generate", trained_run, "Which?").out


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("0.png", None, ["does not exist"]),
        ("0.png", lambda p: p.write_bytes(b""), ["0 bytes"]),
        ("0.png", lambda p: p.write_bytes(p.read_bytes()[:300]), ["truncated"]),
        ("0.png", lambda p: p.write_text("text"), ["not an image"]),
        ("0.wav", None, ["does not exist"]),
        ("0.wav", lambda p: p.write_bytes(b""), ["0 bytes"]),
        ("0.wav", lambda p: p.write_bytes(p.read_bytes()[:9000]), ["truncated"]),
        ("0.wav", lambda p: p.write_text("text"), ["audio"]),
    ],
)
def test_bad_media_are_one_line(refused, trained_run, media, tmp_path, name, spoil, words):
    path = tmp_path / name
    if spoil is not None:
        shutil.copy(media / name, path)
        spoil(path)
    line = refused("generate", trained_run, "Which?", "--image" if name.endswith("png") else "--audio", path)
    for word in [str(path), *words]:
        assert word in line, line


def test_question_longer_than_the_context_is_refused(refused, trained_run):
    line = refused("generate", trained_run, "seven " * 600)
    assert "Too long" in line
    assert "512" in line
    assert "Shorten the question" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Which?", "--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["Which?", "--max-new-tokens", "512"], ["max_new_tokens 512", "512 tokens"]),
        (["Which?", "--num-beams", "0"], ["num_beams", "0"]),
        (["Which?", "--device", "gpu"], ["device 'gpu'"]),
        (["  "], ["empty"]),
        (["Which?", "--backbone", "/no/such"], ["/no/such"]),
    ],
)
def test_bad_arguments_are_one_line(refused, trained_run, arguments, words):
    line = refused("generate", trained_run, *arguments)
    for word in words:
        assert word in line, line


def test_video_to_a_model_without_frames_is_a_file_error(refused, trained_run, tmp_path):
    assert "does not exist" in refused("generate", trained_run, "Which?", "--video", tmp_path / "no.mp4")


def test_what_is_no_run_is_reported(refused, trained_run, tmp_path):
    assert "does not exist" in refused("generate", tmp_path / "none", "Which?")
    assert "has no adapter" in refused("generate", tmp_path, "Which?")
    shutil.copytree(trained_run / "connector", tmp_path / "one/connector")
    assert "stage-1 run only" in refused("generate", tmp_path / "one", "Which?")
