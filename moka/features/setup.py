"""`data.feature_cache`: features of frozen encoders, computed once (`moka cache`) and read in training.

medium -> features from the cache; the encoder is set aside, and the model runs its projector only. `filling` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moka.config import DataSection
from moka.data.dataset import BAR_AFTER_S
from moka.data.media import DecodedDataset, MediaDecoding
from moka.data.media_io import BadMediaError
from moka.data.schema import media_parts
from moka.distributed import rank_and_world_size
from moka.errors import MokaError, NotCachedError
from moka.modeling import MokaForConditionalGeneration, MokaProcessor
from moka.modeling.artifacts import plain
from moka.modeling.configuration import MEDIA_TYPE_IDS
from moka.modeling.encoders import Encoder, set_aside

from .cache import FeatureCache, FeatureSet, open_set, weights_sha256

# Of an encoder's configuration: where its weights come from, and whether they train, change no feature.
_NOT_IN_KEY = ("name_or_path", "trainable")


def frozen(encoders: Iterable[tuple[str, Encoder]]) -> dict[str, Encoder]:
    """The encoders whose features stay the same.

    Raises:
        MokaError: there is none.
    """
    every = dict(encoders)
    found = {name: encoder for name, encoder in every.items() if not encoder.config.trainable}
    if not found:
        raise MokaError(
            f"data.feature_cache: there is nothing to cache: every encoder of this configuration is trained "
            f"({', '.join(every) or 'it has none'}), so that its features change with each step. Take data.feature_cache "
            "out, or set model.modalities.NAME.encoder.trainable: false."
        )
    return found


def kinds_of(spec: dict[str, Any]) -> list[str]:
    """The kinds of media ("image", "video", "audio") that a modality of a composed model takes."""
    return [kind for kind, type_id in MEDIA_TYPE_IDS.items() if type_id in spec["type_ids"]]


def feature_settings(encoder: Encoder, front_end: Any, kinds: list[str], data: DataSection) -> dict[str, Any]:
    """All that a medium's features depend on next to the medium, fit for JSON."""
    configuration = {key: value for key, value in plain(encoder.to_dict()).items() if key not in _NOT_IN_KEY}
    decoding: dict[str, Any] = {}
    if "video" in kinds:
        decoding["video_frames"] = data.video_frames
    if "audio" in kinds:
        decoding["audio_windows"] = data.audio_windows
        decoding |= {"audio_track": data.audio_track} if data.audio_track else {}
    return {
        "encoder": configuration,
        "weights_sha256": weights_sha256(encoder),
        "front_end": plain(front_end.to_dict()),
        "decoding": decoding,
    }


def open_features(data: DataSection, model: MokaForConditionalGeneration, processor: MokaProcessor) -> FeatureCache:
    """The cached features of the model's frozen encoders, which are set aside.

    Raises:
        MokaError: no frozen encoder; no features there, or of other settings, other weights, or damaged.
    """
    cache = Path(str(data.feature_cache))
    if not cache.is_dir():
        raise MokaError(f"data.feature_cache: {cache} does not exist. Compute the features first: `moka cache`.")
    sets: dict[str, FeatureSet] = {}
    encoders = frozen((name, model.encoders[name]) for name in model.config.modalities)  # type: ignore[misc]
    for name, encoder in encoders.items():
        kinds = kinds_of(model.config.modalities[name])
        settings = feature_settings(encoder, processor.front_ends[name], kinds, data)
        sets |= dict.fromkeys(kinds, open_set(cache, encoder.name, settings, rank_and_world_size()))
    set_aside(model, encoders)
    return FeatureCache(sets)


def with_features(samples: Any, features: FeatureCache | None) -> Any:
    """The data set with the features instead of the media that they are of."""
    if features is None:
        return samples
    if not isinstance(samples, DecodedDataset):
        return DecodedDataset(samples, MediaDecoding(features=features))  # of an embedded task
    return samples.with_features(features)


def check_features(samples: DecodedDataset, name: str, share: tuple[int, int] = (0, 1)) -> None:
    """Look up every file of a data set in its features; media in memory, such as those of tables, are not hashed for it.

    Args:
        share: (k, n): of n processes that look up a part each, this is the k-th.

    Raises:
        MokaError: features that are not there; names the sample.
    """
    features = samples.decoding.features
    known: set[tuple[str, str]] = set()
    assert features is not None
    mine = range(share[0], len(samples), share[1])
    for index in tqdm(mine, f"looking up features of {name}", unit="sample", delay=BAR_AFTER_S, leave=False):
        sample = samples.dataset[index]
        for kind, medium in media_parts(sample):
            if kind not in features.kinds or not isinstance(medium, str) or (kind, medium) in known:
                continue
            known.add((kind, medium))
            try:
                features.check(kind, medium)
            except BadMediaError:
                continue  # what is done about these, data.on_bad_media says
            except NotCachedError as error:
                raise MokaError(f"{name}: sample {sample['id']!r}: {error}") from error


def describe(features: FeatureCache) -> list[str]:
    """A line for each set, for the start of a run."""
    lines = []
    for chosen in dict.fromkeys(features.sets.values()):
        kinds = ", ".join(kind for kind, one in features.sets.items() if one is chosen)
        rounded = "" if chosen.dtype == "float32" else f", rounded to {chosen.dtype}"
        lines.append(f"features of {kinds} come from {chosen.folder} ({len(chosen):,} media{rounded})")
    return lines
