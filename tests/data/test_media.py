"""Samples with decoded media, and what is done about files that cannot be used."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from moka.config import DataSection
from moka.data.audio_segments import AudioWindows
from moka.data.media import BadMediaPolicy, DecodedDataset, MediaDecoding, SampleReport
from moka.data.media_io import BadMediaError
from moka.data.schema import check_sample, media_parts
from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform


def write_sound(path, seconds=0.5, rate=8000):
    soundfile.write(path, np.sin(np.arange(int(seconds * rate))).astype(np.float32) / 2, rate)


def write_gif(path, count=5):
    first, *rest = [Image.new("L", (4, 4), 40 * shade) for shade in range(count)]
    first.save(path, save_all=True, append_images=rest, duration=1000)


def asks(name, **media):
    content = [{"type": kind, kind: medium} for kind, medium in media.items()]
    content.append({"type": "text", "text": f"Question {name}"})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    return check_sample({"id": name, "messages": messages}, "made:1")


def test_decode_sample_replaces_each_path_by_its_medium(tmp_path):
    Image.new("L", (3, 2)).save(tmp_path / "x.png")
    write_sound(tmp_path / "x.wav")
    write_gif(tmp_path / "x.gif")
    np.save(tmp_path / "x.npy", np.ones((7, 13)))
    kept = Image.new("RGB", (1, 1))
    first = asks("a", image=str(tmp_path / "x.png"), audio=str(tmp_path / "x.wav"), video=str(tmp_path / "x.gif"))
    image, sound, video = (medium for _, medium in media_parts(MediaDecoding(4).decode_sample(first)))
    assert image.size == (3, 2)
    assert isinstance(sound, Waveform)
    assert sound.rate == 8000
    assert len(video) == 4
    second = MediaDecoding().decode_sample(asks("b", image=kept, audio=str(tmp_path / "x.npy")))
    image, features = (medium for _, medium in media_parts(second))
    assert image is kept
    assert isinstance(features, AudioFeatures)
    assert (features.kind, features.values.shape, features.values.dtype) == ("mfcc", (7, 13), np.float32)
    assert second["messages"][0]["content"][-1]["text"] == "Question b"


def image_samples(folder, count, bad=()):
    for i in range(count):
        path = folder / f"{i}.png"
        if i in bad:
            path.write_text("text")
        else:
            Image.new("L", (2, 2), i).save(path)
    return [asks(f"s{i}", image=str(folder / f"{i}.png")) for i in range(count)]


def test_under_error_the_first_bad_file_stops_with_sample_and_file(tmp_path):
    dataset = DecodedDataset(image_samples(tmp_path, 3, bad={1}))
    assert dataset[0]["id"] == "s0"
    with pytest.raises(BadMediaError) as caught:
        dataset[1]
    assert str(caught.value).startswith(f"sample 's1': {tmp_path / '1.png'}: ")
    assert dataset.report == [
        {"index": 1, "id": "s1", "file": str(tmp_path / "1.png"), "reason": caught.value.reason, "action": "error"},
    ]
    assert dataset[-1]["id"] == "s2"
    with pytest.raises(IndexError):
        dataset[3]


def test_a_substitute_is_a_full_good_sample_fixed_by_seed_and_index(tmp_path):
    bad = {2, 5, 6}
    samples = image_samples(tmp_path, 20, bad)
    policy = BadMediaPolicy("substitute", budget=0.15)
    dataset = DecodedDataset(samples, None, policy, seed=3)
    found = [dataset[i] for i in range(20)]
    assert len(found) == len(dataset)
    for i, sample in enumerate(found):
        number = int(sample["id"][1:])
        assert number not in bad
        if i not in bad:
            assert number == i
        (_, image), *_ = media_parts(sample)
        assert image.getpixel((0, 0)) == number  # medium, text and id are of one sample
        assert sample["messages"][0]["content"][-1]["text"] == f"Question s{number}"
    assert {(record["index"], record["action"]) for record in dataset.report} == {(i, "substitute") for i in bad}
    again = DecodedDataset(samples, None, policy, seed=3)
    assert [again[i]["id"] for i in reversed(range(20))] == [sample["id"] for sample in reversed(found)]
    choices = {tuple(DecodedDataset(samples, None, policy, seed=s)[i]["id"] for i in sorted(bad)) for s in range(5)}
    assert len(choices) > 1


def test_the_budget_counts_bad_samples_once_and_ends_the_run_when_exceeded(tmp_path):
    dataset = DecodedDataset(
        image_samples(tmp_path, 40, bad={0, 1, 2}), policy=BadMediaPolicy("substitute", 0.05), seed=1
    )
    for _ in range(4):
        dataset[0], dataset[1]
    assert len(dataset.report) == 2
    with pytest.raises(MokaError, match=r"3 of 40 samples .* budget of 0\.05 allows \(2\)") as caught:
        dataset[2]
    assert str(tmp_path / "2.png") in str(caught.value)
    with pytest.raises(MokaError, match="budget of 0 "):
        DecodedDataset(dataset.dataset, policy=BadMediaPolicy("substitute", 0.0))[0]


def test_processes_share_report_and_budget_through_the_report_file(tmp_path):
    samples = image_samples(tmp_path, 20, bad={0, 1, 2})
    path = tmp_path / "bad_media.jsonl"
    one, other = (DecodedDataset(samples, policy=BadMediaPolicy("substitute", 0.1), report_path=path) for _ in range(2))
    one[0], other[0], other[1]
    assert {record["id"] for record in one.report} == {record["id"] for record in other.report} == {"s0", "s1"}
    with pytest.raises(MokaError, match="3 of 20"):
        one[2]
    assert {json.loads(line)["file"] for line in path.read_text().splitlines()} == {
        str(tmp_path / f"{i}.png") for i in range(3)
    }


def test_mistakes_that_are_not_bad_media_are_never_substituted(tmp_path):
    class Broken(list):
        def __getitem__(self, index):
            raise MokaError("train.jsonl:3: messages is empty.")

    dataset = DecodedDataset(Broken([1, 2]), policy=BadMediaPolicy("substitute", 1.0))
    with pytest.raises(MokaError, match=r"train\.jsonl:3"):
        dataset[0]
    assert dataset.report == []


@pytest.mark.parametrize(("given", "words"), [(("substitut",), "Did you mean 'substitute'"), (("error", 2), "0 to 1")])
def test_unknown_policies_and_budgets_are_refused(given, words):
    with pytest.raises(MokaError, match=words):
        BadMediaPolicy(*given)


def test_a_sample_of_bytes_is_decoded_and_its_errors_name_the_sample(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()

    def of(image):
        return {"id": "row7", "messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]}

    ((_, image),) = media_parts(MediaDecoding().decode_sample(of(content)))
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), 7)
    with pytest.raises(BadMediaError, match=r"^sample 'row7': image, 40 bytes in memory: ") as caught:
        MediaDecoding().decode_sample(of(content[:40]))
    assert caught.value.file == "image bytes of sample 'row7'"


def test_sound_parts_become_lists_of_windows_and_other_media_stay(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.arange(80) / 100, 8, subtype="FLOAT")  # 10 s
    write_gif(tmp_path / "x.gif")
    sample = asks("a", audio=str(tmp_path / "x.wav"), video=str(tmp_path / "x.gif"))
    windows = AudioWindows(count=2, seconds=2.0, every=5.0)
    for dataset in ([sample], [MediaDecoding(3).decode_sample(sample)]):  # files, and sound that is decoded already
        (_, sounds), (_, frames) = media_parts(DecodedDataset(dataset, MediaDecoding(3, windows))[0])
        assert len(frames) == 3
        np.testing.assert_allclose([w.samples for w in sounds], [np.arange(12, 28) / 100, np.arange(52, 68) / 100])


def test_windows_of_ready_made_features_are_refused_and_never_substituted(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((7, 13)))
    policy = BadMediaPolicy("substitute", 1.0)
    for features in (str(tmp_path / "x.npy"), AudioFeatures(np.ones((7, 13), np.float32), "mfcc")):
        dataset = DecodedDataset([asks("a", audio=features)], MediaDecoding(audio_windows=AudioWindows()), policy)
        with pytest.raises(MokaError, match=r"ready-made features.*data\.audio_windows") as caught:
            dataset[0]
        assert not isinstance(caught.value, BadMediaError)


def test_a_track_of_the_configuration_is_the_one_that_is_decoded(tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(2)]
        for stream, level in zip(streams, (1000, 20000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 4000), level, np.int16), format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(stream.encode(frame))
    sample = asks("a", audio=str(tmp_path / "x.mkv"))
    for track, level in ((0, 1000), (1, 20000)):
        decoding = MediaDecoding.of(DataSection(audio_track=track))
        ((_, sound),) = media_parts(decoding.decode_sample(sample))
        np.testing.assert_allclose(sound.samples, level / 32768, atol=1e-4)
    with pytest.raises(BadMediaError, match=r"'a'.*x\.mkv.* track 2"):
        MediaDecoding(audio_track=2).decode_sample(sample)


@pytest.mark.parametrize(
    "decoding", [MediaDecoding(), MediaDecoding(4, AudioWindows(count=3, first=0.25), audio_track=1)]
)
def test_the_decoding_of_a_model_is_read_back(decoding):
    assert MediaDecoding.of(json.loads(json.dumps(decoding.to_dict()))) == decoding


def test_items_are_counted_as_they_are_decoded(tmp_path):
    write_gif(tmp_path / "x.gif")
    write_sound(tmp_path / "x.wav")
    np.save(tmp_path / "x.npy", np.ones((7, 13)))
    picture = Image.new("L", (2, 2))
    files = [("image", picture), ("image", "x.gif"), ("video", "x.gif"), ("video", [picture] * 2), ("audio", "x.wav")]
    for decoding in (MediaDecoding(3), MediaDecoding(3, AudioWindows(count=4))):
        for kind, medium in files if decoding.audio_windows else [*files, ("audio", "x.npy")]:
            given = str(tmp_path / medium) if isinstance(medium, str) else medium
            decoded = decoding.decode(kind, given)
            assert decoding.items(kind, given) == (len(decoded) if isinstance(decoded, list) else 1), (kind, medium)


def test_a_report_of_several_processes_is_read_once_however_long_it_is(tmp_path, monkeypatch):
    path = tmp_path / "report.jsonl"
    one, other = SampleReport(path), SampleReport(path)
    read = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    for index in range(50):
        assert one.add(2 * index, f"s{index}", "bad", "substitute")
        assert other.add(2 * index + 1, f"s{index}", "bad", "replaced")
        assert len(one) == len(other) == 2 * index + 2
    assert not one.add(0, "s0", "bad", "substitute")
    with open(path, "ab") as file:
        file.write(b'{"index": 100, "id"')  # cut off by a kill
    assert len(one) == 100
    assert list(one.records("replaced")) == list(range(1, 100, 2))
    assert len(read) <= 2 * 100
