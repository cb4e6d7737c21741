"""Pictures and sounds of single samples for a page: small, in the page itself; and what pictures read from the question."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from moka.adapter.diagnostics import interaction_weights
from moka.analysis.contribution import unwrapped
from moka.errors import MokaError
from moka.modeling.encoders.audio import resample
from moka.modeling.media import AudioFeatures, Waveform

SIDE, FRAMES = 256, 4  # pixels of the longer side of a picture; pictures of a video
SECONDS, RATE = 6, 8000  # of a sound: 96 kB
MAPS, WORDS = 4, 3  # pictures with maps, and words of the question for each
NO_GRID = "the tokens of a picture have no place in it (a projector that mixes them)"


def examples_of(messages: Sequence[dict]) -> list[dict[str, str]]:
    """Return the decoded media of a chat for a page: {kind: "image" | "audio" | "text", uri, text}."""
    found = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            medium = part[part["type"]]
            if part["type"] == "image":
                found += _pictures([medium])
            elif part["type"] == "video":
                found += _pictures(
                    [medium[k] for k in np.linspace(0, len(medium) - 1, min(FRAMES, len(medium))).astype(int)]
                )
            elif part["type"] == "audio":
                found += [_sound(one) for one in (medium if isinstance(medium, list) else [medium])[:FRAMES]]
    return found


def _pictures(pictures: Sequence[Any]) -> list[dict[str, str]]:
    return [
        {"kind": "image", "uri": picture_uri(one)} if isinstance(one, Image.Image) else _unshown(one)
        for one in pictures
    ]


def _unshown(medium: Any) -> dict[str, str]:
    return {"kind": "text", "text": f"({type(medium).__name__}, not shown)"}


def picture_uri(picture: Image.Image, side: int = SIDE) -> str:
    """Return a picture of at most ``side`` pixels as a data URI; small ones are enlarged without smoothing."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    if max(small.size) < side // 2:
        factor = side // 2 // max(small.size) or 1
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sound(medium: Any) -> dict[str, str]:
    """Return a sound to be played; features of one as a picture, low frequencies below."""
    if isinstance(medium, AudioFeatures):
        values = medium.values.T[::-1].astype(np.float64)
        scaled = (values - values.min()) / (np.ptp(values) or 1)
        return {"kind": "image", "uri": picture_uri(Image.fromarray((255 * scaled).astype(np.uint8)))}
    if not isinstance(medium, Waveform):
        return _unshown(medium)
    cut = Waveform(medium.samples[: SECONDS * medium.rate], medium.rate)
    cut = Waveform(resample(cut.samples, cut.rate, RATE), RATE) if cut.rate > RATE else cut
    return {"kind": "audio", "uri": "data:audio/wav;base64," + base64.b64encode(sound_file(cut)).decode()}


def sound_file(sound: Waveform) -> bytes:
    """Return a sound as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes((np.clip(sound.samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def interaction_pictures(
    model: nn.Module, reader: Any, places: Sequence[int]
) -> tuple[list[dict[str, Any]], str | None]:
    """Return maps of the interaction over pictures: for a few words of the question, how much each part of the picture reads them.

    The weights are those of the softmax over the question's tokens, the mean over layers; the words are those whose weight
    differs most between the parts of the picture.

    Returns:
        {place, words: [{word, low, high, uri}]} of up to `MAPS` samples, and if there is none the reason.
    """
    if not hasattr(reader, "processor"):
        return [], "the data are batches, without pictures"
    reason, found = "no sample that is shown has one picture and a question", []
    decode = reader.processor.tokenizer.decode
    for place in places:
        pictures = [
            part["image"] for message in reader.decoded(place) for part in message["content"] if part["type"] == "image"
        ]
        batch = reader.load([place]).inputs
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image) or not batch:
            continue
        try:
            words = interaction_words(model, batch, pictures[0], decode)
        except MokaError as error:
            return [], str(error)
        if words is None:
            reason = NO_GRID
        if words:
            found.append({"place": place, "words": words})
        if len(found) == MAPS:
            break
    return found, None if found else reason


def interaction_words(
    model: nn.Module, batch: Any, picture: Image.Image, decode: Callable[[list[int]], str], words: int = WORDS
) -> list[dict[str, Any]] | None:
    """Return maps over the only picture of a batch of one row, for the words whose weight differs most between its parts.

    Returns:
        [{word, low, high, uri}]; None if the picture's tokens have no place in it.
    Raises:
        MokaError: no token of the batch interacts.
    """
    here = (batch["mm_token_type_ids"][0] == 1).cpu() if "mm_token_type_ids" in batch else torch.zeros(0)
    grid = picture_grid(model, batch, int(here.sum()))
    if grid is None:
        return None
    weights = _mean_weights(interaction_weights(model, batch), here)
    chosen = sorted(weights, key=lambda position: -float(weights[position].std()))[:words]
    return [
        {"word": decode([int(batch["input_ids"][0, k])]), **_overlay(picture, weights[k].view(grid))} for k in chosen
    ]


def picture_grid(model: nn.Module, batch: Any, tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the tokens of a batch's only picture; None if its tokens are not laid out like it."""
    inner: Any = unwrapped(model)
    if (sizes := batch.get("image_grid_thw")) is not None:
        merge = inner.config.vision_config.spatial_merge_size
        _, rows, columns = (int(size) for size in sizes[0])
        rows, columns = rows // merge, columns // merge
    else:
        projector = next(
            (p for name, p in getattr(inner, "projectors", {}).items() if 1 in inner.config.type_ids[name]), None
        )
        if projector is not None and (projector.name == "qformer" or getattr(projector.config, "tokens", None)):
            return None
        rows = columns = round(tokens**0.5)
    return (rows, columns) if tokens > 1 and rows * columns == tokens else None


def _mean_weights(maps: dict[str, Any], here: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return for each token of the question the weight [picture tokens] that they give it, the mean over layers."""
    found: dict[int, torch.Tensor] = {}
    for one in maps.values():
        queries = here[one.query_index[0].cpu()] & one.query_mask[0].cpu()
        for k, position in enumerate(one.key_index[0].tolist()):
            if one.key_mask[0, k] and int(queries.sum()) == int(here.sum()):
                own = one.weights[0, :, k].cpu()[queries] / len(maps)
                found[position] = found[position] + own if position in found else own
    return found


def _overlay(picture: Image.Image, weights: torch.Tensor) -> dict[str, Any]:
    """Return the picture under a map, and the range of its weights."""
    from matplotlib import colormaps

    low, high = float(weights.min()), float(weights.max())
    scaled = ((weights - low) / ((high - low) or 1)).numpy()
    colours = Image.fromarray((colormaps["viridis"](scaled)[..., :3] * 255).astype(np.uint8))
    width, height = (max(1, round(size * SIDE / max(picture.size))) for size in picture.size)
    below = picture.convert("RGB").resize((width, height))
    blended = Image.blend(below, colours.resize((width, height), Image.Resampling.NEAREST), 0.55)
    return {"low": low, "high": high, "uri": picture_uri(blended)}
