"""``on_bad_media: skip``: every file is tried before training, and all processes agree on what is left."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from moka.data.dataset import SampleDataset
from moka.data.media import BadMediaPolicy, DecodedDataset, MediaDecoding
from moka.data.media_io import BadMediaError
from moka.data.media_validation import find_usable, read_usable, try_media, usable_cores
from moka.data.schema import check_sample, media_parts
from moka.errors import MokaError, NotCachedError


def samples(folder, count, bad=(), **more):
    """Samples with a picture and a sound each; those of ``bad`` have a picture that is none."""
    made = []
    for i in range(count):
        Image.new("L", (2, 2), i).save(folder / f"{i}.png")
        if i in bad:
            (folder / f"{i}.png").write_text("text")
        soundfile.write(folder / f"{i}.wav", np.zeros(80, np.float32), 8000)
        content = [
            {"type": "image", "image": more.get(f"image{i}", str(folder / f"{i}.png"))},
            {"type": "audio", "audio": str(folder / f"{i}.wav")},
        ]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        made.append(check_sample({"id": f"s{i}", "messages": messages}, "made:1"))
    return made


@pytest.mark.parametrize("workers", [1, 4])
def test_bad_samples_are_left_out_and_listed(tmp_path, workers):
    made = samples(tmp_path, 12, bad={2, 7})
    path = tmp_path / "reports" / "bad.jsonl"
    report = find_usable(made, budget=0.2, workers=workers, name="data.train")
    report.write(path)
    assert report.indices == [i for i in range(12) if i not in (2, 7)]
    assert [(r["index"], r["id"], r["file"], r["action"]) for r in report.skipped] == [
        (2, "s2", str(tmp_path / "2.png"), "skip"),
        (7, "s7", str(tmp_path / "7.png"), "skip"),
    ]
    assert "not an image" in report.skipped[0]["reason"]
    totals, *lines = map(json.loads, path.read_text().splitlines())
    assert totals == {"tried": 12, "skipped": 2}
    assert lines == report.skipped
    printed = "data.train: 2 of 12 samples left out for media that cannot be used (budget: 3)"
    assert report.summary() == printed
    assert read_usable(path, 12, budget=0.2, name="data.train").summary() == f"{printed}; listed in {path}"
    # What is left is decoded without a bad one, in order.
    decoded = DecodedDataset(SampleDataset.concat([made]), policy=BadMediaPolicy("skip", 0.2)).select(report.indices)
    assert [decoded[i]["id"] for i in range(len(decoded))] == [f"s{i}" for i in report.indices]


def test_a_resumed_run_reads_the_same_report_back_without_trying(tmp_path):
    made = samples(tmp_path, 6, bad={1})
    path = tmp_path / "bad.jsonl"
    report = find_usable(made, budget=0.5)
    report.write(path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert read_usable(path, 6, budget=0.5) == replace(report, path=path)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(MokaError, match=r"is of 6 samples, and the data set has 7"):
        read_usable(path, 7, budget=0.5)
    with pytest.raises(MokaError, match="budget allows 0"):
        read_usable(path, 6, budget=0.0)
    with pytest.raises(MokaError, match=r"none\.jsonl is no report"):
        read_usable(tmp_path / "none.jsonl", 6)
    path.write_text(json.dumps(report.skipped[0]) + "\n")  # of another policy, or half a file
    with pytest.raises(MokaError, match="is no report"):
        read_usable(path, 6)


def test_a_budget_that_is_exceeded_says_number_and_first_cases(tmp_path):
    made = samples(tmp_path, 20, bad={0, 3, 4, 9, 11})
    with pytest.raises(MokaError) as caught:
        find_usable(made, budget=0.2)
    message = str(caught.value)
    assert "5 of 20 samples" in message
    assert "budget allows 4" in message
    for i in (0, 3, 4):
        assert f"sample 's{i}': {tmp_path / f'{i}.png'}" in message
    assert "9.png" not in message
    assert len(find_usable(made, budget=0.25).indices) == 15


def test_a_data_set_without_one_good_sample_is_refused_whatever_the_budget(tmp_path):
    with pytest.raises(MokaError, match="2 of 2"):
        find_usable(samples(tmp_path, 2, bad={0, 1}), budget=1.0)


def test_bytes_are_tried_too(tmp_path):
    made = samples(tmp_path, 3, image1=b"no picture")
    report = find_usable(made, budget=0.5)
    assert report.indices == [0, 2]
    assert report.skipped[0]["file"] == "image bytes of sample 's1'"


def test_a_file_named_by_many_samples_is_looked_at_once_and_results_keep_their_order(tmp_path):
    made = samples(tmp_path, 4) * 10
    looked, lock = [], threading.Lock()

    def look(kind, medium):
        with lock:
            looked.append((kind, medium))
        return kind, medium

    results = list(try_media(enumerate(made), look, workers=3))
    assert [index for index, _, _ in results] == list(range(40))
    assert [seen for _, _, seen in results] == [list(media_parts(sample)) for sample in made]
    assert sorted(looked) == sorted({part for sample in made for part in media_parts(sample)})


def test_mistakes_that_are_not_bad_media_are_raised(tmp_path):
    class Broken(list):
        def __getitem__(self, index):
            raise MokaError("train.jsonl:3: messages is empty.")

    with pytest.raises(MokaError, match=r"train\.jsonl:3"):
        find_usable(Broken([1, 2]), budget=1.0)


def test_a_file_that_goes_bad_after_the_trial_stops_the_run_and_joins_the_report(tmp_path):
    made = samples(tmp_path, 4, bad={1})
    path = tmp_path / "bad.jsonl"
    report = find_usable(made, budget=0.25)
    report.write(path)
    (tmp_path / "2.png").unlink()
    decoded = DecodedDataset(
        SampleDataset.concat([made]), policy=BadMediaPolicy("skip", 0.25), report_path=path
    ).select(report.indices)
    assert decoded[0]["id"] == "s0"
    with pytest.raises(BadMediaError, match="sample 's2'"):
        decoded[1]
    assert [(r["id"], r["action"]) for r in decoded.parts[0].report] == [("s2", "error"), ("s1", "skip")]
    assert read_usable(path, 4, budget=0.25) == replace(report, path=path)


def test_media_with_features_are_looked_up_and_not_read(tmp_path):
    made = samples(tmp_path, 3, bad={1})  # an encoder's cache knows which are bad

    class Lookup:
        kinds = frozenset({"image"})
        absent = None

        def check(self, kind, medium):
            if medium == str(tmp_path / "2.png"):
                raise BadMediaError(f"{medium}: is bad.", medium, "is bad")
            if medium == self.absent:
                raise NotCachedError(f"the features of {kind} {medium} are not there.")

    (tmp_path / "0.wav").unlink()  # of a kind that is not cached
    report = find_usable(made, budget=1.0, decoding=MediaDecoding(features=Lookup()), name="data.train")
    assert [(r["index"], r["file"]) for r in report.skipped] == [
        (0, str(tmp_path / "0.wav")),
        (2, str(tmp_path / "2.png")),
    ]
    Lookup.absent = str(tmp_path / "1.png")
    with pytest.raises(MokaError, match=r"data\.train: sample 's1': the features of image .*1\.png are not there"):
        find_usable(made, budget=1.0, decoding=MediaDecoding(features=Lookup()), name="data.train")


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = usable_cores()
    assert cores >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_cores() == max(1, cores // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert usable_cores() == 1
