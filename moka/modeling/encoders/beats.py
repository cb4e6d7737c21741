"""The `beats` encoder: published BEATs checkpoints, every weight of them accounted for."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from moka.errors import MokaError
from moka.modeling.fields import about

from .audio import RATE, fit_length, narrow_bands, samples_at
from .base import FrontEnd
from .beats_model import MEL_BINS, BeatsModel, BeatsModelConfig
from .towers import TowerEncoder, check_missing, check_same_sizes, wrong_shape

FRAME, HOP = 400, 160  # samples: 25 ms every 10 ms
# The classifier of fine-tuned checkpoints, which no feature passes through.
PREDICTOR = ("predictor.weight", "predictor.bias")
SHARED = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")
SHARED_FIRST = "encoder.layers.0.self_attn.relative_attention_bias.weight"


@dataclass
class BeatsFrontEnd(FrontEnd):
    """Recordings for BEATs: Kaldi's filter bank of 16 kHz sound of a fixed length, float32 [frames, 128].

    Shorter recordings are followed by silence, and longer ones are cut. Mean and deviation are those of the authors.
    """

    samples: int

    name: ClassVar[str] = "beats"
    sampling_rate = RATE
    mean: ClassVar[float] = 15.41663
    std: ClassVar[float] = 6.55582

    def __call__(self, medium: Any) -> np.ndarray:
        sound = fit_length(samples_at(medium, RATE), self.samples)
        return ((kaldi_fbank(sound * 2**15) - self.mean) / (2 * self.std)).astype(np.float32)


def kaldi_fbank(samples: np.ndarray) -> np.ndarray:
    """Logarithm of the power in 128 mel bands of 16 kHz sound: float [n] -> float32 [1 + (n - 400) // 160, 128].

    Frames of 25 ms every 10 ms, full ones only; mean removed, pre-emphasis 0.97, Povey window, 512-point FFT, bands
    from 20 Hz to 8 kHz; no dither. What `torchaudio.compliance.kaldi.fbank` gives for the same settings.
    """
    window, bands = _kaldi_constants()
    return spectrogram(
        np.asarray(samples, np.float64),
        window,
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=bands,
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    ).T


@lru_cache(maxsize=1)
def _kaldi_constants() -> tuple[np.ndarray, np.ndarray]:
    """The window [400] and the mel bands [257, 128]."""
    with narrow_bands():
        bands = mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=128,
            min_frequency=20,
            max_frequency=8000,
            sampling_rate=16_000,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return window_function(400, "povey", periodic=False), bands


class BeatsEncoder(TowerEncoder):
    """BEATs: the filter bank of a clip of `seconds` to one feature vector per patch of 160 ms x 16 bands.

    Patches are in order of time, and within one time of frequency; frames beyond the last full patch are left out.
    Layer -1 is the model's output.
    """

    @dataclass
    class Config(TowerEncoder.Config):
        name_or_path: str | None = field(
            default=None, metadata=about("the published checkpoint (a .pt file), or a folder with it only")
        )
        model_config: dict | None = field(
            default=None, metadata=about('the checkpoint\'s own "cfg"; filled in from name_or_path')
        )
        seconds: float = field(
            default=1.0,
            metadata=about("length that recordings are cut or padded to, in seconds", minimum=0.175, weightless=True),
        )

    name, kind, input_name = "beats", "audio", "input_features"
    tiny_model = {
        **{"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4},
        **{"embed_dim": 24, "conv_pos": 16, "conv_pos_groups": 4, "num_buckets": 32, "max_distance": 80},
    }
    front_end_class = BeatsFrontEnd
    kept_in_tiny = ("relative_position_embedding", "gru_rel_pos", "deep_norm", "activation_fn", "conv_bias")

    @classmethod
    def front_end(cls, config: Any) -> FrontEnd:
        return BeatsFrontEnd(round(config.seconds * RATE))

    @classmethod
    def resolve_model_config(cls, config: Any, use_name: bool) -> BeatsModelConfig:
        if config.name_or_path and (use_name or config.model_config is None):
            return BeatsModelConfig.from_dict(read_checkpoint(config.name_or_path)[1])
        if config.model_config is None:
            raise MokaError(
                "encoder 'beats': give name_or_path (the checkpoint whose weights to load) or model_config (random "
                "weights; {} is BEATs iter3+)."
            )
        return BeatsModelConfig.from_dict(config.model_config)

    def build(self, pretrained: bool) -> None:
        state = None
        if pretrained and self.config.name_or_path:
            source, settings, state = read_checkpoint(self.config.name_or_path)
            check_same_sizes(self.name, str(source), settings, self.config.model_config or {})
            try:
                model_config = BeatsModelConfig.from_dict(settings)
            except MokaError as error:
                raise MokaError(f"{source}: its 'cfg' is not that of a BEATs checkpoint: {error}") from error
        else:
            model_config = self.resolve_model_config(self.config, use_name=False)
        self.config = dataclasses.replace(self.config, model_config=model_config.to_dict())
        self.read_sizes(model_config)
        self.model = self.create_alike(model_config)
        if state is not None:
            load_published(self.model, state, str(source))

    def read_sizes(self, model_config: Any) -> None:
        self.check_layer(model_config.encoder_layers)
        self.samples = round(self.config.seconds * RATE)
        frames = 1 + (self.samples - FRAME) // HOP
        patch = model_config.input_patch_size
        self.input_shape = (frames, MEL_BINS)
        self.width = model_config.encoder_embed_dim
        self.num_tokens = (frames // patch) * (MEL_BINS // patch)
        self.length_in_seconds = self.samples / RATE
        if self.num_tokens < 1:
            raise MokaError(
                f"encoder 'beats': seconds {self.config.seconds} give {frames} frames, and a patch takes {patch}. Give "
                f"at least {(FRAME + (patch - 1) * HOP) / RATE:g}."
            )

    def create(self, model_config: Any) -> nn.Module:
        return BeatsModel(model_config)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return self.model(values)[self.config.layer]


def read_checkpoint(name_or_path: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """The file, its "cfg" and its "model". Raises `MokaError` where there is none, or it has something else."""
    path = Path(name_or_path)
    if path.is_dir():
        files = sorted(path.glob("*.pt"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise MokaError(f"encoder 'beats': {path} should hold one .pt file; found: {found}. Name the file itself.")
        path = files[0]
    if not path.is_file():
        raise MokaError(
            f"encoder 'beats': cannot load {name_or_path!r}: no such file or folder. Download the BEATs checkpoint (iter3+) "
            "and give the path of its .pt file."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MokaError(
            f"encoder 'beats': {path} is no file of plain tensors (loading it would run code, or it is damaged); give "
            "the published checkpoint."
        ) from error
    except Exception as error:  # of bytes that are no pickle torch's reader raises KeyError and more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MokaError(f"encoder 'beats': {path} cannot be read: {reason}. Download it again.") from error
    if not isinstance(checkpoint, Mapping) or not all(isinstance(checkpoint.get(k), Mapping) for k in ("cfg", "model")):
        raise MokaError(
            f"encoder 'beats': {path} is no BEATs checkpoint: a mapping with 'cfg' and 'model' was expected. Give the "
            "published .pt file."
        )
    return path, dict(checkpoint["cfg"]), dict(checkpoint["model"])


def load_published(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """Copy the weights of a published checkpoint into `model`, with none missing, left over or of another shape.

    Returns:
        the names left out: the predictor, and the copies of the first layer's position bias in the other layers.
    """
    expected = {_published_name(key): value.shape for key, value in model.state_dict().items()}
    kept = {}
    for key, value in state.items():
        if key in PREDICTOR:
            continue
        if key not in expected and SHARED.fullmatch(key) and SHARED_FIRST in state:
            if not torch.equal(value, state[SHARED_FIRST]):
                raise MokaError(f"encoder 'beats': {source}: {key!r} differs from layer 0's, which all layers share.")
            continue
        if key not in expected:
            raise MokaError(f"encoder 'beats': {source} has {key!r}, which is no weight of a BEATs of its cfg.")
        if value.shape != expected[key]:
            raise wrong_shape("beats", source, key, value.shape, expected[key])
        kept[key] = value
    check_missing("beats", source, [key for key in expected if key not in kept])
    model.load_state_dict(kept)
    return [key for key in state if key not in kept]


def _published_name(key: str) -> str:
    # torch's present weight norm, and the one that the checkpoints were saved with
    return key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )
