"""Decoding of real small files: what sounds and moves arrives right, and each bad file is one line with its name."""

import os
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from moka.data import media_io
from moka.data.media_io import BadMediaError, load_audio, load_features, load_image, load_video
from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform

TONE_HZ = 440
CLOCKWISE = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # QuickTime's matrix of a phone kept upright


def tone(seconds, rate, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * TONE_HZ * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def grey_ramp(count):
    """Frames [48, 64, 3] from dark to bright: the mean of an image says which one it is."""
    return [np.full((48, 64, 3), 20 + 200 * i // count, np.uint8) for i in range(count)]


def write_video(path, frames, rate=5, codec="libx264", gop=250, sound=None, matrix=None, options=None):
    """A video, with a sine of ``sound`` = (codec, Hz) if given."""
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", gop
        if matrix:
            video.set_display_matrix(matrix)
        if sound:
            audio = container.add_stream(sound[0], rate=sound[1], layout="mono")
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode(None))
        if sound:
            samples = tone(len(frames) / rate, sound[1])[None]
            for at in range(0, samples.shape[1], 960):
                block = np.ascontiguousarray(samples[:, at : at + 960])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.rate, frame.pts, frame.time_base = sound[1], at, Fraction(1, sound[1])
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def peak_hz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform.samples))
    return spectrum.argmax() * waveform.rate / waveform.samples.size


def means(images):
    return np.array([np.asarray(image).mean() for image in images])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_an_image_keeps_its_mode_and_pixels(tmp_path, mode):
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8
    made = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    made.save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png")
    assert image.mode == made.mode
    np.testing.assert_array_equal(np.asarray(image), np.asarray(made))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_with_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("1", (400, 300)).save(tmp_path / "bomb.png")
    for limit in (100_000, 10_000):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadMediaError, match=r"bomb\.png: .*pixels"):
            load_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120_000)
    assert load_image(tmp_path / "bomb.png").size == (400, 300)


@pytest.mark.parametrize("shown", ["picture", "video"])
def test_what_was_taken_turned_is_upright(tmp_path, shown):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255  # bright on the left
    if shown == "picture":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
        image = load_image(tmp_path / "x.jpg")
    else:
        (image,) = load_video(write_video(tmp_path / "x.mp4", [pixels] * 5, matrix=CLOCKWISE), 1)
    assert image.size == (48, 64)
    assert np.asarray(image)[:28].mean() > 230  # left has become top
    assert np.asarray(image)[36:].mean() < 25


@pytest.mark.parametrize(
    ("extension", "own_rate"),
    [*(("wav", rate) for rate in (8000, 22050, 44100, 48000)), *((e, 44100) for e in ("flac", "ogg", "mp3", "aiff"))],
)
@pytest.mark.parametrize("rate", [None, 16000])
def test_a_tone_survives_resampling_in_every_format(tmp_path, extension, own_rate, rate):
    soundfile.write(tmp_path / f"x.{extension}", tone(1.0, own_rate), own_rate)
    waveform = load_audio(tmp_path / f"x.{extension}", rate)
    assert waveform.rate == (rate or own_rate)
    assert waveform.samples.dtype == np.float32
    assert waveform.samples.size == pytest.approx(waveform.rate, rel=0.05 if extension in ("mp3", "ogg") else 3e-4)
    assert peak_hz(waveform) == pytest.approx(TONE_HZ, abs=1.5)
    if extension == "wav":
        inner = slice(1000, 7000)  # the filter rings at the ends
        np.testing.assert_allclose(waveform.samples[inner], tone(1.0, waveform.rate)[inner], atol=2e-3)


def test_resampling_does_not_fold_high_tones_down(tmp_path):
    high = np.sin(2 * np.pi * 15000 * np.arange(48000) / 48000).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", high, 48000)
    assert np.abs(load_audio(tmp_path / "x.wav", 16000).samples[500:-500]).max() < 0.01


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.0], 1.0),
        ([0.5, 1.0], 0.75),  # the mean
        ([0, 0, 1.0, 0, 0, 0], 1 / (2 * 0.7071 + 1 + 2 * 0.5)),  # the front centre of 5.1, by FFmpeg's weights
    ],
)
@pytest.mark.parametrize("rate", [None, 8000])
def test_channels_become_one(tmp_path, gains, expected, rate):
    soundfile.write(tmp_path / "x.wav", np.outer(tone(0.5, 16000), gains), 16000, subtype="FLOAT")
    waveform = load_audio(tmp_path / "x.wav", rate)
    inner = slice(500, 3500)
    np.testing.assert_allclose(waveform.samples[inner], expected * tone(0.5, waveform.rate)[inner], atol=2e-3)


def test_samples_stay_within_one_and_integers_in_disguise_are_refused(tmp_path):
    soundfile.write(tmp_path / "hot.wav", tone(0.1, 16000, amplitude=1.5), 16000, subtype="FLOAT")
    assert np.abs(load_audio(tmp_path / "hot.wav").samples).max() == 1.0
    for name, value in [("int.wav", 20000.0), ("nan.wav", np.nan)]:
        soundfile.write(tmp_path / name, np.array([0.0, value, 0.0], np.float32), 16000, subtype="FLOAT")
        with pytest.raises(BadMediaError, match=rf"{name}: has samples up to"):
            load_audio(tmp_path / name)


SOUNDTRACKS = {"x.mp4": ("libx264", ("aac", 44100)), "y.mp4": ("mpeg4", ("aac", 22050))}
SOUNDTRACKS |= {"x.mkv": ("libx264", ("aac", 16000)), "x.ts": ("libx264", ("aac", 16000))}


@pytest.mark.parametrize("name", SOUNDTRACKS)
def test_video_frames_come_in_order_at_their_times_and_its_sound_is_read(tmp_path, name):
    codec, sound = SOUNDTRACKS[name]
    path = write_video(tmp_path / name, grey_ramp(50), codec=codec, gop=12, sound=sound)  # 10 s
    found = means(load_video(path))
    assert len(found) == 10
    assert (np.diff(found) > 0).all()
    wanted = 20 + 200 * (np.arange(10) + 0.5) / 10
    np.testing.assert_allclose(found, wanted, atol=9)  # within two frames, as MPEG-TS rounds its length
    waveform = load_audio(path, 16000)
    assert peak_hz(waveform) == pytest.approx(TONE_HZ, abs=0.5)
    assert waveform.samples.size == pytest.approx(160_000, rel=0.02)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts"])
@pytest.mark.parametrize("gop", [7, 250])
def test_seeking_finds_the_frames_that_decoding_all_finds(tmp_path, name, gop):
    path = write_video(tmp_path / name, grey_ramp(100), gop=gop)  # 20 s
    every = means(load_video(path, 100))
    few = means(load_video(path, 4))  # 5 s apart: sought
    assert (np.diff(every) >= 0).all()
    np.testing.assert_allclose(few, every[[12, 37, 62, 87]], atol=2.5)


def test_a_long_video_is_not_decoded_full(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", grey_ramp(300), gop=10)  # 60 s
    decoded = []
    original = media_io._frames
    monkeypatch.setattr(media_io, "_frames", lambda c, s: (decoded.append(f) or f for f in original(c, s)))
    load_video(path, 3)
    assert 0 < len(decoded) <= 3 * 15


@pytest.mark.parametrize("count", [1, 3])
def test_a_short_video_repeats_its_frames(tmp_path, count):
    path = write_video(tmp_path / "x.mp4", grey_ramp(count))
    images = load_video(path, 9)
    assert len(images) == 9
    levels = np.round(means(images)).astype(int)
    assert len(set(levels)) == count
    assert (np.diff(levels) >= 0).all()


def test_a_gif_is_a_video_too(tmp_path):
    first, *rest = [Image.fromarray(frame) for frame in grey_ramp(10)]
    first.save(tmp_path / "x.gif", save_all=True, append_images=rest, duration=1000)
    assert (np.diff(means(load_video(tmp_path / "x.gif"))) > 0).all()


def bad_files(folder):
    """Name -> (loader, words of the reason); the files are made in ``folder``."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        noise.save(folder / name)
    for name in ("cut.wav", "cut.flac", "cut.aiff"):
        soundfile.write(folder / name, tone(2.0, 16000), 16000)
    sound = ("aac", 16000)
    write_video(folder / "cut.mp4", grey_ramp(50), sound=sound)
    write_video(folder / "cut_web.mp4", grey_ramp(50), sound=sound, options={"movflags": "faststart"})
    write_video(folder / "cut.mkv", grey_ramp(50))
    write_video(folder / "cut.avi", grey_ramp(50), codec="mpeg4")
    np.save(folder / "cut.npy", rng.normal(size=(20, 13)))
    sounding = write_video(folder / "cut_sound.mp4", grey_ramp(50), sound=sound, options={"movflags": "faststart"})
    sounding.write_bytes(sounding.read_bytes()[: sounding.stat().st_size * 5 // 6])
    for path in list(folder.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])

    for number, content in enumerate(
        (b"PK\x03\x04" + b"\x00" * 40, b"\x93NUMPY\x01\x00\xff\xff{'d", b"\x93NUMPY\x09\x00")
    ):
        (folder / f"no_array_{number}.npy").write_bytes(content)
    (folder / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    noise.save(folder / "image.wav", format="png")
    write_video(folder / "silent.mp4", grey_ramp(5))
    soundfile.write(folder / "song.wav", tone(0.2, 16000), 16000)
    np.save(folder / "flat.npy", np.zeros(5))
    np.save(folder / "complete.npy", np.zeros((5, 2), int))
    np.save(folder / "nan.npy", np.full((5, 2), np.nan))
    np.save(folder / "pickle.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.savez(folder / "many.npz", a=np.zeros((2, 2)))
    (folder / "many.npz").rename(folder / "many.npy")
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    for extension in ("png", "wav", "mp4", "npy"):
        (folder / f"text.{extension}").write_text("Not found\n" * 40)
        (folder / f"zero.{extension}").touch()
        (folder / f"folder.{extension}").mkdir()

    loaders = {"png": load_image, "wav": load_audio, "mp4": load_video, "npy": load_features}
    expected = {
        "cut.png": (load_image, "truncated"),
        "cut.jpg": (load_image, "truncated"),
        "cut.webp": (load_image, ""),
        "cut.wav": (load_audio, "truncated"),
        "cut.flac": (load_audio, "truncated"),
        "cut.aiff": (load_audio, "truncated"),
        "cut.mp4": (load_video, "truncated"),
        "cut_web.mp4": (load_video, "is truncated: its video ends at"),
        "cut.mkv": (load_video, "is truncated"),
        "cut.avi": (load_video, "truncated"),
        "cut.npy": (load_features, "cannot be decoded"),
        "image.wav": (load_audio, "not in a format that is read"),
        "silent.mp4": (load_audio, "no audio stream (it has video)"),
        "song.wav": (load_video, "no video stream (it has audio)"),
        "flat.npy": (load_features, "float64 [5]; audio features are floats [frames, bins]"),
        "complete.npy": (load_features, "int64 [5, 2]"),
        "nan.npy": (load_features, "not finite"),
        "pickle.npy": (load_features, "cannot be decoded"),
        "many.npy": (load_features, "one .npy array, as numpy.save writes it"),
        "playlist.mp4": (load_video, "cannot be decoded"),
        "cut_sound.mp4": (load_audio, "is truncated"),
        "program.png": (load_image, "is not an image"),  # Pillow would start Ghostscript
        **{f"no_array_{number}.npy": (load_features, "") for number in range(3)},
    }
    for extension, loader in loaders.items():
        expected[f"gone.{extension}"] = (loader, "does not exist")
        expected[f"zero.{extension}"] = (loader, "is empty (0 bytes)")
        expected[f"folder.{extension}"] = (loader, "is a folder")
        expected[f"text.{extension}"] = (loader, " not ")
    return expected


def test_each_bad_file_is_one_line_that_names_it_and_ffmpeg_is_quiet(tmp_path, capfd):
    expected = bad_files(tmp_path)
    capfd.readouterr()
    for name, (loader, words) in expected.items():
        with pytest.raises(BadMediaError) as caught:
            loader(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: "), message
        assert words in caught.value.reason, message
        assert "\n" not in message
        assert len(message) < 300 + len(str(tmp_path))
        assert caught.value.file == str(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path):
    expected = bad_files(tmp_path)
    write_video(tmp_path / "good.mp4", grey_ramp(5), sound=("aac", 16000))
    before = len(os.listdir("/proc/self/fd"))
    errors = []  # kept, with their tracebacks
    for name, (loader, _) in expected.items():
        with pytest.raises(BadMediaError) as caught:
            loader(tmp_path / name)
        errors.append(caught)
    load_video(tmp_path / "good.mp4")
    load_audio(tmp_path / "good.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_pyav_the_remedy_is_reported(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.wav", tone(0.1, 16000), 16000)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MokaError, match=r"pip install 'moka-peft\[media\]'") as caught:
        load_audio(tmp_path / "x.wav")
    assert not isinstance(caught.value, BadMediaError)  # not to be counted as a bad file


@pytest.mark.parametrize("given", [0, -1, 16000.0])
def test_rates_and_frame_counts_are_positive_integers(tmp_path, given):
    with pytest.raises(MokaError, match="rate is"):
        load_audio(tmp_path / "x.wav", given)
    with pytest.raises(MokaError, match="frames is"):
        load_video(tmp_path / "x.mp4", given)


def as_arrays(medium):
    """Return what a decoded medium has, to be compared."""
    if isinstance(medium, list):
        return [as_arrays(item) for item in medium]
    if isinstance(medium, Waveform):
        return medium.rate, medium.samples.tolist()
    return medium.values.tolist() if isinstance(medium, AudioFeatures) else (medium.mode, medium.tobytes())


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        *((load_image, name) for name in ("x.png", "turned.jpg", "x.gif")),
        *((load_audio, name) for name in ("x.wav", "x.flac", "x.mp4", "x.mkv")),
        *((load_video, name) for name in ("x.mp4", "x.mkv", "long.mp4", "x.gif")),
        (load_features, "x.npy"),
    ],
)
def test_bytes_are_decoded_as_the_file_is(tmp_path, loader, name):
    path = tmp_path / name
    if name == "x.npy":
        np.save(path, np.random.default_rng(0).normal(size=(7, 13)))
    elif name in ("x.wav", "x.flac"):
        soundfile.write(path, tone(0.5, 22050), 22050)
    elif name == "x.gif":
        first, *rest = [Image.fromarray(frame) for frame in grey_ramp(4)]
        first.save(path, save_all=True, append_images=rest, duration=1000)
    elif path.suffix in (".mp4", ".mkv"):
        write_video(path, grey_ramp(150 if name == "long.mp4" else 10), gop=10, sound=("aac", 16000))  # long: sought
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(grey_ramp(3)[1]).save(path, exif=exif)
    assert as_arrays(loader(path.read_bytes())) == as_arrays(loader(path))


def test_bad_bytes_have_the_reasons_of_bad_files(tmp_path):
    """But for how the system names a file, and a cut array, whose size a file says beforehand."""
    for name, (loader, words) in bad_files(tmp_path).items():
        if not (tmp_path / name).is_file():
            continue
        content = (tmp_path / name).read_bytes()
        with pytest.raises(BadMediaError) as caught:
            loader(content)
        assert words in caught.value.reason, name
        assert str(caught.value).startswith(f"{len(content)} bytes in memory: "), name
        assert "\n" not in str(caught.value)


def test_playlists_cannot_send_ffmpeg_to_another_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("secret.wav", tone(1.0, 16000), 16000)
    write_video("secret.ts", grey_ramp(10), sound=("aac", 16000))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    for name, content in (("x.m3u8", playlist), ("x.ffconcat", "ffconcat version 1.0\nfile secret.wav\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadMediaError, match="not in a format that is read"):
            load_audio(tmp_path / name)
        with pytest.raises(BadMediaError):
            load_audio(content.encode())


def write_with_times(path, frame_times, sound_span=None, rate=5):
    """A video whose frames [k] of a grey ramp have these time stamps (seconds), with sound from and to given times."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", 1
        video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound_span else None
        for picture, at in zip(grey_ramp(len(frame_times)), frame_times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = round(at * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            first, last = (round(16000 * at) for at in sound_span)
            samples = tone((last - first) / 16000, 16000)[None]
            for at in range(0, samples.shape[1], 1024):
                block = np.ascontiguousarray(samples[:, at : at + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.rate, frame.pts, frame.time_base = 16000, first + at, Fraction(1, 16000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def expected_means(frame_times, wanted):
    ramp = [20 + 200 * k // len(frame_times) for k in range(len(frame_times))]
    return [ramp[int(np.argmin(np.abs(np.array(frame_times) - at)))] for at in wanted]


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4"])
def test_a_gap_between_frames_is_not_the_end(tmp_path, name):
    times = [*(k / 5 for k in range(10)), *(20 + k / 5 for k in range(10))]
    images = load_video(write_with_times(tmp_path / name, times), frames=5)
    wanted = [(k + 0.5) * 22 / 5 for k in range(5)]
    np.testing.assert_allclose(means(images), expected_means(times, wanted), atol=6)


def test_frames_are_chosen_by_their_own_time_stamps(tmp_path):
    """The file is as long as its sound, and its video only the last part of that."""
    times = [5 + k / 5 for k in range(10)]
    path = write_with_times(tmp_path / "x.mkv", times, sound_span=(0, 7))
    wanted = [5 + (k + 0.5) * 2 / 5 for k in range(5)]
    np.testing.assert_allclose(means(load_video(path, frames=5)), expected_means(times, wanted), atol=6)


def test_silence_before_a_late_sound_is_kept(tmp_path):
    path = write_with_times(tmp_path / "x.mkv", [k / 5 for k in range(20)], sound_span=(1.5, 4))
    samples = load_audio(path, 16000).samples
    assert len(samples) / 16000 == pytest.approx(4, abs=0.1)
    assert np.abs(samples[: 16000 * 14 // 10]).max() < 0.01
    assert np.abs(samples[16000 * 17 // 10 :]).max() > 0.2


def test_a_wav_header_that_states_far_too_much_is_one_of_a_stream(tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(1.0, 16000), 16000)
    raw = bytearray((tmp_path / "x.wav").read_bytes())
    for claim in (2_000_000_000, 0xFFFFFFFF, 0):
        raw[4:8] = raw[40:44] = claim.to_bytes(4, "little")
        (tmp_path / "x.wav").write_bytes(raw)
        assert len(load_audio(tmp_path / "x.wav").samples) == 16000


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_do_not_make_a_broken_picture(tmp_path, format):
    path = tmp_path / "x"
    Image.new("RGB", (8, 6), (10, 200, 30)).save(path, format, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f broken")
    assert load_image(path).size == (8, 6)


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("12:30.wav", tone(0.5, 16000), 16000)
    assert len(load_audio("12:30.wav").samples) == 8000


def test_channels_that_cancel_are_reported(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.stack([tone(1.0, 16000), -tone(1.0, 16000)], 1), 16000)
    with pytest.warns(UserWarning, match=r"x\.wav"):
        load_audio(tmp_path / "x.wav")


def test_sizes_are_bounded_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("moka.data.media_io.MAX_AUDIO_SECONDS", 5.0)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100, np.float32), 1)
    soundfile.write(tmp_path / "long.flac", np.zeros(16000 * 8, np.float32), 16000)
    Image.new("L", (1, 5000)).save(tmp_path / "thin.png")
    for name, load, word in (
        ("slow.wav", load_audio, "MAX_AUDIO_SECONDS"),
        ("long.flac", load_audio, "MAX_AUDIO_SECONDS"),
        ("thin.png", load_image, "MAX_ASPECT_RATIO"),
    ):
        with pytest.raises(BadMediaError, match=rf"{name}.*{word}"):
            load(tmp_path / name)


def test_a_gap_in_the_sound_is_silence(tmp_path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for at in (*range(0, 16000, 1600), *range(48000, 64000, 1600)):  # 0 to 1 s, 3 to 4 s
            block = (tone(0.1, 16000)[None] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, at, Fraction(1, 16000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    for rate in (16000, 8000):
        samples = load_audio(path, rate).samples
        assert len(samples) == pytest.approx(4 * rate, abs=20)
        loud = [float(np.abs(samples[int(at * rate) : int((at + 0.5) * rate)]).max()) for at in (0.3, 1.4, 2.4, 3.3)]
        np.testing.assert_allclose(loud, [0.5, 0, 0, 0.5], atol=0.03)


def test_a_track_can_be_chosen(tmp_path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(2)]
        for stream, level in zip(streams, (1000, 20000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 4000), level, np.int16), format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(stream.encode(frame))
    for given, level in (({}, 1000), ({"track": 0}, 1000), ({"track": 1}, 20000)):
        np.testing.assert_allclose(load_audio(path, **given).samples, level / 32768, atol=1e-4)
    with pytest.raises(BadMediaError, match=r"track 2; its audio tracks are 0 to 1"):
        load_audio(path, track=2)


def test_a_sound_that_is_too_long_is_not_decoded_to_its_end(tmp_path, monkeypatch):
    decoded = []
    original = media_io._frames
    monkeypatch.setattr(media_io, "_frames", lambda c, s: (decoded.append(f) or f for f in original(c, s)))
    monkeypatch.setattr(media_io, "MAX_AUDIO_SECONDS", 1.0)
    soundfile.write(tmp_path / "x.flac", np.zeros(16000 * 60, np.float32), 16000)
    with pytest.raises(BadMediaError, match="MAX_AUDIO_SECONDS"):
        load_audio(tmp_path / "x.flac")
    assert sum(frame.samples for frame in decoded) < 16000 * 2


def test_decoding_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.flac", tone(1.0, 16000), 16000)
    monkeypatch.setattr("moka.data.media_io.MAX_DECODING_SECONDS", -1.0)
    with pytest.raises(BadMediaError, match=r"x\.flac.*MAX_DECODING_SECONDS"):
        load_audio(tmp_path / "x.flac")
