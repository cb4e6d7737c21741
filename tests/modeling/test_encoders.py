"""Encoders and front ends: tiny random configurations, drawn pictures, synthesised sound."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from moka import MokaForConditionalGeneration
from moka.errors import MokaError
from moka.modeling.configuration import MokaModelConfig
from moka.modeling.encoders import ENCODERS, TowerEncoder, build_encoder, build_front_end, tiny_encoder
from moka.modeling.media import AudioFeatures, Waveform

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 80,
    "max_source_positions": 50,
    "max_target_positions": 8,
    "vocab_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
TINY = {
    "conv-image": {"type": "conv-image", "image_size": 12, "channels": [4, 6], "width": 8, "num_tokens": 6},
    "patch-image": {"type": "patch-image", "image_size": 16, "width": 8, "heads": 2},
    "conv-audio": {"type": "conv-audio", "frames": 20, "channels": [6, 8], "width": 8, "num_tokens": 2},
    "clip": {"type": "clip", "model_config": CLIP},
    "whisper": {"type": "whisper", "model_config": WHISPER},
    "siglip": tiny_encoder({"type": "siglip"}),
    "dinov2": tiny_encoder({"type": "dinov2"}),
    "ast": tiny_encoder({"type": "ast"}),
    "hubert": tiny_encoder({"type": "hubert", "seconds": 0.5}),
    "wav2vec2": tiny_encoder(
        {
            "type": "wav2vec2",
            "seconds": 0.5,
            "model_config": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        }
    ),
    "beats": tiny_encoder({"type": "beats"}),
    "efficientnet": tiny_encoder({"type": "efficientnet", "grid": 2}),
    "qwen2.5-vl": tiny_encoder({"type": "qwen2.5-vl"}),
}


def random_items(encoder, items=3):
    values = torch.randn(items, *encoder.input_shape)
    if encoder.name == "conv-audio":
        for length, item in zip((5, 20, 1), values, strict=False):
            item[-1] = (torch.arange(item.shape[1]) < length).float()
    if encoder.name == "wav2vec2":
        for length, item in zip((3000, 8000, 0), values, strict=False):
            item[-1] = (torch.arange(item.shape[1]) < length).float()
    return values


def sine(rate, seconds=0.5):
    """A rising tone with an overtone, all below 1.5 kHz, so that every rate carries it."""
    time = np.arange(int(rate * seconds)) / rate
    phase = 2 * np.pi * (300 * time + 400 * time**2)
    return Waveform((0.4 * np.sin(phase) + 0.2 * np.sin(2 * phase)).astype(np.float32), rate)


def drawing(size=(300, 220), ink="black", paper="white", at=(60, 30)):
    """A hand-sized seven: two thick strokes away from the middle of the page."""
    image = Image.new("RGB", size, paper)
    x, y = at
    ImageDraw.Draw(image).line([(x, y), (x + 80, y), (x + 30, y + 140)], fill=ink, width=16)
    return image


@pytest.fixture(params=sorted(TINY))
def encoder(request):
    torch.manual_seed(0)
    return build_encoder(TINY[request.param])


def test_every_type_has_a_tiny_configuration():
    assert set(TINY) == set(ENCODERS)


def test_features_have_the_promised_shape(encoder):
    assert encoder(random_items(encoder)).shape == (3, encoder.num_tokens, encoder.width)
    assert encoder(encoder.dummy_input(2)).isfinite().all()
    assert encoder(encoder.dummy_input(0)).shape == (0, encoder.num_tokens, encoder.width)
    assert encoder.kind in ("image", "audio")


def test_an_item_is_encoded_alike_only_and_in_a_batch(encoder):
    encoder.eval()
    values = random_items(encoder)
    single = torch.cat([encoder(value[None]) for value in values])
    torch.testing.assert_close(encoder(values), single, atol=1e-5, rtol=1e-5)


def test_configuration_and_weights_rebuild_the_encoder(encoder):
    saved = json.loads(json.dumps(encoder.to_dict()))
    torch.manual_seed(1)
    again = build_encoder(saved, pretrained=False)
    assert again.to_dict() == encoder.to_dict()
    again.load_state_dict(encoder.state_dict())
    values = random_items(encoder)
    torch.testing.assert_close(again.eval()(values), encoder.eval()(values))


def test_encoders_of_sound_say_how_long_a_clip_they_take(encoder):
    rate = 16000
    if encoder.kind == "image":
        assert encoder.length_in_seconds is None
        return
    samples = round(encoder.length_in_seconds * rate)
    front_end = build_front_end(encoder.to_dict())
    if encoder.name == "conv-audio":
        rate, samples = 8000, samples // 2
    within, beyond = np.random.default_rng(0).normal(0, 0.1, (2, samples + rate)).astype(np.float32)
    beyond[:samples] = within[:samples]
    if encoder.name == "conv-audio":
        assert len(front_end(Waveform(within[: samples - 1], rate))[0]) == encoder.config.frames
        return
    a, b = front_end(Waveform(within, rate)), front_end(Waveform(beyond, rate))
    np.testing.assert_array_equal(a[..., : a.shape[-1] - 2], b[..., : a.shape[-1] - 2])  # Whisper's frames look ahead
    within[samples - 400 : samples] = 0
    assert (front_end(Waveform(within, rate)) != a).any()


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_tiny_configuration_keeps_everything_but_the_size(name):
    config = {"type": name, "trainable": True}
    if issubclass(ENCODERS[name], TowerEncoder):
        config.update(name_or_path="somewhere/that-is-not-there")
        config.update({} if name == "qwen2.5-vl" else {"layer": -2})  # its merger reads the last layer only
    tiny = tiny_encoder(config)
    assert tiny_encoder(tiny) == tiny
    encoder = build_encoder(tiny)
    assert (encoder.name, encoder.config.trainable) == (name, True)
    assert getattr(encoder.config, "layer", -2) == config.get("layer", getattr(encoder.config, "layer", -2))
    if name != "efficientnet":  # one network of one size, 3.4 million parameters; its pictures shrink
        assert sum(parameter.numel() for parameter in encoder.parameters()) < 100_000
        assert encoder.width == 32
    medium = drawing() if encoder.kind == "image" else sine(16000)
    assert build_front_end(tiny)(medium).shape == encoder.input_shape


def test_a_tiny_encoder_has_the_layer_asked_for_or_the_nearest():
    layers = {layer: tiny_encoder({"type": "clip", "layer": layer})["layer"] for layer in (-20, -3, -1, 0, 1, 23)}
    assert layers == {-20: -3, -3: -3, -1: -1, 0: 0, 1: 1, 23: 2}


def test_a_frozen_encoder_stays_frozen_and_in_evaluation_mode():
    for config in TINY.values():
        encoder = build_encoder({**config, "trainable": False})
        torch.nn.ModuleList([encoder]).train()
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not encoder(random_items(encoder).requires_grad_()).requires_grad


def test_a_mode_switch_never_changes_which_parameters_are_trained(encoder):
    """peft copies a frozen encoder that `modules_to_save` names, and makes all parameters of the copy trainable."""
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    for mode in (True, False, True):
        encoder.train(mode)
        assert encoder.training is mode
        assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder(random_items(encoder)).requires_grad
    encoder.requires_grad_(False).train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(random_items(encoder)).requires_grad


@pytest.mark.parametrize("trainable", [True, False])
def test_an_encoder_survives_from_pretrained_of_the_model_around_it(encoder, trainable, tmp_path):
    spec = {"encoder": {**encoder.to_dict(), "trainable": trainable}, "projector": {"type": "linear"}, "type_ids": [1]}
    text = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = MokaForConditionalGeneration(MokaModelConfig(text, {"medium": spec})).eval()
    trained = {name for name, parameter in model.encoders.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path)
    again, _ = MokaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    values = random_items(encoder)
    torch.testing.assert_close(again.encoders["medium"](values), model.encoders["medium"](values))
    found = {name for name, parameter in again.encoders.named_parameters() if parameter.requires_grad}
    # transformers freezes this one only in a model that it does not load.
    assert found - {"medium.model.embed_positions.weight"} == trained
    assert bool(trained) is trainable
    assert again.train().encoders["medium"].training is trainable


def test_published_encoders_are_frozen_and_the_small_ones_trained_by_default(encoder):
    assert encoder.config.trainable is encoder.name.startswith(("conv-", "patch-"))
    assert encoder.train().training is encoder.config.trainable


def test_a_trained_encoder_has_a_gradient_on_every_parameter():
    for name in ("conv-image", "patch-image", "conv-audio"):
        encoder = build_encoder(TINY[name])
        (encoder(random_items(encoder)) ** 3).sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_encoders_compute_in_their_own_precision_even_under_autocast(encoder):
    encoder.eval()
    values = random_items(encoder)
    expected = encoder(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder(values.double())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected)


def test_padding_leaves_no_trace():
    torch.manual_seed(0)
    short = build_encoder({**TINY["conv-audio"], "frames": 9}).eval()
    long = build_encoder({**TINY["conv-audio"], "frames": 40}).eval()
    long.load_state_dict(short.state_dict())
    values = torch.randn(2, 14, 9)
    values[:, -1] = 1
    padded = torch.randn(2, 14, 40)  # what is under the mask must not matter
    padded[:, :, :9], padded[:, -1, 9:] = values, 0
    torch.testing.assert_close(long(padded), short(values), atol=1e-5, rtol=1e-5)


def test_sound_tokens_follow_time():
    torch.manual_seed(0)
    encoder = build_encoder({**TINY["conv-audio"], "num_tokens": 4, "frames": 40}).eval()
    before = torch.randn(1, 14, 40)
    before[:, -1] = 1
    after = before.clone()
    after[:, :-1, 36:] += 3
    change = (encoder(after) - encoder(before)).norm(dim=-1)[0]
    assert change[3] > 100 * change[0]


def test_clip_layers_are_the_hidden_states_of_the_plain_model(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "eos_token_id": 1}
    CLIPModel(CLIPConfig(vision_config=CLIP, text_config=text)).save_pretrained(tmp_path)
    values = torch.randn(2, 3, 32, 32)
    plain = CLIPVisionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden_states = plain(values, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 4
    for layer in (-1, -2, 0, 1):
        encoder = build_encoder({"type": "clip", "name_or_path": str(tmp_path), "layer": layer})
        torch.testing.assert_close(encoder(values), hidden_states[layer][:, 1:])
        assert encoder.to_dict()["model_config"]["hidden_size"] == 16


def test_whisper_is_the_encoder_of_the_plain_model(tmp_path):
    torch.manual_seed(0)
    plain = WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).half()
    plain.save_pretrained(tmp_path)
    encoder = build_encoder({"type": "whisper", "name_or_path": str(tmp_path)})
    values = torch.randn(2, 80, 100)
    with torch.no_grad():
        expected = plain.float().eval().model.encoder(values).last_hidden_state
    assert next(encoder.parameters()).dtype == torch.float32
    torch.testing.assert_close(encoder(values), expected)


def test_a_saved_tower_is_rebuilt_after_its_source_is_gone(tmp_path):
    folder = tmp_path / "clip"
    CLIPVisionModel(CLIPVisionModel.config_class(**CLIP)).save_pretrained(folder)
    encoder = build_encoder({"type": "clip", "name_or_path": str(folder)})
    folder.rename(tmp_path / "moved")
    again = build_encoder(encoder.to_dict(), pretrained=False)
    again.load_state_dict(encoder.state_dict())
    values = random_items(encoder)
    torch.testing.assert_close(again(values), encoder(values))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "conv-imag"}, "Did you mean 'conv-image'"),
        ({}, "encoder type: given None"),
        ({"type": "conv-image", "chanels": [4]}, "no field 'chanels'.*Did you mean 'channels'"),
        ({"type": "conv-image", "width": "128"}, "width is '128'; allowed: int"),
        ({"type": "conv-image", "channels": [4, 0]}, "allowed: at least 1"),
        ({"type": "conv-image", "polarity": "dark"}, "allowed: 'light-on-dark'"),
        ({"type": "conv-image", "image_size": 4}, "at least 8"),
        ({"type": "conv-audio", "dropout": 1.5}, "at most 1"),
        ({"type": "patch-image", "image_size": 30}, "not a multiple of patch_size 8"),
        ({"type": "clip"}, "give name_or_path"),
        ({"type": "clip", "model_config": CLIP, "layer": -5}, "given layer -5; the model has 3 layers"),
        ({"type": "whisper", "name_or_path": "./no/such/folder"}, "'./no/such/folder' cannot be loaded"),
    ],
)
def test_bad_configurations_are_explained(config, message):
    with pytest.raises(MokaError, match=message):
        build_encoder(config)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    WhisperConfig(**WHISPER).save_pretrained(tmp_path)
    with pytest.raises(MokaError, match="has a model of type 'whisper'"):
        build_encoder({"type": "clip", "name_or_path": str(tmp_path)})


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    model = CLIPVisionModel(CLIPVisionModel.config_class(**CLIP))
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MokaError, match="lacks weights of the encoder"):
        build_encoder({"type": "clip", "name_or_path": str(tmp_path)})


def test_values_of_another_shape_are_explained(encoder):
    with pytest.raises(MokaError, match="expected \\[items, "):
        encoder(torch.zeros(1, 2, 3))


# front ends


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_front_end_gives_what_its_encoder_takes(name):
    encoder = build_encoder(TINY[name])
    front_end = build_front_end(encoder.to_dict())
    medium = drawing() if encoder.kind == "image" else sine(16000)
    item = front_end(medium)
    assert item.dtype == np.float32
    assert item.shape == encoder.input_shape
    assert encoder(torch.from_numpy(item)[None]).isfinite().all()
    again = build_front_end(encoder.to_dict(), json.loads(json.dumps(front_end.to_dict())))
    np.testing.assert_array_equal(again(medium), item)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_medium_of_the_wrong_kind_is_refused(name):
    wrong = sine(8000) if ENCODERS[name].kind == "image" else drawing()
    given = "a recording" if ENCODERS[name].kind == "image" else "an image"
    with pytest.raises(MokaError, match=f"given {given}.*this encoder takes"):
        build_front_end(TINY[name])(wrong)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
@pytest.mark.parametrize("grey", [True, False])
def test_every_mode_of_a_picture_looks_alike(mode, grey):
    picture = drawing(size=(90, 180), at=(5, 20))
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        assert converted.mode == "I;16"
    elif mode in ("I", "F"):
        converted = picture.convert("L").convert(mode)
    else:
        converted = picture.convert(mode)
    front_end = build_front_end({"type": "conv-image", "grey": grey})
    np.testing.assert_allclose(front_end(converted), front_end(picture), atol=0.03)


def test_transparency_is_over_white():
    front_end = build_front_end({"type": "conv-image"})
    assert (front_end(Image.new("RGBA", (40, 40), (0, 0, 0, 0))) == 1).all()
    palette = Image.new("P", (40, 40), 0)
    palette.info["transparency"] = 0  # as PNG and GIF mark one colour as clear
    assert (front_end(palette) == 1).all()


def test_a_long_picture_keeps_its_shape_and_is_padded_by_its_border():
    picture = Image.new("RGB", (120, 30), (255, 0, 0))
    ImageDraw.Draw(picture).rectangle([45, 0, 74, 29], fill=(0, 0, 255))
    item = build_front_end({"type": "conv-image", "grey": False, "image_size": 24})(picture)
    np.testing.assert_array_equal(item[:, 0, 12], [1, -1, -1])  # padding: the red of the border
    np.testing.assert_array_equal(item[:, 12, 12], [-1, -1, 1])
    blue = (item[2] > 0) & (item[0] < 0)
    assert np.ptp(np.flatnonzero(blue.any(0))) == np.ptp(np.flatnonzero(blue.any(1))) == 5  # still square


def test_a_drawing_becomes_one_of_mnist_whatever_its_page():
    front_end = build_front_end({"type": "conv-image", "polarity": "light-on-dark"})
    item = front_end(drawing())
    ink = (item[0] + 1) / 2
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert ink.max() == 1
    assert np.median(ink) == 0
    places = np.arange(28)
    assert abs(ink.sum(1) @ places / ink.sum() - 14) <= 0.51
    assert abs(ink.sum(0) @ places / ink.sum() - 14) <= 0.51
    for other in (
        drawing(ink="white", paper="black"),
        drawing(size=(900, 400), at=(700, 10)),
        drawing(ink=(90, 90, 90), paper=(200, 200, 200)),
        drawing().convert("1"),
    ):
        np.testing.assert_allclose(front_end(other), item, atol=0.25)
        assert np.abs(front_end(other) - item).mean() < 0.01


def test_a_drawing_of_mnists_form_is_left_only():
    front_end = build_front_end({"type": "conv-image", "polarity": "light-on-dark"})
    drawn = front_end(drawing())
    pixels = ((drawn[0] + 1) * 127.5).round().astype(np.uint8)
    np.testing.assert_allclose(front_end(Image.fromarray(pixels)), drawn, atol=1e-6)


def test_an_empty_page_is_an_empty_drawing():
    front_end = build_front_end({"type": "conv-image", "polarity": "light-on-dark"})
    assert (front_end(Image.new("L", (50, 80), 240)) == -1).all()
    assert (front_end(Image.new("L", (1, 1), 0)) == -1).all()


def test_mfcc_hardly_depend_on_the_rate():
    pytest.importorskip("av")
    front_end = build_front_end({"type": "conv-audio"})
    items = [front_end(sine(rate)) for rate in (8000, 16000, 44100)]
    frames = [int(item[-1].sum()) for item in items]
    assert max(frames) - min(frames) <= 1
    inner = slice(1, min(frames) - 1)  # the outermost frames see the ends of the resampling filter
    for item in items[1:]:
        assert np.abs(item[:-1, inner] - items[0][:-1, inner]).mean() < 0.1


def test_stored_features_and_their_waveform_give_the_same_item():
    from moka.demo.mfcc import mfcc

    wave = sine(8000)
    front_end = build_front_end({"type": "conv-audio"})
    stored = AudioFeatures(mfcc(wave.samples, wave.rate), "mfcc")
    np.testing.assert_array_equal(front_end(stored), front_end(wave))


def test_a_long_recording_is_cut_to_its_loudest_stretch():
    quiet = np.full((100, 13), -300, np.float32)
    quiet[70:76, 0] = 0
    item = build_front_end({"type": "conv-audio", "frames": 10})(AudioFeatures(quiet, "mfcc"))
    assert (item[-1] == 1).all()
    assert (item[0] > 1).sum() == 6


def test_unfit_features_are_explained():
    front_end = build_front_end({"type": "conv-audio"})
    with pytest.raises(MokaError, match="kind 'fbank'"):
        front_end(AudioFeatures(np.zeros((5, 13), np.float32), "fbank"))
    with pytest.raises(MokaError, match="expected \\[frames, 13\\]"):
        front_end(AudioFeatures(np.zeros((5, 40), np.float32), "mfcc"))
    with pytest.raises(MokaError, match="given bins 40"):
        build_front_end({"type": "conv-audio", "bins": 40})


def test_clip_reads_the_preprocessing_next_to_the_weights(tmp_path):
    config = {**TINY["clip"], "name_or_path": str(tmp_path)}
    black = Image.new("RGB", (50, 40))
    assert abs(build_front_end(config)(black)[0, 0, 0] + 0.48145466 / 0.26862954) < 1e-4  # CLIP's own
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_size": 32, "size": {"shortest_edge": 32}}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **settings})
    )
    item = build_front_end(config)(black)
    np.testing.assert_allclose(item, np.full((3, 32, 32), -2.0), atol=1e-6)


def test_whisper_hears_the_same_at_every_rate():
    pytest.importorskip("av")
    front_end = build_front_end(TINY["whisper"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = front_end(sine(16000)), front_end(sine(44100))
    assert low.shape == (80, 100)
    assert np.abs(low - high)[:40, 2:45].mean() < 0.05  # bands up to about 1.5 kHz, frames with sound
