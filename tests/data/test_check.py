"""The check of a data set: each kind of problem is found, counted and placed, and what is good is reported apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from moka.data.audio_segments import AudioWindows
from moka.data.check import CheckReport, check_samples, spread
from moka.data.convert import write_manifest
from moka.data.jsonl import JsonlDataset
from moka.data.media import MediaDecoding
from moka.data.sources import open_samples
from moka.errors import MokaError
from moka.modeling import MokaProcessor
from moka.modeling.encoders import build_encoder

VISUAL = {"encoder": {"type": "conv-image", "image_size": 8, "num_tokens": 2}, "type_ids": [1], "tokens": 2}
AUDIO = {"encoder": {"type": "conv-audio", "frames": 8, "num_tokens": 3}, "type_ids": [3], "tokens": 3}  # 0.2 s
IGNORE = -100


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    return MokaProcessor(
        tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )


def line(number, answer="seven", question="which digit is spoken", **media):
    content = [{"type": kind, kind: path} for kind, path in media.items()]
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": f"s{number}", "category": "even" if number % 2 == 0 else "odd", "messages": messages}


@pytest.fixture
def folder(tmp_path):
    """Six good samples: a picture and a sound of 0.15 s each, one sound at 44.1 kHz."""
    lines = []
    for number in range(6):
        Image.new("L", (10, 8), 40 * number).save(tmp_path / f"{number}.png")
        rate = 44100 if number == 5 else 8000
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * np.sin(np.arange(int(0.15 * rate))), rate)
        lines.append(line(number, image=f"{number}.png", audio=f"{number}.wav"))
    return tmp_path, lines


def write(folder, lines):
    path = folder / "train.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return JsonlDataset(path)


def test_a_clean_set_has_no_problem_and_its_figures_are_those_of_the_encoded_samples(folder, processor):
    samples = write(*folder)
    report = check_samples(samples, processor)
    assert report.problems == []
    assert report.good == list(range(6))
    assert report.categories == {"even": 3, "odd": 3}
    assert report.layouts == {"1 image, 1 audio": 6}
    assert report.sampling_rates == {8000: 5, 44100: 1}
    assert report.resampled == 1
    decoded = open_samples_decoded(samples)
    encoded = [processor.encode(sample["messages"]) for sample in decoded]
    assert report.lengths == [len(one["input_ids"]) for one in encoded]
    assert report.media_tokens == [sum(t > 0 for t in one["mm_token_type_ids"]) for one in encoded] == [5] * 6
    assert report.supervised == [sum(label != IGNORE for label in one["labels"]) for one in encoded]


def open_samples_decoded(samples):
    return [MediaDecoding().decode_sample(samples[i]) for i in range(len(samples))]


def test_every_kind_of_problem_is_found_in_one_pass_with_its_place(folder, processor):
    root, lines = folder
    (root / "cut.png").write_bytes((root / "1.png").read_bytes()[:40])
    lines += [
        "{not json",  # 6
        {"id": "s7", "messages": []},
        line(0, image="0.png"),  # 8: the id of the first
        line(9, image="gone.png"),
        line(10, image="cut.png"),
        line(11, image="gone.png", audio="0.wav"),
        line(12, video="0.wav"),  # 12: read by no video reader
        line(13, question="seven " * 300),
        line(14, image="../outside.png"),
    ]
    report = check_samples(write(root, lines), processor, max_length=60, workers=2)
    assert {kind: [problem.index for problem in report.of(kind)] for kind in ("schema", "duplicate", "missing")} == {
        "schema": [6, 7, 14],
        "duplicate": [8],
        "missing": [9, 11],
    }
    assert [p.index for p in report.of("decoding")] == [10, 12]
    assert report.good == [0, 1, 2, 3, 4, 5, 13]
    assert report.shortened == 1
    assert "train.jsonl:7: is not valid JSON" in report.of("schema")[0].text
    assert "train.jsonl:9: id 's0' is that of" in report.of("duplicate")[0].text
    assert {p.file for p in report.of("missing")} == {str(root.resolve() / "gone.png")}
    assert "train.jsonl:11: sample 's10': image" in report.of("decoding")[0].text
    assert [problem.index for problem in report.problems] == sorted(problem.index for problem in report.problems)
    again = check_samples(write(root, lines), processor, max_length=60, workers=1)
    assert again.to_dict() == report.to_dict()
    json.dumps(report.to_dict())


def test_media_that_no_encoder_takes(folder, processor, tiny_tokenizer):
    root, lines = folder
    np.save(root / "x.npy", np.ones((5, 12)))  # not the 13 coefficients
    lines += [line(6, audio="x.npy")]
    blind = MokaProcessor(tiny_tokenizer, {"audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml")
    report = check_samples(write(root, lines), blind)
    assert [p.index for p in report.of("encoder")] == list(range(7))
    assert "no encoder for image; its modalities: audio" in report.problems[0].text
    report = check_samples(write(root, lines), processor)
    assert [p.index for p in report.problems] == [6]
    assert "MFCC of shape [5, 12]" in report.problems[0].text


def test_a_video_without_sound_is_a_problem_only_where_its_sound_is_asked_for(tmp_path, tiny_tokenizer):
    import av

    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    visual = {**VISUAL, "type_ids": [1, 2]}
    processor = MokaProcessor(
        tiny_tokenizer, {"visual": visual, "audio": AUDIO}, len(tiny_tokenizer), chat_template="chatml"
    )
    samples = write(tmp_path, [line(0, video="silent.mp4"), line(1, video="silent.mp4", audio="silent.mp4")])
    report = check_samples(samples, processor, decoding=MediaDecoding(4))
    assert report.good == [0]
    assert report.media_tokens == [4 * 2]
    assert "silent.mp4: has no audio stream (it has video)" in report.problems[0].text


def test_clips_longer_than_the_encoder_takes_are_counted_and_windows_cure_them(folder, processor):
    root, lines = folder
    soundfile.write(root / "long.wav", np.zeros(4000, np.float32), 8000)  # 0.5 s; the encoder takes 0.2 s
    samples = write(root, [*lines, line(6, audio="long.wav"), line(7, audio="long.wav")])
    encoders = {"audio": build_encoder(AUDIO["encoder"], pretrained=False)}
    report = check_samples(samples, processor, encoders=encoders)
    assert report.cut == 1  # the file, not the samples
    assert report.good == list(range(8))
    windows = AudioWindows(count=3, seconds=0.1, every=0.1)
    report = check_samples(samples, processor, encoders=encoders, decoding=MediaDecoding(audio_windows=windows))
    assert report.cut == 0
    assert report.media_tokens == [2 + 3 * 3] * 6 + [3 * 3] * 2


def test_samples_too_long_for_shortening_and_samples_without_supervision_are_problems(folder, processor):
    root, lines = folder
    report = check_samples(write(root, lines), processor, max_length=8)  # media and template only are longer
    assert [p.index for p in report.of("too long")] == list(range(6))
    assert report.good == []
    mute = [{"id": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}]}]
    report = check_samples(mute, processor)
    assert [p.kind for p in report.problems] == ["unsupervised"]
    assert report.supervised == [0]


def test_a_template_that_refuses_a_chat_is_reported_with_the_sample(folder, tiny_tokenizer):
    template = "{{ raise_exception('only one turn') }}"
    strict = MokaProcessor.__new__(MokaProcessor)
    strict.__dict__ = MokaProcessor(tiny_tokenizer, {"visual": VISUAL, "audio": AUDIO}, 400).__dict__
    strict.chat_template = template
    report = check_samples(write(*folder), strict)
    assert len(report.of("template")) == 6
    assert "sample 's0'" in report.problems[0].text
    assert "only one turn" in report.problems[0].text


def test_windows_of_ready_made_features_stop_the_check(tmp_path, processor):
    np.save(tmp_path / "x.npy", np.ones((5, 13)))
    with pytest.raises(MokaError, match="ready-made features"):
        check_samples(
            write(tmp_path, [line(0, audio="x.npy")]), processor, decoding=MediaDecoding(audio_windows=AudioWindows())
        )


def test_the_manifest_has_exactly_the_good_samples_and_reads_the_same(folder, processor, tmp_path_factory):
    root, lines = folder
    lines[2]["messages"][0]["content"][0]["image"] = "gone.png"
    lines.insert(4, "{")
    samples = write(root, lines)
    report = check_samples(samples, processor)
    path = tmp_path_factory.mktemp("elsewhere") / "clean.jsonl"
    media_root = write_manifest(path, samples, report.good)
    assert media_root == root.resolve()
    clean = JsonlDataset(path, media_root=media_root)
    assert [clean[i] for i in range(len(clean))] == [samples[i] for i in (0, 1, 3, 5, 6)]
    assert str(root) not in path.read_text()  # it can be moved together with the media
    assert check_samples(clean, processor).problems == []
    with pytest.raises(MokaError, match="is there already"):
        write_manifest(path, samples, report.good)
    with pytest.raises(MokaError, match="not one sample is good"):
        write_manifest(path.with_name("none.jsonl"), samples, [])


def test_a_manifest_of_several_sources_starts_at_the_folder_of_all(folder, tmp_path):
    root, lines = folder
    (root / "more").mkdir()
    Image.new("L", (4, 4)).save(root / "more" / "x.png")
    (root / "more" / "b.jsonl").write_text(json.dumps(line(9, image="x.png")) + "\n")
    write(root, lines)
    joined = open_samples([str(root / "train.jsonl"), str(root / "more" / "b.jsonl")], "train")
    media_root = write_manifest(tmp_path / "all.jsonl", joined, [0, 6])
    clean = JsonlDataset(tmp_path / "all.jsonl", media_root=media_root)
    assert [clean[i] for i in range(2)] == [joined[0], joined[6]]


def test_media_in_no_file_cannot_be_in_a_manifest(tmp_path, folder):
    made = [line(0, image=Image.new("L", (2, 2)))]
    with pytest.raises(MokaError, match="moka data convert"):
        write_manifest(tmp_path / "x.jsonl", made, [0])
    assert not list(tmp_path.glob("x.jsonl*"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], {}), ([7], {"min": 7, "median": 7, "p95": 7, "max": 7}), (list(range(1, 101)), {"min": 1, "max": 100})],
)
def test_the_spread_of_values(values, expected):
    assert expected.items() <= spread(values).items()
    if len(values) == 100:
        assert spread(values)["median"] in (50, 51)
        assert spread(values)["p95"] in (95, 96)


def test_an_empty_report_is_all_good():
    assert CheckReport("x", 3).good == [0, 1, 2]
