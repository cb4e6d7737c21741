"""BEATs: equality with the authors' model on golden data, their checkpoints' names, and their filter bank."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moka.errors import MokaError
from moka.modeling.encoders import build_encoder, build_front_end, tiny_encoder
from moka.modeling.encoders.beats import kaldi_fbank, load_published
from moka.modeling.encoders.beats_model import BeatsModel, BeatsModelConfig, relative_buckets
from moka.modeling.media import Waveform

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def small():
    """The small model's configuration, its weights under published names, and an input with its features."""
    file = GOLDEN / "beats_small.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    tensors = load_file(file)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return config, state, tensors["fbank"], tensors["features"]


@pytest.fixture
def checkpoint(small, tmp_path):
    """A folder with the small model as a published checkpoint."""
    config, state, *_ = small
    torch.save({"cfg": config, "model": state}, tmp_path / "BEATs_small.pt")
    return tmp_path


def test_the_authors_features_are_reproduced(small, checkpoint):
    _, _, fbank, features = small
    for name_or_path in (checkpoint, checkpoint / "BEATs_small.pt"):
        encoder = build_encoder({"type": "beats", "name_or_path": str(name_or_path)})
        assert encoder.input_shape == (98, 128)
        assert encoder.num_tokens == 48
        torch.testing.assert_close(encoder(fbank), features, atol=1e-4, rtol=0)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_saved_encoder_is_rebuilt_after_its_checkpoint_is_gone(small, checkpoint):
    _, _, fbank, features = small
    encoder = build_encoder({"type": "beats", "name_or_path": str(checkpoint)})
    (checkpoint / "BEATs_small.pt").unlink()
    again = build_encoder(json.loads(json.dumps(encoder.to_dict())), pretrained=False)
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(fbank), features, atol=1e-4, rtol=0)
    assert build_front_end(encoder.to_dict()).samples == 16000


def test_layers_are_the_states_between(small, checkpoint):
    _, _, fbank, _ = small
    config = {"type": "beats", "name_or_path": str(checkpoint)}
    states = build_encoder(config).model(fbank)
    assert len(states) == 3
    for layer in (-1, -2, 0, 1):
        torch.testing.assert_close(build_encoder({**config, "layer": layer})(fbank), states[layer])
    with pytest.raises(MokaError, match="given layer 3; the model has 2 layers"):
        build_encoder({**config, "layer": 3})


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_the_public_checkpoint_is_loaded_with_every_weight_in_its_place():
    with open(GOLDEN / "beats_iter3plus_keys.tsv", newline="") as file:
        shapes = {row["key"]: json.loads(row["shape"]) for row in csv.DictReader(file, delimiter="\t")}
    config = BeatsModelConfig.from_dict(json.loads((GOLDEN / "beats_iter3plus_config.json").read_text()))
    assert config == BeatsModelConfig(finetuned_model=True)
    with torch.device("meta"):
        model = BeatsModel(config)
    # One number each, so that this takes no memory.
    state = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    shared = [key for key in shapes if "relative_attention_bias" in key]
    assert len(shared) == 12
    state.update(dict.fromkeys(shared, state[shared[0]]))
    assert set(load_published(model, state, "iter3+")) == {*shared[1:], "predictor.weight", "predictor.bias"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: s.pop("encoder.layers.1.fc1.bias"),
            "lacks weights of the encoder, such as 'encoder.layers.1.fc1.bias'",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "has 'extra', which is no weight"),
        (
            lambda s: s.update({"layer_norm.weight": torch.ones(40)}),
            r"another encoder size: .* shape \[40\], .* \[24\]",
        ),
        (
            lambda s: s.update({"encoder.layers.1.self_attn.relative_attention_bias.weight": torch.zeros(32, 4)}),
            "differs from layer 0's",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(small, tmp_path, spoil, message):
    config, state, *_ = small
    state = dict(state)
    spoil(state)
    torch.save({"cfg": config, "model": state}, tmp_path / "model.pt")
    with pytest.raises(MokaError, match=message):
        build_encoder({"type": "beats", "name_or_path": str(tmp_path)})


def test_a_checkpoint_of_another_size_names_both(small, checkpoint):
    with pytest.raises(
        MokaError, match="another encoder size: its encoder_embed_dim is 32, and model_config asks for 768"
    ):
        build_encoder({"type": "beats", "name_or_path": str(checkpoint), "model_config": {"encoder_embed_dim": 768}})


def test_files_that_are_no_checkpoint_are_explained(tmp_path):
    def given(message, content=None, name="model.pt"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(MokaError, match=message):
            build_encoder({"type": "beats", "name_or_path": str(tmp_path / name)})

    given("no such file or folder")
    with pytest.raises(MokaError, match=r"one \.pt file; found: none"):
        build_encoder({"type": "beats", "name_or_path": str(tmp_path)})
    given("would run code", pickle.dumps(Path("x"), protocol=2))
    given("would run code", b"no checkpoint at all")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pt")
    given("a mapping with 'cfg' and 'model'", name="plain.pt")
    full = (tmp_path / "plain.pt").read_bytes()
    given("cannot be read", full[: len(full) // 2], name="half.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give name_or_path"),
        ({"model_config": {"encoder_layer": 2}}, "no 'encoder_layer'.*Did you mean 'encoder_layers'"),
        ({"model_config": {"encoder_attention_heads": 7}}, "768 is not a multiple of encoder_attention_heads 7"),
        ({"model_config": {"activation_fn": "glu"}}, "'glu' .* is not built"),
        ({"seconds": 0.1}, r"at least 0\.175"),
    ],
)
def test_bad_configurations_are_explained(config, message):
    with pytest.raises(MokaError, match=message):
        build_encoder({"type": "beats", **config})


def test_a_longer_clip_takes_the_same_weights():
    one, two = (build_encoder({**tiny_encoder({"type": "beats"}), "seconds": seconds}) for seconds in (1.0, 2.0))
    two.load_state_dict(one.state_dict())
    assert (one.num_tokens, two.num_tokens) == (48, 96)
    assert two(torch.randn(1, *two.input_shape)).isfinite().all()


def test_buckets_are_exact_near_and_logarithmic_far():
    distances = torch.tensor([0, 1, -1, 7, -7, 8, -8, 79, -79, 500, -500])
    # 16 buckets a side, of which 8 for single distances; far ones share the other 8 up to a distance of 80.
    assert relative_buckets(distances, 32, 80).tolist() == [0, 17, 1, 23, 7, 24, 8, 31, 15, 31, 15]


# the front end


def direct_fbank(samples):
    """Kaldi's formula, frame by frame."""
    places = np.arange(400)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * places / 399)) ** 0.85
    mel = lambda hertz: 1127 * np.log(1 + np.asarray(hertz) / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    bins = mel(np.arange(257) * 16000 / 512)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bands = np.maximum(0, np.minimum(rise, fall))
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)) ** 2
        rows.append(np.log(np.maximum(power @ bands, np.finfo(np.float32).eps)))
    return np.array(rows)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(0.02, 0.1, 20000).astype(np.float32)


def test_the_filter_bank_is_kaldis(noise):
    scaled = noise[:5000] * 2**15
    values = kaldi_fbank(scaled)
    assert values.shape == (29, 128)
    np.testing.assert_allclose(values, direct_fbank(scaled), atol=1e-3)


def test_a_clip_is_scaled_to_16_bits_and_normalised_as_the_authors_do(noise):
    front_end = build_front_end({**tiny_encoder({"type": "beats"}), "seconds": 1.0})
    item = front_end(Waveform(noise[:16000], 16000))
    assert item.shape == (98, 128)
    expected = (direct_fbank(noise[:16000] * 2.0**15) - 15.41663) / (2 * 6.55582)
    np.testing.assert_allclose(item, expected, atol=1e-4)
    np.testing.assert_array_equal(front_end(Waveform(noise, 16000)), item)  # the first second


def test_a_short_clip_is_followed_by_silence(noise):
    front_end = build_front_end({**tiny_encoder({"type": "beats"}), "seconds": 1.0})
    item = front_end(Waveform(noise[:300], 16000))
    silence = (np.log(np.finfo(np.float32).eps) - 15.41663) / (2 * 6.55582)
    np.testing.assert_allclose(item[2:], silence, atol=1e-5)
    assert item[0].max() > 0


def test_a_checkpoint_with_an_impossible_size_is_named(tmp_path):
    config = json.loads((GOLDEN / "beats_iter3plus_config.json").read_text("utf-8"))
    path = tmp_path / "other.pt"
    torch.save({"cfg": {**config, "encoder_embed_dim": 64}, "model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(MokaError, match=r"other\.pt.*encoder_embed_dim 64 is not a multiple"):
        build_encoder({"type": "beats", "name_or_path": str(path)})
