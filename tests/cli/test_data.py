"""``moka data``: check, show, convert and formats, on real picture and sound files."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from moka.data.convert import convert
from moka.data.jsonl import JsonlDataset
from moka.data.media import MediaDecoding
from moka.data.media_io import load_audio
from moka.data.schema import media_parts
from moka.data.sources import open_samples
from moka.errors import MokaError
from moka.modeling import build
from moka.modeling.hf_model import load_chat_processor
from moka.training import config_from_dict


@pytest.fixture
def folder(media, tmp_path):
    """A copy of the media folder, to be spoilt."""
    return shutil.copytree(media, tmp_path / "media")


@pytest.fixture
def config(config_file, folder):
    """A configuration on that folder only."""
    none = dict.fromkeys(("data__alignment", "data__validation", "data__test"))
    path, _ = config_file(**none, data__train=str(folder / "data.jsonl"), data__train_size=None)
    return path


def spoil(folder, change):
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    change(lines)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_clean_set_ends_with_zero_and_its_figures(moka, config, tmp_path):
    done = moka("data", "check", config, "--json", tmp_path / "report.json")
    assert done.code == 0, done.err[-500:]
    assert "data.train: 8 of 8 samples are good" in done.out
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["good"] == report["samples"] == 8
    assert report["sampling_rates"] == {"44100": 8}
    assert report["resampled"] == 8
    assert report["categories"] == {"even": 4, "odd": 4}
    assert report["media_per_sample"] == {"1 image, 1 audio": 8}
    assert report["max_length"] == 512  # of the backbone


def test_problems_end_with_one_are_listed_to_the_limit_and_the_manifest_is_clean(moka, config, folder, tmp_path):
    (folder / "1.png").write_bytes(b"text")
    (folder / "2.wav").unlink()
    (folder / "3.wav").write_bytes(b"")
    spoil(folder, lambda lines: lines[4].update(messages=[]))
    clean, report = tmp_path / "clean.jsonl", tmp_path / "report.json"
    done = moka("data", "check", config, "--limit", 2, "--manifest", clean, "--json", report, "--workers", 2)
    assert done.code == 1
    assert "data.train: 4 of 8 samples are good" in done.out
    listed = [line for line in done.out.splitlines() if line.partition(":")[0] in ("schema", "missing", "decoding")]
    assert [line.split(":")[0] for line in listed] == ["decoding", "missing"]
    assert "... and 2 more problems" in done.out
    assert {kind: len(found) for kind, found in json.loads(report.read_text())[0]["problems"].items() if found} == {
        **{"schema": 1, "missing": 2, "decoding": 1},
    }
    assert f"data.media_root={folder}" in done.out
    # The manifest is a data set without a problem.
    again = moka("data", "check", config, f"data.train={clean}", f"data.media_root={folder}")
    assert again.code == 0, again.err[-500:]
    assert "data.train: 4 of 4 samples are good" in again.out
    assert [json.loads(line)["id"] for line in clean.read_text().splitlines()] == ["s0", "s5", "s6", "s7"]


def test_all_splits_are_checked_and_overrides_hold_wherever_they_stand(moka, config, folder):
    test = f"data.test={folder / 'data.jsonl'}"
    done = moka("data", "check", config, "data.train=embedded:visual-text", "data.train_size=5", "--limit", 3, test)
    assert done.code == 0, done.err[-500:]
    assert "data.train: 5 of 5" in done.out
    assert "data.test: 8 of 8" in done.out
    done = moka("data", "check", config, test, "--split", "test", "model.max_length=5")
    assert done.code == 1  # media only are longer
    assert "data.train" not in done.out
    assert "too long: " in done.out


def test_windows_and_frames_of_the_configuration_are_used(moka, config, tmp_path):
    windows = "data.audio_windows={count: 4, seconds: 0.1, every: 0.1}"
    assert moka("data", "check", config, windows, "--json", tmp_path / "r.json").code == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert set(report["media_tokens"].values()) == {2 + 4 * 2}  # two tokens an item


def test_the_track_of_the_configuration_is_the_one_that_is_tried(moka, config):
    done = moka("data", "check", config, "data.audio_track=1")
    assert done.code == 1
    assert "audio track 1" in " ".join(done.out.split())


def test_what_a_format_leaves_out_is_reported_of_joined_sources_too(moka, config, folder):
    talk = [{"from": "human", "value": "<image>\nwhich"}, {"from": "gpt", "value": "one"}]
    records = [{"id": f"r{kind}", kind: f"0.{kind}", "conversations": talk} for kind in ("image", "video")]
    records[0]["image"] = "0.png"
    (folder / "valley_llavaimage.json").write_text(json.dumps(records))
    source = f"data.train=[{folder / 'data.jsonl'}, {{format: video-llava-image, root: {folder}}}]"
    done = moka("data", "check", config, source, "data.train_size=12")
    assert done.code == 0, done.out + done.err[-500:]
    assert "data.train: 9 of 9" in done.out
    assert "note: 1 record" in done.out
    assert "valley_llavaimage.json" in done.out


def test_mistakes_in_the_call_are_one_line(refused, config, tmp_path):
    assert "data.validation is not set" in refused("data", "check", config, "--split", "validation")
    assert "unknown key" in refused("data", "check", config, "data.trian=x")
    assert "none.jsonl" in refused("data", "check", config, "data.train=none.jsonl")
    both = ("data.test=embedded:visual-text", "--manifest", tmp_path / "x.jsonl")
    assert "Name one by --split" in refused("data", "check", config, *both)
    assert "is there already" in refused("data", "check", config, "--manifest", config)
    assert "audio_windows" in refused("data", "check", config, "data.audio_windows={cuont: 2}")


def test_a_processor_is_made_without_the_backbones_weights(tiny_config, tmp_path, backbones):
    bare = tmp_path / "bare"
    shutil.copytree(backbones["llama"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    section = config_from_dict(tiny_config(tmp_path / "run")).model
    model, processor = build.build_model(section)
    section.backbone = str(bare)
    skeleton, ours = build.build_processor(section)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert ours.modalities == processor.modalities
    assert (ours.vocab_size, ours.end_token_id) == (processor.vocab_size, processor.end_token_id)
    assert build.context_length(section, skeleton.config) == build.context_length(section, model.config)
    picture = {"role": "user", "content": [{"type": "image", "image": Image.new("L", (9, 9), 9)}]}
    for name, value in ours.encode([picture]).items():
        np.testing.assert_array_equal(value, processor.encode([picture])[name])


def labels_shown(out):
    """The supervised column of a plain table, one entry a token."""
    labels = []
    for line in out.splitlines()[2:-2]:  # between the names of the columns and the totals
        position, _, _, _, supervised, _ = line.split(None, 5)
        first, _, last = position.partition("-")
        labels += [supervised == "yes"] * (int(last or first) - int(first) + 1)
    return labels


def test_show_marks_exactly_what_is_learnt(moka, config, folder):
    done = moka("data", "show", config, "--index", 3)
    assert done.code == 0, done.err[-500:]
    assert "data.train[3]: sample 's3', category 'odd'" in done.out
    _, processor = build.build_processor(config_from_dict(yaml.safe_load(config.read_text())).model)
    sample = MediaDecoding().decode_sample(JsonlDataset(folder / "data.jsonl")[3])
    labels = processor.encode(sample["messages"])["labels"]
    assert labels_shown(done.out) == [label != -100 for label in labels]
    assert "<image x2>" in done.out
    assert "<audio x2>" in done.out


def test_show_finds_samples_and_says_when_they_are_shortened(moka, refused, config):
    assert "[5]: sample 's5'" in moka("data", "show", config, "--id", "s5").out
    assert moka("data", "show", config, "--count", 3).out.count(" tokens: ") == 3
    out = moka("data", "show", config, "model.max_length=30").out
    assert "shortened as in training" in out
    assert "\n30 tokens: " in out
    assert "no sample of data.train has the id 's99'" in refused("data", "show", config, "--id", "s99")
    assert "0 to 7" in refused("data", "show", config, "--index", 8)


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_converted_jsonl_has_the_same_samples_and_needs_the_old_folder_no_more(moka, folder, tmp_path, mode):
    (folder / "deep").mkdir()
    (folder / "0.png").rename(folder / "deep/0.png")
    spoil(folder, lambda lines: lines[0]["messages"][0]["content"][0].update(image="deep/0.png"))
    before = [MediaDecoding().decode_sample(sample) for sample in iterate(JsonlDataset(folder / "data.jsonl"))]
    done = moka("data", "convert", folder / "data.jsonl", "--output", tmp_path / "made", "--media", mode)
    assert done.code == 0, done.err[-500:]
    if mode == "link":
        assert (tmp_path / "made/media/1.png").samefile(folder / "1.png")
    shutil.rmtree(folder)
    after = [MediaDecoding().decode_sample(sample) for sample in iterate(JsonlDataset(tmp_path / "made/data.jsonl"))]
    assert (tmp_path / "made/media/deep/0.png").is_file()
    assert len(before) == len(after) == 8
    for one, other in zip(before, after, strict=True):
        assert_same(one, other)


def iterate(samples):
    return (samples[i] for i in range(len(samples)))


def assert_same(one, other):
    assert {key: one[key] for key in one if key != "messages"} == {k: other[k] for k in other if k != "messages"}
    for (kind, ours), (theirs_kind, theirs) in zip(media_parts(one), media_parts(other), strict=True):
        assert kind == theirs_kind
        for name in ("samples", "values"):
            if hasattr(ours, name):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        if kind == "image":
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_an_embedded_task_is_converted_without_loss(moka, tmp_path):
    done = moka(
        *("data", "convert", "embedded:audio-visual-text", "--split", "validation", "--size", 6),
        *("--output", tmp_path / "made"),
    )
    assert done.code == 0, done.err[-500:]
    ours = open_samples("embedded:audio-visual-text", "validation", size=6)
    theirs = JsonlDataset(tmp_path / "made/data.jsonl")
    assert len(theirs) == 6
    assert "CC BY-SA 4.0" in (tmp_path / "made/ATTRIBUTION.md").read_text("utf-8")
    for one, other in zip(iterate(ours), iterate(theirs), strict=True):
        assert_same(one, MediaDecoding().decode_sample(other))


def test_media_that_stay_are_named_from_their_root(moka, folder, tmp_path):
    done = moka("data", "convert", folder / "data.jsonl", "--output", tmp_path / "made", "--media", "none")
    assert done.code == 0, done.err[-500:]
    assert f"data.media_root={folder}" in done.out
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"data.jsonl", "ATTRIBUTION.md"}
    made = JsonlDataset(tmp_path / "made/data.jsonl", media_root=folder)
    assert list(iterate(made)) == list(iterate(JsonlDataset(folder / "data.jsonl")))


def test_a_format_is_converted_with_its_options(moka, refused, tmp_path, folder):
    done = moka(
        "data", "convert", "--format", "messages", "--root", folder, "--output", tmp_path / "made", "file=data.jsonl"
    )
    again = moka("data", "convert", folder, "--format", "messages", "--output", tmp_path / "again", "file=data.jsonl")
    assert (done.code, again.code) == (0, 0), done.err[-500:] + again.err[-500:]
    lines = (tmp_path / "made/data.jsonl").read_text()
    assert len(lines.splitlines()) == 8
    assert lines == (tmp_path / "again/data.jsonl").read_text()


def test_bytes_and_sound_in_memory_become_files_of_the_same_content(tmp_path, folder):
    sound, picture = load_audio(folder / "0.wav"), (folder / "0.png").read_bytes()
    content = [{"type": "audio", "audio": sound}, {"type": "image", "image": picture}]
    convert([{"id": "a", "messages": [{"role": "user", "content": content}]}], tmp_path / "made")
    (_, wav), (_, png) = media_parts(JsonlDataset(tmp_path / "made/data.jsonl", require_answer=False)[0])
    assert (wav[-4:], png[-4:]) == (".wav", ".png")
    np.testing.assert_array_equal(load_audio(wav).samples, sound.samples)
    assert load_audio(wav).rate == sound.rate
    with open(png, "rb") as file:
        assert file.read() == picture


def test_a_killed_conversion_leaves_nothing_after_the_next(tmp_path, folder):
    code = """
import os, signal, sys
from moka.data import convert, jsonl
class Killed(jsonl.JsonlDataset):
    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
convert.convert(Killed(sys.argv[1]), sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder / "data.jsonl"), str(tmp_path / "made")])
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob(".made.*.tmp")
    assert list(leftover.rglob("*.png"))
    mine = tmp_path / ".mine.x.tmp"
    mine.mkdir()
    convert(JsonlDataset(folder / "data.jsonl"), tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"media", "made", ".mine.x.tmp"}


def test_the_folder_of_a_running_conversion_is_left_to_it(tmp_path, folder):
    class Nested(JsonlDataset):
        def __getitem__(self, index):
            if index == 0:  # another conversion to the same folder begins
                convert(JsonlDataset(folder / "data.jsonl"), tmp_path / "made")
            return super().__getitem__(index)

    with pytest.raises(MokaError, match="another process"):
        convert(Nested(folder / "data.jsonl"), tmp_path / "made")
    assert len(JsonlDataset(tmp_path / "made/data.jsonl")) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"media", "made"}


def test_a_full_disk_is_reported_for_the_output_and_not_for_the_source(tmp_path, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(MokaError, match=rf"^{tmp_path}/made .*disk"):
            convert(JsonlDataset(folder / "data.jsonl"), tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"media"}


def test_text_with_half_of_a_surrogate_pair_is_converted_and_named_by_check(moka, config, folder, tmp_path):
    spoil(folder, lambda lines: lines[2]["messages"][0]["content"].append({"type": "text", "text": "\ud800"}))
    done = moka("data", "check", config)
    assert done.code == 1
    assert "template: " in done.out
    assert "data.jsonl:3" in done.out
    convert(JsonlDataset(folder / "data.jsonl"), tmp_path / "made")
    assert JsonlDataset(tmp_path / "made/data.jsonl")[2]["messages"][0]["content"][-1]["text"] == "\ud800"


@pytest.mark.parametrize("option", ["file=[", "file=2026-13-45", "take=" + "9" * 5000])
def test_options_that_are_no_yaml_are_one_line(refused, folder, tmp_path, option):
    line = refused("data", "convert", folder, "--format", "messages", "--output", tmp_path / "made", option)
    assert "options" in line


def test_conversion_never_overwrites_and_leaves_nothing_half_written(refused, folder, tmp_path):
    (folder / "5.wav").unlink()
    line = refused("data", "convert", folder / "data.jsonl", "--output", tmp_path / "made")
    assert "data.jsonl:6: audio" in line
    assert "does not exist" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["media"]
    before = (folder / "data.jsonl").read_text()
    assert "is there already" in refused("data", "convert", folder / "data.jsonl", "--output", folder)
    assert (folder / "data.jsonl").read_text() == before
    assert "nothing to convert" in refused("data", "convert", "--output", tmp_path / "made")
    assert "belong to a --format" in refused(
        "data", "convert", folder / "data.jsonl", "a=b", "--output", tmp_path / "made"
    )
    unknown = ("--format", "mesages", "--root", folder, "--output", tmp_path / "made")
    assert "Did you mean 'messages'" in refused("data", "convert", *unknown)


def test_formats_are_listed_and_explained(moka, refused):
    from moka.data.formats import FORMATS

    listed = moka("data", "formats").out.splitlines()
    assert [line.split()[0] for line in listed] == list(FORMATS)
    for name, format in FORMATS.items():
        out = moka("data", "formats", name).out
        assert format.about in out
        assert all(field in out for field in [*format.fields, *format.options, *format.splits])
    assert "Did you mean 'messages'" in refused("data", "formats", "mesages")


def test_data_of_a_hugging_face_model(moka, folder, tmp_path):
    config = tmp_path / "run.yaml"
    data = {"train": str(folder / "data.jsonl")}
    model = {"kind": "hf", "name": "Qwen/Qwen2.5-Omni-7B"}
    config.write_text(yaml.safe_dump({"stages": [2], "model": model, "data": data}))
    done = moka("data", "check", config, "--tiny", "--json", tmp_path / "report.json")
    assert done.code == 0, done.err[-500:]
    (found,) = json.loads((tmp_path / "report.json").read_text())
    assert found["good"] == found["samples"] == 8
    samples = open_samples(data["train"], "train")
    processor = load_chat_processor("tiny:Qwen2.5-Omni")
    lengths = [len(processor.encode(MediaDecoding().decode_sample(one)["messages"])["input_ids"]) for one in samples]
    assert (found["tokens"]["min"], found["tokens"]["max"]) == (min(lengths), max(lengths))
    assert f"{lengths[1]} tokens" in moka("data", "show", config, "--tiny", "--index", 1).out

    (folder / "2.png").write_bytes(b"no picture")
    (folder / "3.wav").unlink()
    done = moka("data", "check", config, "--tiny", "--json", tmp_path / "bad.json")
    assert done.code == 1
    (found,) = json.loads((tmp_path / "bad.json").read_text())
    assert [problem["index"] for problem in found["problems"]["decoding"]] == [2]
    assert [problem["index"] for problem in found["problems"]["missing"]] == [3]
