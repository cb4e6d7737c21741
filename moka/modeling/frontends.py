"""Front ends: one decoded medium to the float32 array that its encoder takes.

    PIL.Image | Waveform | AudioFeatures  ->  front_end(medium)  ->  values [*encoder.input_shape]

`build_front_end` makes the one that fits an encoder's configuration; `front_end_from_dict` rebuilds it from `to_dict()`
without the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from moka.errors import MokaError
from moka.modeling.encoders import ENCODERS, TowerEncoder
from moka.modeling.fields import read_config
from moka.modeling.media import AudioFeatures, Waveform


class FrontEnd:
    """Base: `front_end(medium)` gives float32 [*input_shape], and `MokaError` for a medium of another kind."""

    name: ClassVar[str]

    def __call__(self, medium: Any) -> np.ndarray:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Its settings, fit for JSON; `front_end_from_dict` reads them."""
        return {"type": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def wrong_medium(medium: Any, expected: str) -> MokaError:
    """The error for a medium of the wrong kind; `expected` says what the encoder takes."""
    given = {
        Waveform: "a recording (Waveform)",
        AudioFeatures: f"audio features of kind {getattr(medium, 'kind', None)!r}",
    }.get(type(medium), "an image" if isinstance(medium, Image.Image) else f"a {type(medium).__name__}")
    return MokaError(
        f"given {given}, but this encoder takes {expected}. Check which modality the file is listed under."
    )


def to_8_bit(image: Image.Image) -> Image.Image:
    """Any PIL picture as mode "L" or "RGB": turned upright (EXIF), transparency over white, 16 bits scaled to 8.

    Integers and floats carry no range in PIL: "I;16" is read as 0 ... 65535, "I" and "F" as 0 ... 255 when nothing
    exceeds it and else as 0 ... 65535 (a float picture within 0 ... 1 as that).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:
            top = 1.0
        return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode.replace("LAB", "") or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """The median of the outermost pixels, per channel: [height, width, channels] -> [channels]."""
    sides = [pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]
    return np.median(np.concatenate(sides), axis=0)


@dataclass
class ImageFrontEnd(FrontEnd):
    """Pictures of any size and mode for the small image encoders: float32 [1 or 3, image_size, image_size] in -1 ... 1.

    The picture keeps its aspect ratio; what is left of the square takes the colour of its border. With polarity
    "light-on-dark" it is a drawing, and becomes one in MNIST's manner (`centre_ink`).
    """

    image_size: int
    grey: bool = True
    polarity: str | None = None

    name: ClassVar[str] = "image"

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        image = to_8_bit(medium)
        if self.polarity:
            pixels = centre_ink(np.asarray(image.convert("L")), self.image_size)[:, :, None]
            pixels = np.repeat(pixels, 1 if self.grey else 3, axis=2)
        else:
            pixels = self.fit(image.convert("L" if self.grey else "RGB"))
        return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)

    def fit(self, image: Image.Image) -> np.ndarray:
        """The picture in the middle of a square of its border's colour: uint8 [image_size, image_size, channels]."""
        scale = self.image_size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = np.atleast_3d(np.asarray(image))
        square = np.empty((self.image_size, self.image_size, pixels.shape[2]), np.uint8)
        square[:] = border_colour(pixels).round()
        top, left = (self.image_size - height) // 2, (self.image_size - width) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width] = np.atleast_3d(np.asarray(resized))
        return square


def centre_ink(pixels: np.ndarray, size: int) -> np.ndarray:
    """A drawing of any size, dark on light or light on dark, as MNIST's makers would have stored it.

    Light ink on black; cropped to the ink, the longer side scaled to 20 of 28 pixels, the centre of mass moved to the
    middle. A drawing that already is of that form comes back unchanged. Thin strokes stay thin: their brightness is
    restored, not their width.

    Args:
        pixels: uint8 [height, width], grey.
        size: height and width of the result, in pixels.

    Returns:
        uint8 [size, size]; zeros for an empty page.

    Source: LeCun and Cortes, The MNIST database (2010), on how the digits were normalised.
    """
    box = round(size * 20 / 28)
    if _is_centred(pixels, size, box):
        return pixels
    ground = float(border_colour(pixels[:, :, None])[0])
    ink = (pixels - ground) * (1 if pixels.mean() > ground else -1)
    if ink.max() < 16:  # grain of the paper, not a drawing
        return np.zeros((size, size), np.uint8)
    ink = ink / ink.max()
    ink[ink < 0.2] = 0  # shadows and grain would widen the box
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = box / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(small) / np.asarray(small).max()
    top, left = (
        int(np.clip(round(size / 2 - centre), 0, size - side))
        for centre, side in zip(_centre_of_mass(ink), ink.shape, strict=True)
    )
    page = np.zeros((size, size), np.uint8)
    page[top : top + height, left : left + width] = (ink * 255).round()
    return page


def _centre_of_mass(ink: np.ndarray) -> tuple[float, float]:
    """Row and column, counted in pixels from the first."""
    mass = ink.sum()
    return float(ink.sum(1) @ np.arange(ink.shape[0]) / mass), float(ink.sum(0) @ np.arange(ink.shape[1]) / mass)


def _is_centred(pixels: np.ndarray, size: int, box: int) -> bool:
    """Whether a drawing has MNIST's form: its size, a black ground, ink within the box and centred to half a pixel."""
    if pixels.shape != (size, size) or not pixels.any() or border_colour(pixels[:, :, None])[0] > 0:
        return False
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    longest = 1 + max(rows[-1] - rows[0], columns[-1] - columns[0])
    off = max(abs(centre - size / 2) for centre in _centre_of_mass(pixels.astype(np.float64)))
    return box - 1 <= longest <= box and off <= 0.51


# Mean and standard deviation of each coefficient over all frames of the 2160 training recordings of the embedded spoken
# digits (`moka.data.embedded.split_indices("recordings", "train")`).
MFCC_MEAN = np.array(
    [-304.31, 26.84, -4.01, -18.78, -37.12, -19.17, -17.41, -9.86, -13.90, -7.62, -12.05, -11.06, -12.15], np.float32
)
MFCC_STD = np.array(
    [145.05, 50.56, 38.71, 29.46, 30.02, 25.27, 18.86, 15.36, 15.45, 14.77, 14.25, 12.49, 12.49], np.float32
)


@dataclass
class MfccFrontEnd(FrontEnd):
    """Recordings, or their stored MFCC, for `conv-audio`: float32 [14, frames], 13 coefficients and the mask.

    Coefficients are normalised. A longer recording is cut to its loudest stretch of `frames`; a shorter one is followed
    by zeros, where the mask is 0 too.
    """

    frames: int

    name: ClassVar[str] = "mfcc"

    def __call__(self, medium: Any) -> np.ndarray:
        if isinstance(medium, Waveform):
            from moka.modeling.mfcc import mfcc

            values = mfcc(medium.samples, medium.rate)
        elif isinstance(medium, AudioFeatures) and medium.kind == "mfcc":
            values = np.asarray(medium.values, np.float32)
        else:
            raise wrong_medium(medium, "recordings, or audio features of kind 'mfcc'")
        bins = len(MFCC_MEAN)
        if values.ndim != 2 or not len(values) or values.shape[1] != bins:
            raise MokaError(
                f"MFCC of shape {list(values.shape)} given; expected [frames, {bins}] with at least one frame."
            )
        values = (values - MFCC_MEAN) / MFCC_STD
        if len(values) > self.frames:
            # the first coefficient is the loudness
            loudness = np.convolve(values[:, 0], np.ones(self.frames), mode="valid")
            start = int(loudness.argmax())
            values = values[start : start + self.frames]
        item = np.zeros((bins + 1, self.frames), np.float32)
        item[:bins, : len(values)] = values.T
        item[bins, : len(values)] = 1
        return item


@dataclass
class ClipFrontEnd(FrontEnd):
    """Pictures for CLIP: `transformers`' image processor (the Pillow one), float32 [3, image_size, image_size]."""

    settings: dict[str, Any]  # of the image processor

    name: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        self.processor = _clip_processor_class()(**self.settings)

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Image.Image):
            raise wrong_medium(medium, "images")
        values = self.processor(to_8_bit(medium).convert("RGB"), return_tensors="np")["pixel_values"][0]
        return np.asarray(values, np.float32)


def _clip_processor_class() -> Any:
    # The Pillow class by name: where torchvision is installed, `CLIPImageProcessor` gives slightly other pixels.
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # transformers 4, whose CLIPImageProcessor is the Pillow one
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor
    return CLIPImageProcessorPil


@dataclass
class WhisperFrontEnd(FrontEnd):
    """Recordings for Whisper: log-mel of 16 kHz sound, float32 [bins, frames], a frame every 10 ms.

    Shorter recordings are followed by silence and longer ones are cut, as Whisper takes clips of one length.
    """

    bins: int
    frames: int

    name: ClassVar[str] = "whisper"

    def __post_init__(self) -> None:
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor(feature_size=self.bins)

    def __call__(self, medium: Any) -> np.ndarray:
        if not isinstance(medium, Waveform):
            raise wrong_medium(medium, "recordings")
        from moka.modeling.mfcc import resample

        rate = self.extractor.sampling_rate
        values = self.extractor(
            resample(medium.samples, medium.rate, rate),
            sampling_rate=rate,
            max_length=self.frames * self.extractor.hop_length,
            return_tensors="np",
        )["input_features"][0]
        return np.asarray(values, np.float32)


FRONT_ENDS: dict[str, type[FrontEnd]] = {
    cls.name: cls for cls in (ImageFrontEnd, MfccFrontEnd, ClipFrontEnd, WhisperFrontEnd)
}


def build_front_end(encoder_config: Mapping[str, Any]) -> FrontEnd:
    """The front end of the encoder that `encoder_config` describes (as for `build_encoder`, or from `Encoder.to_dict`).

    CLIP's preprocessing is read from `name_or_path` where one is named; else it is CLIP's own at the model's size.
    Raises `MokaError` for a bad configuration.
    """
    cls, config = read_config(encoder_config, ENCODERS, "encoder")
    if cls.name == "conv-audio":
        if config.bins != len(MFCC_MEAN):
            raise MokaError(
                f"encoder 'conv-audio': given bins {config.bins}; its front end gives {len(MFCC_MEAN)} MFCC. "
                "Leave bins out."
            )
        return MfccFrontEnd(config.frames)
    if not issubclass(cls, TowerEncoder):
        return ImageFrontEnd(config.image_size, config.grey, config.polarity)
    model_config = cls.resolve_model_config(config, use_name=False)
    if cls.name == "clip":
        return ClipFrontEnd(_clip_settings(config.name_or_path, model_config.image_size))
    return WhisperFrontEnd(model_config.num_mel_bins, 2 * model_config.max_source_positions)


def _clip_settings(name_or_path: str | None, image_size: int) -> dict[str, Any]:
    processor_class = _clip_processor_class()
    defaults = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    processor = processor_class(**defaults)
    if name_or_path:
        with contextlib.suppress(OSError):  # a folder with weights alone
            processor = processor_class.from_pretrained(name_or_path)
    settings = processor.to_dict()
    return {key: value for key, value in settings.items() if key not in ("image_processor_type", "processor_class")}


def front_end_from_dict(saved: Mapping[str, Any]) -> FrontEnd:
    """The front end whose `to_dict` gave `saved`; needs no network."""
    settings = dict(saved)
    return FRONT_ENDS[settings.pop("type")](**settings)
