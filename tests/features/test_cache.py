"""Features on disk: what was written comes back, in any process; what has changed, was cut or cannot be is reported."""

import json
import os
import pickle
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from moka.data.media import DecodedDataset, MediaDecoding
from moka.data.media_io import BadMediaError
from moka.errors import MokaError
from moka.features import cache as features_module
from moka.features.cache import (
    FORMAT_VERSION,
    FeatureCache,
    FeatureSet,
    NotCachedError,
    medium_id,
    open_set,
    weights_sha256,
)
from moka.features.setup import check_features
from moka.features.writer import FeatureWriter, create_set, next_number, update_index
from moka.modeling.media import AudioFeatures, Waveform

SETTINGS = {"encoder": {"type": "clip", "layer": -1}, "weights_sha256": "ab", "decoding": {"video_frames": 10}}


@pytest.fixture
def pictures(tmp_path):
    """Paths of twelve small picture files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = []
    for i in range(12):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(np.full((4, 4 + i, 3), 20 * i, np.uint8)).save(paths[-1])
    return paths


def features_of(number, items=1):
    return torch.randn(items, 3, 5, generator=torch.Generator().manual_seed(number))


def fill(cache, paths, dtype="float32", shard_bytes=200):
    """A set with the features of each picture: shards of four, and one picture of two items."""
    folder = create_set(cache, "clip", SETTINGS, dtype)
    writer = FeatureWriter(FeatureSet(folder), next_number(folder.glob("shard-*")), shard_bytes=shard_bytes)
    for i, path in enumerate(paths):
        writer.add(medium_id("image", path), features_of(i, 1 + (i == 3)))
    writer.flush()
    assert update_index(folder) == []
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features_come_back_as_they_were_written(tmp_path, pictures, dtype):
    folder = fill(tmp_path / "cache", pictures, dtype)
    shards = sorted(folder.glob("shard-*.safetensors"))
    assert len(shards) >= 2
    assert all(path.stat().st_size < 2000 for path in shards)
    read = FeatureCache({"image": open_set(tmp_path / "cache", "clip", SETTINGS)})
    for i, path in enumerate(pictures):
        items = read.read("image", path)
        assert len(items) == 1 + (i == 3)
        expected = features_of(i, 1 + (i == 3)).to(getattr(torch, dtype)).float().numpy()
        assert all(item.values.dtype == np.float32 for item in items)
        np.testing.assert_array_equal(np.stack([item.values for item in items]), expected)


class Values:
    """Indexing reads features; for loader workers."""

    def __init__(self, features, paths):
        self.features, self.paths = features, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.features.read("image", self.paths[index])[0].values, os.getpid()


@pytest.fixture
def few_open(monkeypatch):
    """Two shards mapped at a time, where a set has more."""
    monkeypatch.setattr(features_module, "_OPEN_SHARDS", 2)


def test_threads_read_the_same(tmp_path, pictures, few_open):
    folder = fill(tmp_path / "cache", pictures, shard_bytes=50)
    assert len(list(folder.glob("shard-*"))) == len(pictures)
    features = FeatureCache({"image": open_set(tmp_path / "cache", "clip", SETTINGS)})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda path: features.read("image", path)[0].values, pictures * 200))
    finally:
        sys.setswitchinterval(interval)
    for i, values in enumerate(read):
        number = i % len(pictures)
        np.testing.assert_array_equal(values, features_of(number, 1 + (number == 3))[0].numpy())


def test_loader_workers_read_the_same(tmp_path, pictures, few_open):
    assert len(list(fill(tmp_path / "cache", pictures).glob("shard-*"))) > 2
    features = FeatureCache({"image": open_set(tmp_path / "cache", "clip", SETTINGS)})
    here = [features.read("image", path)[0].values for path in pictures]  # shards are mapped before workers start
    loader = DataLoader(Values(features, pictures), batch_size=None, num_workers=2, multiprocessing_context="fork")
    there = list(loader)
    assert len({int(process) for _, process in there} - {os.getpid()}) == 2
    for ours, (theirs, _) in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # As a worker gets them that is started again.
    copy = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(copy.read("image", pictures[5])[0].values, here[5])


def test_media_are_known_by_file_and_by_value(tmp_path, pictures):
    fill(tmp_path / "cache", pictures)
    features = open_set(tmp_path / "cache", "clip", SETTINGS)
    link = str(tmp_path / "pictures/../pictures/2.png")
    np.testing.assert_array_equal(features.read(features.find("image", link)), features_of(2).numpy())
    with pytest.raises(NotCachedError, match=r"2\.png.*are not in"):  # as a film it is another medium
        features.find("video", pictures[2])
    moved = str(tmp_path / "moved.png")
    shutil.copy(pictures[2], moved)
    os.utime(pictures[4], ns=(1, 1))
    Image.new("RGB", (9, 9)).save(pictures[7])
    for place in (moved, pictures[4], pictures[7]):
        with pytest.raises(NotCachedError, match=rf"{os.path.basename(place)}.*bytes.*are not in.*moka cache"):
            features.find("image", place)
    # Computed again, the file is what it is now.
    again = FeatureSet(fill(tmp_path / "cache", [pictures[7]]))
    np.testing.assert_array_equal(again.read(again.find("image", pictures[7])), features_of(0).numpy())


def test_a_medium_that_two_processes_computed_counts_once(tmp_path, pictures):
    folder = create_set(tmp_path / "cache", "clip", SETTINGS)
    writers = [FeatureWriter(FeatureSet(folder), 1, rank) for rank in range(2)]
    for writer in writers:
        writer.add(medium_id("image", pictures[0]), features_of(0))
        writer.flush()
    update_index(folder)
    assert len(FeatureSet(folder).shards) == 2
    assert len(FeatureSet(folder)) == 1


def test_sample_without_features_is_named(tmp_path, pictures):
    fill(tmp_path / "cache", pictures[1:])
    features = FeatureCache({"image": open_set(tmp_path / "cache", "clip", SETTINGS)})
    content = [{"type": "image", "image": pictures[0]}]
    samples = DecodedDataset(
        [{"id": "s17", "messages": [{"role": "user", "content": content}]}], MediaDecoding(features=features)
    )
    with pytest.raises(MokaError, match=r"sample 's17': .*0\.png.*moka cache"):
        samples[0]


def test_processes_look_up_a_share_each(tmp_path, pictures):
    fill(tmp_path / "cache", pictures[:2] + pictures[3:])

    def look_up(share):
        features = FeatureCache({"image": open_set(tmp_path / "cache", "clip", SETTINGS, share)})
        parts = [[{"type": "image", "image": path}] for path in pictures[:6]]
        samples = [{"id": f"s{i}", "messages": [{"role": "user", "content": part}]} for i, part in enumerate(parts)]
        check_features(DecodedDataset(samples, MediaDecoding(features=features)), "data.train", share)

    for share in ((0, 1), (0, 2)):
        with pytest.raises(MokaError, match=r"data\.train: sample 's2': .*2\.png.*are not in"):
            look_up(share)
    look_up((1, 2))


def test_bad_media_stay_bad(tmp_path, pictures):
    folder = create_set(tmp_path / "cache", "clip", SETTINGS)
    writer = FeatureWriter(FeatureSet(folder), 1)
    identity = medium_id("image", pictures[0])
    update_index(folder, {identity: "is a damaged image"})
    features = FeatureSet(folder)
    with pytest.raises(BadMediaError, match="is a damaged image") as caught:
        features.find("image", pictures[0])
    assert (caught.value.file, caught.value.reason) == (pictures[0], "is a damaged image")
    with pytest.raises(BadMediaError, match="does not exist"):
        features.find("image", str(tmp_path / "none.png"))
    # A decoder that has learnt to read it: what is computed counts.
    writer.add(identity, features_of(1))
    writer.flush()
    update_index(folder)
    assert FeatureSet(folder).find("image", pictures[0]) == identity


def test_ids_tell_apart_what_encoders_would_see_differently():
    grey = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    turned = grey.copy()
    turned.getexif()[0x0112] = 6
    other_colours = grey.convert("P")
    other_colours.putpalette([255 - i // 3 for i in range(768)])
    sound = np.arange(8, dtype=np.float32) / 8
    different = [
        grey,
        turned,
        grey.resize((2, 8)),
        grey.convert("RGB"),
        grey.convert("P"),
        other_colours,
        Waveform(sound, 8000),
        Waveform(sound, 16000),
        AudioFeatures(sound.reshape(4, 2), "mfcc"),
        AudioFeatures(sound.reshape(2, 4), "mfcc"),
        [Waveform(sound, 8000)],
        [grey, grey],
        [grey],
    ]
    ids = [medium_id("audio", medium) for medium in different]
    assert len(set(ids)) == len(ids)
    assert medium_id("image", grey) == medium_id("image", grey.copy()) != medium_id("video", grey)
    assert medium_id("audio", Waveform(sound.copy(), 8000)) == ids[6]
    with pytest.raises(MokaError, match="int"):
        medium_id("audio", 3)


def test_one_changed_weight_changes_the_hash():
    layer = torch.nn.Linear(50, 50)
    before = weights_sha256(layer)
    assert weights_sha256(layer) == before
    with torch.no_grad():
        layer.weight[37, 11] = torch.nextafter(layer.weight[37, 11], torch.tensor(9.0))
    assert weights_sha256(layer) != before


def test_other_settings_are_named(tmp_path, pictures, monkeypatch):
    fill(tmp_path / "cache", pictures)
    other = json.loads(json.dumps(SETTINGS))
    other["encoder"]["layer"], other["decoding"]["video_frames"] = -2, 8
    with pytest.raises(MokaError, match=r"encoder\.layer is -1 there and -2 here; decoding\.video_frames is 10.*and 8"):
        open_set(tmp_path / "cache", "clip", other)
    with pytest.raises(MokaError, match=r"no features of encoder 'beats'.*moka cache"):
        open_set(tmp_path / "cache", "beats", SETTINGS)
    with pytest.raises(MokaError, match="has float32 features, and float16 is asked for"):
        create_set(tmp_path / "cache", "clip", SETTINGS, "float16")
    # Of a moka that makes other features under the same settings.
    monkeypatch.setattr(features_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
    with pytest.raises(MokaError, match=r"other settings|format_version"):
        open_set(tmp_path / "cache", "clip", SETTINGS)


@pytest.mark.parametrize("text", ['{"dtype"', "[]", '{"dtype": "float32", "settings": {}, "shards": {"a": 3}}', None])
def test_a_damaged_index_is_named_in_training_and_made_again(tmp_path, pictures, text):
    folder = fill(tmp_path / "cache", pictures)
    (folder / "index.json").write_text(text) if text else (folder / "index.json").unlink()
    with pytest.raises(MokaError, match=r"index\.json.*moka cache|no features of encoder 'clip'.*moka cache"):
        open_set(tmp_path / "cache", "clip", SETTINGS)
    fill(tmp_path / "cache", [])
    assert len(open_set(tmp_path / "cache", "clip", SETTINGS)) == len(pictures)


def test_half_written_and_damaged_shards_are_made_again(tmp_path, pictures):
    folder = fill(tmp_path / "cache", pictures)
    shards = sorted(folder.glob("shard-*.safetensors"))
    full = {path: path.read_bytes() for path in shards}
    # Killed while a shard was written, and between a shard and the index.
    (folder / ".shard-00099-000.safetensors.x1.tmp").write_bytes(b"half")
    (folder / "shard-00098-000.safetensors").write_bytes(full[shards[0]])
    assert update_index(folder) == []
    assert len(FeatureSet(folder).shards) == len(shards) + 1
    assert not list(folder.glob(".*"))
    (folder / "shard-00098-000.safetensors").unlink()
    assert [line.split(" ")[0] for line in update_index(folder)] == [str(folder / "shard-00098-000.safetensors")]
    # Cut, flipped and lost.
    flipped = bytearray(full[shards[1]])
    flipped[-1] ^= 1
    for path, data in ((shards[0], full[shards[0]][:-7]), (shards[1], bytes(flipped)), (shards[2], None)):
        path.write_bytes(data) if data else path.unlink()
        with pytest.raises(MokaError, match=rf"{path.name}.*moka cache"):
            open_set(tmp_path / "cache", "clip", SETTINGS)
        path.write_bytes(full[path])
    shards[0].write_bytes(full[shards[0]][:-7])
    shards[1].write_bytes(flipped)
    shards[2].unlink()
    assert [line.split(" ")[0] for line in update_index(folder)] == [str(path) for path in shards[:3]]
    features = FeatureSet(folder)
    lost = [path for path in pictures if medium_id("image", path) not in features]
    assert lost
    assert len(lost) + len(features) == len(pictures)
    fill(tmp_path / "cache", pictures)
    assert len(FeatureSet(folder)) == len(pictures)
    assert update_index(folder) == []


def test_full_disk_keeps_what_was_written(tmp_path, pictures):
    folder = fill(tmp_path / "cache", pictures[:6])
    known = FeatureSet(folder)
    writer = FeatureWriter(known, next_number(folder.glob("shard-*")))
    writer.add(medium_id("image", pictures[6]), torch.ones(1, 30, 500))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(MokaError, match=r"cannot be written: the disk is full"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.glob(".*"))
    assert update_index(folder) == []
    assert len(FeatureSet(folder)) == len(known) == 6


def test_values_beyond_the_type_are_refused(tmp_path, pictures):
    folder = create_set(tmp_path / "cache", "clip", SETTINGS, "float16")
    writer = FeatureWriter(FeatureSet(folder), 1)
    with pytest.raises(MokaError, match=r"70000.*float16.*bfloat16"):
        writer.add(medium_id("image", pictures[0]), torch.full((1, 3, 5), 7e4))
