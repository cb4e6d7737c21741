"""Lengths counted without decoding are those of the encoded samples, of every kind of medium."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from moka.data import BadMediaPolicy, EncodedDataset, MediaDecoding, open_source
from moka.data.lengths import count_lengths, joined_lengths, lengths_key, read_lengths, save_lengths
from moka.errors import MokaError
from moka.modeling import MokaProcessor

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1, 2], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}
WINDOWS = {"count": 3, "seconds": 0.05, "every": 0.05}


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return MokaProcessor(
        tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for shade in range(frames):
            picture = np.full((32, 32, 3), 20 * shade, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(video.encode(None))


LAYOUTS = [
    ("", "which digit", "one"),
    ("image", "which digit is written", "seven"),
    ("audio", "spoken?", "three three"),
    ("video", "what", "no"),
    ("image audio video image", "are these the same " * 5, "yes " * 9),
    ("features", "which", "four"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A JSONL file of samples with real media of every kind, three of each layout."""
    folder = tmp_path_factory.mktemp("media")
    lines = []
    for number in range(3 * len(LAYOUTS)):
        media, question, answer = LAYOUTS[number % len(LAYOUTS)]
        content = []
        for place, kind in enumerate(media.split()):
            path = folder / f"{number}-{place}"
            if kind == "image":
                path = path.with_suffix(".png")
                Image.new("L", (10, 8), number).save(path)
            elif kind == "audio":
                path = path.with_suffix(".wav")
                soundfile.write(path, np.sin(np.arange(800 + 300 * number)) / 3, 8000)
            elif kind == "video":
                path = path.with_suffix(".mp4")
                write_video(path, 1 + 3 * (number % 4))
            else:
                path, kind = path.with_suffix(".npy"), "audio"
                np.save(path, np.random.default_rng(number).normal(0, 40, (6, 13)).astype(np.float32))
            content.append({"type": kind, kind: path.name})
        content.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append({"id": f"s{number}", "messages": messages})
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def encoded_dataset(source, processor, max_length=None, **settings):
    return EncodedDataset(open_source(str(source), "train", **settings), processor, max_length)


def lengths_of(dataset, **settings):
    return joined_lengths(dataset, [count_lengths(dataset, **settings)])


def assert_as_encoded(lengths, dataset):
    found = [dataset[index] for index in range(len(dataset))]
    assert lengths.tokens.tolist() == [len(one["input_ids"]) for one in found]
    types = [np.array(one["mm_token_type_ids"]) for one in found]
    assert (lengths.items["visual"] * VISUAL["tokens"]).tolist() == [int(((t == 1) | (t == 2)).sum()) for t in types]
    assert (lengths.items["audio"] * AUDIO["tokens"]).tolist() == [int((t == 3).sum()) for t in types]
    for name, key in (("visual", "pixel_values"), ("audio", "input_features")):
        assert lengths.items[name].tolist() == [len(one.get(key, ())) for one in found]
    assert (lengths.media_items == lengths.items["visual"] + lengths.items["audio"]).all()


@pytest.mark.parametrize("frames", [2, 5])
@pytest.mark.parametrize("limit", [None, 52])
def test_real_media_of_every_kind(folder, processor, frames, limit):
    dataset = encoded_dataset(folder / "train.jsonl", processor, limit, decoding=MediaDecoding(frames))
    lengths = lengths_of(dataset)
    assert_as_encoded(lengths, dataset)
    assert len(set(lengths.tokens.tolist())) > 4
    if limit:
        assert lengths.tokens.max() == limit  # some were shortened


def test_sound_in_windows(folder, processor, tmp_path):
    full = [line for line in (folder / "train.jsonl").read_text().splitlines() if ".npy" not in line]
    path = tmp_path / "sounds.jsonl"
    path.write_text("\n".join(full))
    dataset = encoded_dataset(
        path, processor, media_root=str(folder), decoding=MediaDecoding.of({"audio_windows": WINDOWS})
    )
    lengths = lengths_of(dataset)
    assert_as_encoded(lengths, dataset)
    assert set(lengths.items["audio"].tolist()) == {0, 3}


def test_no_medium_is_opened(folder, processor, tmp_path):
    source = folder / "train.jsonl"
    known = lengths_of(encoded_dataset(source, processor))
    for line in source.read_text().splitlines():
        for part in json.loads(line)["messages"][0]["content"]:
            if part["type"] != "text":
                (tmp_path / part[part["type"]]).write_text("no medium")
    broken = encoded_dataset(source, processor, media_root=str(tmp_path))
    assert (lengths_of(broken).tokens == known.tokens).all()


def test_samples_with_decoded_media_are_counted_as_they_are(processor):
    samples = open_source("embedded:audio-visual-text", "train", size=20)
    dataset = EncodedDataset(samples, processor, None)
    assert_as_encoded(lengths_of(dataset), dataset)


def test_joined_sources_and_samples_left_out(folder, processor):
    one = str(folder / "train.jsonl")
    joined = open_source([one, one], "train", policy=BadMediaPolicy("skip"))
    left = [0, 3, 5, 17, 18, 30]
    dataset = EncodedDataset(joined.select(left), processor, None)
    lengths = lengths_of(dataset)
    assert_as_encoded(lengths, dataset)
    assert (lengths.tokens == lengths_of(EncodedDataset(joined, processor, None)).tokens[left]).all()


def test_a_sample_that_cannot_be_used_has_the_length_of_its_stand_in(folder, processor):
    # The samples with four media do not fit, whatever is cut of their text.
    dataset = encoded_dataset(folder / "train.jsonl", processor, 57, decoding=MediaDecoding(20))
    lengths = lengths_of(dataset)
    assert_as_encoded(lengths, dataset)
    assert {4, 10, 16} <= set(dataset.dropped) < set(range(len(dataset)))


def test_no_stand_in_is_an_error_before_training(folder, processor):
    dataset = encoded_dataset(folder / "train.jsonl", processor, 3)
    with pytest.raises(MokaError, match=r"Sample 0 cannot be used, nor can those .* raise model.max_length"):
        lengths_of(dataset)


def test_several_processes_count_what_one_counts(folder, processor):
    dataset = encoded_dataset(folder / "train.jsonl", processor)
    full = lengths_of(dataset)
    shares = joined_lengths(dataset, [count_lengths(dataset, share=(k, 3)) for k in range(3)])
    workers = lengths_of(dataset, workers=2)
    for other in (shares, workers):
        assert (other.tokens == full.tokens).all()
        assert all((other.items[name] == full.items[name]).all() for name in full.items)


def test_lengths_are_read_back_and_those_of_other_data_refused(folder, processor, tmp_path):
    source = folder / "train.jsonl"
    dataset = encoded_dataset(source, processor)
    lengths, path = lengths_of(dataset), tmp_path / "lengths.npz"
    save_lengths(path, lengths, lengths_key(dataset))
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.npz"]
    again = read_lengths(path, encoded_dataset(source, processor))
    assert (again.tokens == lengths.tokens).all()
    assert {name: values.tolist() for name, values in again.items.items()} == {
        name: values.tolist() for name, values in lengths.items.items()
    }
    changed = tmp_path / "changed.jsonl"
    changed.write_text(source.read_text().replace("spoken?", "spoken loudly?"))
    others = [
        encoded_dataset(source, processor, 60),
        encoded_dataset(source, processor, decoding=MediaDecoding(3)),
        encoded_dataset(source, processor, size=9),
        encoded_dataset(changed, processor, media_root=str(folder)),
    ]
    for other in others:
        with pytest.raises(MokaError, match="lengths of other data or settings"):
            read_lengths(path, other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MokaError, match="has no lengths of samples"):
        read_lengths(path, dataset)
