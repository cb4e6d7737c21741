"""Readers of media files: images by Pillow, sound and video by PyAV, ready-made audio features from ``.npy``.

Each takes a path, or the ``bytes`` of an encoded file (a cell of a Parquet or TSV table). A file that cannot be used
raises `BadMediaError`, one line that names the file and the fault. Formats are recognised by content, and only those listed
here are opened: none that names other files (playlists), none that is a program for an interpreter (EPS, PDF).
"""

from __future__ import annotations

import io
import os
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform

_IMAGE_FORMATS = ["AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
_CONTAINERS = (
    "wav,w64,flac,mp3,ogg,aac,ac3,aiff,au,caf,amr,opus,wv,tta,"
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,3gp,gif,h264,hevc,m4v"
)
# Containers whose header states the length, so that a shorter stream means a cut file. Ogg, MP3 and ADTS state none:
# there a cut file looks like a shorter recording.
_STATES_LENGTH = ("flac", "aiff", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Larger ones would take gigabytes once they are decoded or resized. They may be changed, as Pillow's MAX_IMAGE_PIXELS.
MAX_AUDIO_SECONDS = 3600.0
MAX_ASPECT_RATIO = 200.0
MAX_DECODING_SECONDS = 600.0  # on one file
_PEAK_LIMIT = 10.0  # float sound overshoots 1.0 a little; samples beyond this are integers that were not scaled
_SLACK = 0.1  # share of the length, and seconds, that may be missing before a file counts as cut
_GAP_S = (
    0.1  # silence before or between sounds that is restored, as FFmpeg's min_hard_comp; codecs' own delays are shorter
)
_AUDIBLE = 1e-3
_STREAMED_HEADER = 1 << 30  # bytes that a WAV header states if its writer did not know the length
_SEEK_OVER_S = 2.0  # nearer targets usually share a group of pictures, which a seek would decode again
# Of each channel in a downmix to mono, by FFmpeg's defaults (ITU-R BS.775): the centre in full, low-frequency effects not.
_DOWNMIX = {"FL": 0.7071, "FR": 0.7071, "FC": 1.0, "LFE": 0.0}
_DOWNMIX_OTHERS = 0.5
# The layouts that FFmpeg takes for files that name no channels, by their number.
_USUAL_LAYOUTS = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}

MediaFile = str | os.PathLike[str] | bytes


class BadMediaError(MokaError):
    """A media file that cannot be used: ``file`` is its path (or how many bytes it has) and ``reason`` what is wrong."""

    # A single positional argument is enough, since loader workers rebuild an exception from its message.
    def __init__(self, message: str, file: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.file = file
        self.reason = reason


def file_problem(path: MediaFile) -> str | None:
    """Return why ``path`` cannot be read as a file (absent, a folder, empty, ...), or None; the content is not looked at."""
    if isinstance(path, bytes):
        return None if path else "is empty (0 bytes)"
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            return "is a folder, a file is expected"
        if not stat.S_ISREG(info.st_mode):
            return "is not a regular file"
        if info.st_size == 0:
            return "is empty (0 bytes)"
        return None if os.access(path, os.R_OK) else "may not be read (permission denied)"
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def load_image(path: MediaFile) -> Image.Image:
    """Load an image (path or bytes), upright by its EXIF orientation, in its own mode; of an animation, the first frame.

    Raises:
        BadMediaError: absent, empty, not an image, truncated, with more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or with
            a longer side of more than `MAX_ASPECT_RATIO` times the shorter.
    """
    with _bad_media_errors(path, "an image"):
        Image.init()  # registers all formats
        try:
            opened = Image.open(_source(path), formats=[one for one in _IMAGE_FORMATS if one in Image.OPEN])
        except Image.UnidentifiedImageError as error:
            known = ", ".join(_IMAGE_FORMATS)
            raise _bad(path, f"is not an image in one of the formats that are read: {known}") from error
        with opened as image:
            _check_pixels(path, *image.size)
            image.load()
            try:
                return ImageOps.exif_transpose(image)
            except Exception:  # damaged metadata; the pixels are there
                return image.copy()


def has_sound(path: MediaFile) -> bool:
    """Return whether a file has an audio stream.

    Raises:
        BadMediaError: absent, or damaged.
    """
    with _opened(path, "video") as (container, _):
        return bool(container.streams.audio)


def load_audio(path: MediaFile, rate: int | None = None, track: int = 0) -> Waveform:
    """Load an audio stream of a sound or video file, mixed down to one channel, from the start of the file.

    Args:
        path: a file, or its bytes, of a container listed above and any codec that FFmpeg reads (wav, flac, mp3, mp4, ...).
        rate: samples a second (Hz) to resample to; the file's own by default.
        track: number of the audio stream, from 0, in a file with several (languages, commentaries).

    Returns:
        `Waveform` with float32 samples [n] in -1 ... 1 at ``rate``. Gaps in the stream, and what the file has before it, are
        silence.

    Raises:
        BadMediaError: absent, empty, no such audio stream, damaged, longer than `MAX_AUDIO_SECONDS`, or shorter than its
            header says (wav, flac, aiff, mp4; the other containers do not say, or for all their streams together).
        MokaError: PyAV is not installed, or ``rate`` is not a positive integer.
    """
    if rate is not None and (not isinstance(rate, int) or rate <= 0):
        raise MokaError(f"rate is {rate!r}; a positive integer in Hz is expected, such as 16000.")
    chunks: list[np.ndarray] = []
    loudest = seconds = lead = 0.0
    with _opened(path, "audio", track) as (container, stream):
        resampler = _av().AudioResampler(format="fltp", rate=rate or stream.rate)
        start = (container.start_time or 0) / 1e6

        def resample(frame: Any) -> None:
            nonlocal loudest
            for out in resampler.resample(frame):
                if out is not None:
                    channels = out.to_ndarray()  # [channels, n]
                    loudest = max(loudest, float(np.abs(channels).max(initial=0)))
                    chunks.append(_to_mono(channels, [channel.name for channel in out.layout.channels]))

        for frame in _frames(container, stream):
            gap = frame.time - start - seconds
            if gap <= _GAP_S:
                gap = 0.0
            lead = lead if chunks else gap
            seconds += gap + frame.samples / frame.sample_rate
            if seconds > MAX_AUDIO_SECONDS:
                raise _bad(path, f"is longer than MAX_AUDIO_SECONDS ({MAX_AUDIO_SECONDS:g} s)")
            if gap:
                resample(None)  # the sound before the gap ends here
                resampler = _av().AudioResampler(format="fltp", rate=rate or stream.rate)
                chunks.append(np.zeros(round(gap * (rate or stream.rate)), np.float32))
            resample(frame)
        resample(None)
        if stream.duration is not None:
            _check_length(path, container, float(stream.duration * stream.time_base), seconds - lead)
        elif len(container.streams) == 1:  # mkv states only the length of the longest stream
            _check_length(path, container, (container.duration or 0) / 1e6, seconds)
        own_rate = stream.rate
    samples = np.concatenate(chunks).astype(np.float32, copy=False) if chunks else np.zeros(0, np.float32)
    if not samples.size:
        raise _bad(path, "has no sound that can be decoded")
    peak = np.abs(samples).max()
    if not peak <= _PEAK_LIMIT:  # also true of NaN
        raise _bad(
            path, f"has samples up to {peak:g}, where -1 ... 1 is expected: scale float sound before it is saved"
        )
    if loudest > _AUDIBLE and peak < _AUDIBLE * loudest:
        warnings.warn(
            f"{_name(path)}: its channels cancel each other in the downmix to mono, and leave silence.", stacklevel=2
        )
    return Waveform(np.clip(samples, -1.0, 1.0), rate or own_rate)


def _to_mono(channels: np.ndarray, names: list[str]) -> np.ndarray:
    """Return [channels, n] as [n]: the mean of one or two channels, of more the weighted mean of FFmpeg's downmix."""
    if len(channels) <= 2:
        return channels.mean(axis=0)
    if set(names) <= {"NONE"} and len(channels) in _USUAL_LAYOUTS:
        names = [channel.name for channel in _av().AudioLayout(_USUAL_LAYOUTS[len(channels)]).channels]
    weights = np.array([_DOWNMIX.get(name, _DOWNMIX_OTHERS) for name in names], np.float32)
    return np.average(channels, axis=0, weights=weights if weights.any() else None)


def load_features(path: MediaFile, kind: str = "mfcc") -> AudioFeatures:
    """Load audio features from a ``.npy`` file, or its bytes: floats [frames, bins], of the front end called ``kind``.

    Raises:
        BadMediaError: absent, empty, not a plain ``.npy`` array, truncated, not 2-D, not of floats, or not finite.
    """
    with _bad_media_errors(path, "one .npy array, as numpy.save writes it"):
        # Mapping compares the shape in the header with the size of the file before any memory is taken.
        mapped: np.ndarray = (
            np.lib.format.read_array(io.BytesIO(path), allow_pickle=False)
            if isinstance(path, bytes)
            else np.lib.format.open_memmap(os.fspath(path), mode="r")
        )
        given = f"{mapped.dtype} {list(mapped.shape)}"
        values = np.array(mapped, dtype=np.float32) if mapped.ndim == 2 and mapped.dtype.kind == "f" else None
        del mapped  # the traceback of an error would keep the file open
    if values is None or not values.size:
        raise _bad(path, f"has {given}; audio features are floats [frames, bins]")
    if not np.isfinite(values).all():
        raise _bad(path, "has values that are not finite")
    return AudioFeatures(values, kind)


def load_video(path: MediaFile, frames: int = 10) -> list[Image.Image]:
    """Load ``frames`` RGB images from the first video stream of a file or its bytes, upright.

    Each is the frame nearest to the middle of one of as many equal stretches of the stream's time; a video with fewer frames
    repeats them. In long videos the times are sought, and only the frames near them are decoded.

    Raises:
        BadMediaError: absent, empty, no video stream, damaged, or ending before its header says.
        MokaError: PyAV is not installed, or ``frames`` is not a positive integer.
    """
    if not isinstance(frames, int) or frames <= 0:
        raise MokaError(f"frames is {frames!r}; a positive integer is expected, such as 10.")
    start, end = _video_span(path)
    times = [start + (k + 0.5) * (end - start) / frames for k in range(frames)]
    images: list[Image.Image] = []
    taken = None
    with _opened(path, "video") as (container, stream):
        _check_pixels(path, stream.width, stream.height)
        for wanted, (frame, is_last) in zip(times, _frames_near(container, stream, times), strict=False):
            stops = frame.time + float((frame.duration or 0) * frame.time_base)
            if is_last and stops < wanted - _SLACK * (end - start) - _SLACK:
                raise _bad(path, f"is truncated: its video ends at {stops - start:.1f} s of {end - start:.1f} s")
            images.append(images[-1] if frame is taken else _upright(frame))
            taken = frame
    if not images:
        raise _bad(path, "has no video frame that can be decoded")
    return images


def _frames_near(container: Any, stream: Any, times: list[float]) -> Iterator[tuple[Any, bool]]:
    """Yield the frame nearest to each of the ascending ``times`` (seconds), and whether none follows it; nothing if none can
    be decoded.
    """
    decoded = _frames(container, stream)
    before = after = None  # the frames on both sides of the wanted time
    for wanted in times:
        if times[-1] - times[0] > _SEEK_OVER_S * len(times):
            decoded, after = _sought(container, stream, wanted)
        while after is None or after.time <= wanted:
            before = after or before
            after = next(decoded, None)
            if after is None:
                break
        sides = [frame for frame in (before, after) if frame is not None]
        if not sides:
            return
        yield min(sides, key=lambda frame: abs(frame.time - wanted)), after is None


def _sought(container: Any, stream: Any, wanted: float) -> tuple[Iterator[Any], Any]:
    """Return the frames from a key frame at or before ``wanted`` (seconds) on, and the first of them."""
    for earlier in (0.0, 10.0, wanted):  # seeking in MPEG-TS often lands too late
        container.seek(int((wanted - earlier) / stream.time_base), stream=stream)
        frames = _frames(container, stream)
        first = next(frames, None)
        if first is not None and first.time <= wanted:
            break
    return frames, first


@contextmanager
def _bad_media_errors(path: MediaFile, what: str) -> Iterator[None]:
    """Refuse a path that is no file, and turn whatever a decoder raises inside into one `BadMediaError`.

    Decoders raise almost anything on damaged data: SyntaxError, struct.error and KeyError (Pillow), BadZipFile (NumPy).
    """
    if problem := file_problem(path):
        raise _bad(path, problem)
    try:
        yield
    except (MokaError, MemoryError):
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)  # FFmpeg's str() repeats number and file
        reason = shorten(text, 120) or type(error).__name__
        raise _bad(
            path, f"cannot be decoded as {what}: damaged, truncated, or not in a format that is read ({reason})"
        ) from error


def _name(path: MediaFile) -> str:
    return f"{len(path)} bytes in memory" if isinstance(path, bytes) else os.fspath(path)


def _bad(path: MediaFile, reason: str) -> BadMediaError:
    file = _name(path)
    return BadMediaError(f"{file}: {reason}. Repair or replace the file, or remove the sample.", file, reason)


def _source(path: MediaFile) -> Any:
    return io.BytesIO(path) if isinstance(path, bytes) else os.fspath(path)


def _check_pixels(path: MediaFile, width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS  # Pillow's own knob: above it Pillow only warns
    if limit is not None and width * height > limit:
        raise _bad(path, f"has {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS ({limit})")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _bad(
            path, f"has {width} x {height} pixels, an aspect ratio above MAX_ASPECT_RATIO ({MAX_ASPECT_RATIO:g})"
        )


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MokaError(
            f"Sound and video files need PyAV, which is not importable ({error}). pip install 'moka-peft[media]'"
        ) from error
    return av


@contextmanager
def _opened(path: MediaFile, kind: str, track: int = 0) -> Iterator[tuple[Any, Any]]:
    """Give the PyAV container of a file and its stream of ``kind`` with the number ``track``."""
    av = _av()
    in_memory = isinstance(path, bytes)
    # "file:": a name with a colon is no address. Neither may the content name other files or addresses.
    source = io.BytesIO(path) if isinstance(path, bytes) else f"file:{os.fspath(path)}"
    options = {"protocol_whitelist": "none" if in_memory else "file", "format_whitelist": _CONTAINERS}
    with _bad_media_errors(path, kind):
        _check_riff(path)
        with av.open(source, metadata_errors="ignore", options=options) as container:
            # The cover picture of a song is a video stream too.
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams if s.type == kind and not s.disposition & cover]
            if not streams:
                found = ", ".join(sorted({s.type for s in container.streams})) or "no streams at all"
                raise _bad(path, f"has no {kind} stream (it has {found})")
            if not 0 <= track < len(streams):
                raise _bad(path, f"has no {kind} track {track}; its {kind} tracks are 0 to {len(streams) - 1}")
            stream = streams[track]
            if stream.codec_context is None:
                raise _bad(path, f"has {kind} of a codec that this FFmpeg cannot decode")
            stream.codec_context.thread_count = 1  # loader workers are the parallelism; threads on top slow all down
            yield container, stream


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the decoded frames that have time stamps. Packets that are damaged are skipped, as FFmpeg's own tools do."""
    invalid = _av().error.InvalidDataError
    deadline = time.monotonic() + MAX_DECODING_SECONDS
    for packet in container.demux(stream):
        if time.monotonic() > deadline:
            raise ValueError(f"decoding took longer than MAX_DECODING_SECONDS ({MAX_DECODING_SECONDS:g} s)")
        try:
            frames = packet.decode()
        except invalid:
            continue
        yield from (frame for frame in frames if frame.time is not None)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image  # both count counterclockwise


def _video_span(path: MediaFile) -> tuple[float, float]:
    """Return when the video stream begins and ends, in seconds: by its packets' time stamps, if the container gives no times of
    each stream (mkv, webm: FFmpeg fills in those of the longest).
    """
    with _opened(path, "video") as (container, stream):
        if stream.duration and "matroska" not in container.format.name:
            start = float((stream.start_time or 0) * stream.time_base)
            return start, start + float(stream.duration * stream.time_base)
        spans, last = [], 0.0  # of the video packets; the end of all streams
        for packet in container.demux():
            if packet.pts is not None:
                begins = float(packet.pts * packet.time_base)
                ends = begins + float((packet.duration or 0) * packet.time_base)
                last = max(last, ends)
                if packet.stream.index == stream.index:
                    spans.append((begins, ends))
        if not spans:
            raise _bad(path, "has no video with time stamps")
        _check_length(path, container, (container.duration or 0) / 1e6, last)
        return min(begins for begins, _ in spans), max(ends for _, ends in spans)


def _check_length(path: MediaFile, container: Any, stated: float, found: float) -> None:
    """Refuse a file that has fewer seconds than its header states."""
    if container.format.name in _STATES_LENGTH and found < (1 - _SLACK) * stated - _SLACK:
        raise _bad(path, f"is truncated: {found:.2f} s can be decoded of the {stated:.2f} s that its header states")


def _check_riff(path: MediaFile) -> None:
    """Refuse a cut WAV or AVI file: FFmpeg silently takes the size of the file for the size stated in the header."""
    if isinstance(path, bytes):
        head, size = path[:8], len(path)
    else:
        with open(path, "rb") as file:
            head, size = file.read(8), os.path.getsize(path)
    stated = int.from_bytes(head[4:], "little")
    # A writer that does not know the length states a size far beyond any, or none.
    streamed = stated >= _STREAMED_HEADER or stated == 0
    if head[:4] == b"RIFF" and not streamed and size < (1 - _SLACK) * stated:
        raise _bad(path, f"is truncated: it has {size} bytes of the {stated + 8} that its header states")
