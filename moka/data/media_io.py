"""Readers of media files: images by Pillow, sound and video by PyAV, ready-made audio features from ``.npy``.

Each takes a path, or the ``bytes`` of an encoded file (a cell of a Parquet or TSV table). A file that cannot be used
raises `BadMediaError`, one line that names the file and what is wrong.
"""

from __future__ import annotations

import io
import os
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from moka.errors import MokaError
from moka.modeling.media import AudioFeatures, Waveform

# Containers whose header states the length, so that a shorter stream means a cut file. Ogg, MP3 and ADTS state none:
# there a cut file cannot be reported from a shorter recording.
_STATES_LENGTH = ("flac", "aiff", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_PEAK_LIMIT = 10.0  # float sound overshoots 1.0 a little; beyond this its samples are integers in disguise
_SLACK = 0.1  # share of the length, and seconds, that may lack before a file counts as cut
# Formats are recognised by content and only these are opened: none that names other files (playlists), none that is a program
# for an interpreter (EPS, PDF).
_IMAGE_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_CONTAINERS = (
    *("wav", "w64", "flac", "mp3", "ogg", "aac", "ac3", "aiff", "au", "caf", "amr", "opus", "wv", "tta"),
    *(
        "mov",
        "mp4",
        "matroska",
        "webm",
        "avi",
        "mpegts",
        "mpeg",
        "mpegvideo",
        "flv",
        "asf",
        "3gp",
        "gif",
        "h264",
        "hevc",
        "m4v",
    ),
)
# Larger ones would take gigabytes once they are decoded or resized. They may be changed, as Pillow's MAX_IMAGE_PIXELS.
MAX_AUDIO_SECONDS = 3600.0
MAX_ASPECT_RATIO = 200.0
MAX_DECODING_SECONDS = 600.0  # on one file
_STREAMED_HEADER = 1 << 30  # bytes that a WAV header states if its writer did not know the length
# Of each channel in a downmix to mono, by FFmpeg's defaults (ITU-R BS.775): the centre in full, low-frequency effects not.
_DOWNMIX = {"FL": 0.7071, "FR": 0.7071, "FC": 1.0, "LFE": 0.0}
_DOWNMIX_OTHERS = 0.5
# The layouts that FFmpeg takes for files that name no channels, by their number.
_USUAL_LAYOUTS = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
_LEAD_S = 0.05  # silence before the first sound that is restored; codecs' own delays are shorter
_AUDIBLE = 1e-3
_SEEK_OVER_S = 2.0  # nearer targets usually share a group of pictures, which a seek would decode again


MediaFile = str | os.PathLike[str] | bytes


class BadMediaError(MokaError):
    """A media file that cannot be used: ``file`` is its path (or how many bytes it has) and ``reason`` what is wrong."""

    # A single positional argument is enough, since loader workers rebuild an exception from its message.
    def __init__(self, message: str, file: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.file = file
        self.reason = reason


def file_problem(path: MediaFile) -> str | None:
    """Why ``path`` cannot be read as a file (absent, a folder, empty, ...), or None; the content is not looked at."""
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
    """Load an image file (path or bytes), upright by its EXIF orientation, in its own mode; of an animation, the first frame.

    Raises:
        BadMediaError: absent, empty, not an image, truncated, with more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or longer
            than `MAX_ASPECT_RATIO` times its width.
    """
    _check_file(path)
    try:
        Image.init()  # registers all formats
        with Image.open(_opening(path), formats=[one for one in _IMAGE_FORMATS if one in Image.OPEN]) as image:
            _check_pixels(path, *image.size)
            image.load()
            try:
                return ImageOps.exif_transpose(image)
            except Exception:  # damaged metadata; the pixels are there
                return image.copy()
    except (BadMediaError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _bad(path, f"is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise _bad(path, f"is not an image in one of the formats that are read: {', '.join(_IMAGE_FORMATS)}") from error
    except Exception as error:  # on damaged data Pillow's readers raise SyntaxError, struct.error, KeyError and more
        raise _bad(path, f"is a damaged or truncated image ({_one_line(error)})") from error


def load_audio(path: MediaFile, rate: int | None = None, rates: Counter[int] | None = None) -> Waveform:
    """Load the first audio stream of a sound or video file, mixed down to one channel.

    Args:
        path: a file, or its bytes, of any container and codec that FFmpeg reads (wav, flac, mp3, ogg, mp4, ...).
        rate: samples a second (Hz) to resample to; the file's own by default.
        rates: where to count the file under its own rate (Hz).

    Returns:
        `Waveform` with float32 samples [n] in -1 ... 1 at ``rate``.

    Raises:
        BadMediaError: absent, empty, no audio stream, damaged, or shorter than its header says (wav, flac, aiff, mp4;
            the other containers do not say, or for all their streams together).
        MokaError: PyAV is not installed, or ``rate`` is not a positive integer.
    """
    if rate is not None and (not isinstance(rate, int) or rate <= 0):
        raise MokaError(f"rate is {rate!r}; a positive integer in Hz is expected, such as 16000.")
    with _opened(path, "audio") as (container, stream):
        resampler = _av().AudioResampler(format="fltp", rate=rate or stream.rate)
        limit = MAX_AUDIO_SECONDS
        chunks: list[np.ndarray] = []
        seconds = loudest = 0.0
        for frame in (*_frames(container, stream), None):
            if frame is not None:
                if not chunks and seconds == 0.0:
                    # What begins later than the file's other streams has silence before it.
                    lead = frame.time - (container.start_time or 0) / 1e6
                    if lead > _LEAD_S:
                        chunks.append(np.zeros(round(min(lead, limit) * (rate or stream.rate)), np.float32))
                seconds += frame.samples / frame.sample_rate
            if seconds > limit:
                raise _bad(path, f"is longer than MAX_AUDIO_SECONDS ({limit:g} s)")
            for out in resampler.resample(frame):
                if out is not None:
                    channels = out.to_ndarray()  # [channels, n]
                    loudest = max(loudest, float(np.abs(channels).max(initial=0)))
                    chunks.append(_to_mono(channels, [channel.name for channel in out.layout.channels]))
        if stream.duration is not None:
            _check_length(path, container, float(stream.duration * stream.time_base), seconds)
        elif len(container.streams) == 1:  # mkv states only the length of the longest stream
            _check_length(path, container, (container.duration or 0) / 1e6, seconds)
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
    if rates is not None:
        rates[stream.rate] += 1
    return Waveform(np.clip(samples, -1.0, 1.0), rate or stream.rate)


def _to_mono(channels: np.ndarray, names: list[str]) -> np.ndarray:
    """Return [channels, n] as [n]: the mean of one or two channels, of more the weighted mean of FFmpeg's downmix."""
    if len(channels) <= 2:
        return channels.mean(axis=0)
    if set(names) <= {"NONE"} and len(channels) in _USUAL_LAYOUTS:
        names = [channel.name for channel in _av().AudioLayout(_USUAL_LAYOUTS[len(channels)]).channels]
    weights = np.array([_DOWNMIX.get(name, _DOWNMIX_OTHERS) for name in names], np.float32)
    return np.average(channels, axis=0, weights=weights if weights.any() else None)


def load_features(path: MediaFile, kind: str = "mfcc") -> AudioFeatures:
    """Audio features from a ``.npy`` file, or its bytes: floats [frames, bins], of the front end called ``kind``.

    Raises:
        BadMediaError: absent, empty, not a plain ``.npy`` array, truncated, not 2-D, not of floats, or not finite.
    """
    _check_file(path)
    try:
        # Mapping compares the shape in the header with the size of the file before any memory is taken.
        mapped = np.load(_opening(path), mmap_mode=None if isinstance(path, bytes) else "r", allow_pickle=False)
    except Exception as error:  # of the header's parser, of zip files, of the file system
        raise _bad(path, f"is not a readable .npy array ({_one_line(error)})") from error
    if not isinstance(mapped, np.ndarray):
        mapped.close()
        raise _bad(path, "is an .npz archive; save one array with numpy.save")
    given = f"{mapped.dtype} {list(mapped.shape)}"
    values = np.array(mapped, dtype=np.float32) if mapped.ndim == 2 and mapped.dtype.kind == "f" else None
    del mapped  # the traceback of an error would keep the file open
    if values is None or not values.size:
        raise _bad(path, f"has {given}; audio features are floats [frames, bins]")
    if not np.isfinite(values).all():
        raise _bad(path, "has values that are not finite")
    return AudioFeatures(values, kind)


def load_video(path: MediaFile, frames: int = 10) -> list[Image.Image]:
    """``frames`` RGB images from the first video stream of a file or its bytes, upright, at the middles of as many equal stretches of time.

    Each is the frame nearest in time; a video with fewer frames repeats them. Long videos are sought through, not
    decoded full.

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
    """The frames from a key frame at or before ``wanted`` (seconds) on, and the first of them."""
    for earlier in (0.0, 10.0, wanted):  # seeking in MPEG-TS often lands too late
        container.seek(int((wanted - earlier) / stream.time_base), stream=stream)
        frames = _frames(container, stream)
        first = next(frames, None)
        if first is not None and first.time <= wanted:
            break
    return frames, first


def _name(path: MediaFile) -> str:
    return f"{len(path)} bytes in memory" if isinstance(path, bytes) else os.fspath(path)


def _bad(path: MediaFile, reason: str) -> BadMediaError:
    file = _name(path)
    return BadMediaError(f"{file}: {reason}. Repair or replace the file, or remove the sample.", file, reason)


def _opening(path: MediaFile) -> Any:
    """Return what Pillow, NumPy and PyAV open: the path, or a file object over the bytes."""
    return io.BytesIO(path) if isinstance(path, bytes) else os.fspath(path)


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)  # FFmpeg's str() repeats number and file
    return " ".join(text.split()) or type(error).__name__


def _check_file(path: MediaFile) -> None:
    if problem := file_problem(path):
        raise _bad(path, problem)


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
def _opened(path: MediaFile, kind: str) -> Iterator[tuple[Any, Any]]:
    """The PyAV container of a file and its first stream of ``kind``; whatever FFmpeg raises inside becomes one line."""
    av = _av()
    _check_file(path)
    _check_riff(path)
    try:
        in_memory = isinstance(path, bytes)
        # "file:": a name with a colon is no address. Neither may the content name other files or addresses.
        source = io.BytesIO(path) if isinstance(path, bytes) else f"file:{os.fspath(path)}"
        options = {"protocol_whitelist": "none" if in_memory else "file", "format_whitelist": ",".join(_CONTAINERS)}
        with av.open(source, metadata_errors="ignore", options=options) as container:
            # The cover picture of a song is a video stream too.
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams if s.type == kind and not s.disposition & cover]
            if not streams:
                found = ", ".join(sorted({s.type for s in container.streams})) or "no streams at all"
                raise _bad(path, f"has no {kind} stream (it has {found})")
            stream = streams[0]
            if stream.codec_context is None:
                raise _bad(path, f"has {kind} of a codec that this FFmpeg cannot decode")
            stream.codec_context.thread_count = 1  # loader workers are the parallelism; threads on top slow all down
            yield container, stream
    except (MokaError, MemoryError):
        raise
    except Exception as error:  # of FFmpeg, and of PyAV on values that it does not expect
        raise _bad(
            path,
            f"cannot be decoded as {kind}: damaged, truncated, or not in a format that is read ({_one_line(error)})",
        ) from error


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames with time stamps. Like FFmpeg's own tools, passes over packets that are damaged."""
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
    """Compares the seconds found with those that the header states."""
    if container.format.name in _STATES_LENGTH and found < (1 - _SLACK) * stated - _SLACK:
        raise _bad(path, f"is truncated: {found:.2f} s can be decoded of the {stated:.2f} s that its header states")


def _check_riff(path: MediaFile) -> None:
    """A cut WAV or AVI file: FFmpeg silently takes the size of the file for the size stated in the header."""
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
