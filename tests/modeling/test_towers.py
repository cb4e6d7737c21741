"""Published encoders: equality with the plain models of `transformers`, strict loading, and their preprocessing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from moka.errors import MokaError
from moka.modeling.encoders import ENCODERS, build_encoder, build_front_end, tiny_encoder
from moka.modeling.media import Waveform

SPEECH = {**ENCODERS["hubert"].tiny_model, "mask_time_prob": 0.05, "layerdrop": 0.1}
LARGE = {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
PICTURES = ENCODERS["siglip"].tiny_model
TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
DINO = ENCODERS["dinov2"].tiny_model
# name -> the model that a checkpoint has, the plain encoder to compare with, leading tokens without a place, fields
CHECKPOINTS = {
    "siglip": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=PICTURES)), SiglipVisionModel, 0, {}),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO)), Dinov2Model, 1, {"image_size": 28}),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        Dinov2WithRegistersModel,
        4,
        {"image_size": 42},
    ),
    "ast": (lambda: ASTModel(ASTConfig(**ENCODERS["ast"].tiny_model)), ASTModel, 2, {}),
    "hubert": (lambda: HubertForCTC(HubertConfig(**SPEECH)), HubertModel, 0, {"seconds": 0.2}),
    "hubert-large": (lambda: HubertModel(HubertConfig(**LARGE)), HubertModel, 0, {"seconds": 0.2}),
    "wav2vec2": (lambda: Wav2Vec2Model(Wav2Vec2Config(**SPEECH)), Wav2Vec2Model, 0, {"seconds": 0.2}),
}


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def checkpoint(request, tmp_path_factory):
    """Its folder, the plain model loaded from it, tokens to drop, and the encoder's configuration."""
    make, plain, special, fields = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # some start as zeros, which would hide them
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    config = {"type": request.param.split("-")[0], "name_or_path": str(folder), **fields}
    return folder, plain.from_pretrained(folder).eval(), special, config


def test_layers_are_the_hidden_states_of_the_plain_model(checkpoint):
    _, plain, special, config = checkpoint
    encoder = build_encoder(config)
    values = torch.randn(2, *encoder.input_shape)
    given = {}
    if encoder.input_shape[0] == 2:  # sound and its mask
        values[:, 1] = 1
        given["attention_mask"] = torch.ones(2, encoder.input_shape[1], dtype=torch.long)
    with torch.no_grad():
        states = plain(values[:, 0] if given else values, output_hidden_states=True, **given).hidden_states
    assert len(states) == 3
    for layer in (-1, -2, 0, 2):
        features = build_encoder({**config, "layer": layer})(values)
        assert features.shape == (2, encoder.num_tokens, encoder.width)
        torch.testing.assert_close(features, states[layer][:, special:])
    with pytest.raises(MokaError, match="given layer 3; the model has 2 layers"):
        build_encoder({**config, "layer": 3})


def test_a_tower_is_rebuilt_from_its_dictionary_only(checkpoint):
    _, _, _, config = checkpoint
    encoder = build_encoder(config)
    saved = json.loads(json.dumps({**encoder.to_dict(), "name_or_path": "./moved/away"}))
    again = build_encoder(saved, pretrained=False)
    again.load_state_dict(encoder.state_dict())
    values = torch.rand(2, *encoder.input_shape).round()
    torch.testing.assert_close(again(values), encoder(values))
    front_end = build_front_end(saved)
    assert build_front_end(saved, json.loads(json.dumps(front_end.to_dict()))) == front_end


def test_a_checkpoint_of_another_size_names_both(checkpoint):
    _, _, _, config = checkpoint
    settings = build_encoder(config).to_dict()["model_config"]
    build_encoder({**config, "model_config": settings})
    with pytest.raises(MokaError, match="another encoder size: its hidden_size is 32, and model_config asks for 48"):
        build_encoder({**config, "model_config": {**settings, "hidden_size": 48}})


def test_weights_that_do_not_fit_their_configuration_are_refused(checkpoint, tmp_path):
    folder, _, _, config = checkpoint
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {**config, "name_or_path": str(tmp_path)}
    state = load_file(folder / "model.safetensors")
    # of the encoder's attention in every one of the models
    key = next(k for k in sorted(state) if "layer" in k and "text_model" not in k and state[k].shape == (32, 32))
    save_file({**state, key: torch.zeros(48, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MokaError, match=r"another encoder size: .* has shape \[48, 32\], .* asks for \[32, 32\]"):
        build_encoder(config)
    save_file({k: t for k, t in state.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MokaError, match="lacks weights of the encoder"):
        build_encoder(config)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    HubertConfig(**SPEECH).save_pretrained(tmp_path)
    with pytest.raises(MokaError, match="has a model of type 'hubert'; expected 'wav2vec2'"):
        build_encoder({"type": "wav2vec2", "name_or_path": str(tmp_path)})


def test_a_truncated_checkpoint_is_refused(tmp_path):
    SiglipVisionModel(SiglipVisionModel.config_class(**PICTURES)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MokaError, match="cannot be loaded"):
        build_encoder({"type": "siglip", "name_or_path": str(tmp_path)})


def test_dinov2_takes_pictures_of_the_size_asked_for():
    tiny = tiny_encoder({"type": "dinov2"})
    assert build_encoder({**tiny, "image_size": 56}).num_tokens == 16
    assert build_front_end({**tiny, "image_size": 56})(Image.new("RGB", (90, 70))).shape == (3, 56, 56)
    with pytest.raises(MokaError, match="multiple of the patch size 14, such as 28"):
        build_encoder({**tiny, "image_size": 30})


# waveforms


def masked_encoder(**fields):
    torch.manual_seed(0)
    return build_encoder({"type": "wav2vec2", "model_config": LARGE, **fields})


def test_padding_of_a_masked_waveform_leaves_no_trace():
    short, long = masked_encoder(seconds=0.1), masked_encoder(seconds=0.25)
    long.load_state_dict(short.state_dict())
    values = torch.randn(2, 2, 1600)
    values[:, 1] = 1
    padded = torch.randn(2, 2, 4000)  # what is under the mask must not matter
    padded[:, :, :1600], padded[:, 1, 1600:] = values, 0
    features = long(padded)
    torch.testing.assert_close(features[:, : short.num_tokens], short(values), atol=1e-5, rtol=1e-5)
    assert (features[:, short.num_tokens :] == 0).all()


def test_a_masked_waveform_is_encoded_alike_next_to_longer_ones():
    encoder = masked_encoder(seconds=0.25)
    values = torch.randn(3, 2, 4000)
    for length, item in zip((500, 4000, 0), values, strict=True):
        item[1] = (torch.arange(4000) < length).float()
    single = torch.cat([encoder(item[None]) for item in values])
    torch.testing.assert_close(encoder(values), single, atol=1e-5, rtol=1e-5)
    assert single.isfinite().all()


def test_a_clip_too_short_for_one_feature_is_reported():
    with pytest.raises(MokaError, match=r"allowed: at least 0\.025"):
        build_encoder({"type": "hubert", "model_config": SPEECH, "seconds": 0.01})
    wide = {**SPEECH, "conv_kernel": [20, 3, 3, 3, 3, 2, 2]}
    with pytest.raises(MokaError, match=r"need at least 0\.025625 s"):
        build_encoder({"type": "hubert", "model_config": wide, "seconds": 0.025})


def test_training_drops_no_layers_and_masks_no_input():
    encoder = build_encoder({"type": "hubert", "model_config": {**SPEECH, "layerdrop": 1.0}, "trainable": True})
    features = encoder.train()(torch.randn(1, *encoder.input_shape))
    (features**2).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# front ends


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(0.01, 0.1, 6000).astype(np.float32)


@pytest.mark.parametrize("length", [1000, 4000, 6000])
def test_waveforms_are_prepared_as_transformers_does_by_the_mask(noise, length):
    clip = noise[:length]
    item = build_front_end({"type": "wav2vec2", "model_config": LARGE, "seconds": 0.25})(Waveform(clip, 16000))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    given = {"padding": "max_length", "max_length": 4000, "truncation": True}
    expected = extractor(clip, sampling_rate=16000, return_tensors="np", **given)
    np.testing.assert_allclose(item[0], expected["input_values"][0], atol=1e-5)
    np.testing.assert_array_equal(item[1], expected["attention_mask"][0])
    plain = build_front_end({"type": "hubert", "model_config": SPEECH, "seconds": 0.25})(Waveform(clip, 16000))
    np.testing.assert_array_equal(plain, item[0])


def test_waveforms_stay_as_they_are_where_the_checkpoint_says_so(noise, tmp_path):
    HubertConfig(**SPEECH).save_pretrained(tmp_path)
    config = {"type": "hubert", "name_or_path": str(tmp_path), "seconds": 0.25}
    assert build_front_end(config).normalize
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    np.testing.assert_array_equal(build_front_end(config)(Waveform(noise, 16000)), noise[:4000])
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(MokaError, match="sound at 8000 Hz"):
        build_front_end(config)


def test_ast_hears_what_its_extractor_gives(noise, tmp_path):
    ASTConfig(**ENCODERS["ast"].tiny_model).save_pretrained(tmp_path)
    ASTFeatureExtractor(mean=-3.0, std=2.0).save_pretrained(tmp_path)
    front_end = build_front_end({"type": "ast", "name_or_path": str(tmp_path)})
    extractor = ASTFeatureExtractor(mean=-3.0, std=2.0, max_length=64, num_mel_bins=32)
    expected = extractor(noise, sampling_rate=16000, return_tensors="np")["input_values"][0]
    np.testing.assert_array_equal(front_end(Waveform(noise, 16000)), expected)
    assert front_end(Waveform(noise[:50], 16000)).shape == (64, 32)  # less than a frame


def gradient(width, height):
    across = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(across, (height, 1))] * 3, axis=2))


def test_siglip_sees_the_full_picture_and_dinov2_its_middle():
    wide = gradient(200, 50)
    siglip = build_front_end(tiny_encoder({"type": "siglip"}))(wide)
    assert siglip[0, 0, 0] < -0.95
    assert siglip[0, 0, -1] > 0.95
    dino = build_front_end(tiny_encoder({"type": "dinov2"}))(wide)
    # The middle 28 of 128 columns, after the shorter side was scaled to 32 pixels.
    expected = (np.array([50.5, 77.5]) / 128 - 0.485) / 0.229
    np.testing.assert_allclose(dino[0, 0, [0, -1]], expected, atol=0.03)


def test_dinov2_reads_the_preprocessing_next_to_the_weights(tmp_path):
    Dinov2Config(**DINO).save_pretrained(tmp_path)
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    sizes = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **sizes}))
    config = {"type": "dinov2", "name_or_path": str(tmp_path)}
    black = Image.new("RGB", (60, 60))
    np.testing.assert_allclose(build_front_end(config)(black), np.full((3, 224, 224), -2.0), atol=1e-6)
    item = build_front_end({**config, "image_size": 28})(black)
    np.testing.assert_allclose(item, np.full((3, 28, 28), -2.0), atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "whisper", "beats", "efficientnet"])
def test_random_weights_are_the_same_in_every_run(name):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(build_encoder(tiny_encoder({"type": name})).state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "ast", "whisper", "hubert", "beats"])
def test_every_trainable_parameter_of_a_tower_gets_a_gradient(name, layer):
    """DDP waits for one. Parameters that the layer taken does not depend on can be frozen again after peft's copy."""
    encoder = build_encoder(tiny_encoder({"type": name, "trainable": True, "layer": layer}))
    full = sum(1 for _ in encoder.parameters())
    encoder.requires_grad_(True).train().freeze_unused()
    features = encoder(torch.randn(2, *encoder.input_shape))
    (features * torch.randn_like(features)).sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    assert len(trained) < full or (layer == -1 and name in ("whisper", "hubert", "beats"))


@pytest.mark.parametrize("content", [b"hello", b"<html>Not found</html>", b"", bytes(range(256))])
@pytest.mark.parametrize("name", ["beats", "efficientnet"])
def test_a_file_that_is_no_checkpoint_is_reported(name, content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(MokaError, match=r"weights\.pt"):
        build_encoder({"type": name, "name_or_path": str(tmp_path / "weights.pt")})
