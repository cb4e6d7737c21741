"""Projectors: shapes, round trips, and equality with the MokA authors' Q-Former on golden data."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moka.errors import MokaError
from moka.modeling.encoders import build_encoder, tiny_encoder
from moka.modeling.projectors import PROJECTORS, build_projector, import_llava, import_official, tiny_projector

GOLDEN = Path(__file__).parents[1] / "golden" / "official_qformer_projector_small.safetensors"
OFFICIAL_KEYS = Path(__file__).parents[1] / "golden" / "official_projector_keys.tsv"
QFORMER = {"type": "qformer", "queries": 5, "hidden_size": 8, "heads": 2, "intermediate_size": 12}
CONFIGS = {
    "linear": {"type": "linear"},
    "linear-tokens": {"type": "linear", "tokens": 2},
    "mlp": {"type": "mlp"},
    "mlp-pooled": {"type": "mlp", "tokens": 2},
    "qformer": QFORMER,
}
TOKENS = {"linear": 4, "linear-tokens": 2, "mlp": 4, "mlp-pooled": 2, "qformer": 5}


@pytest.fixture(params=sorted(CONFIGS))
def name(request):
    return request.param


def build(name):
    return build_projector(CONFIGS[name], in_tokens=4, in_width=6, out_width=10)


def test_every_type_has_a_configuration():
    # `identity` has no weights and one width: see test_qwen2_5_vl.py.
    assert {config["type"] for config in CONFIGS.values()} == set(PROJECTORS) - {"identity"}


def test_an_item_gives_the_promised_tokens(name):
    projector = build(name)
    assert projector.num_tokens == TOKENS[name]
    assert projector(torch.randn(3, 4, 6)).shape == (3, TOKENS[name], 10)
    assert projector(torch.randn(0, 4, 6)).shape == (0, TOKENS[name], 10)


def test_an_item_is_projected_alike_only_and_in_a_batch(name):
    projector = build(name).eval()
    features = torch.randn(3, 4, 6)
    single = torch.cat([projector(item[None]) for item in features])
    torch.testing.assert_close(projector(features), single, atol=1e-5, rtol=1e-5)


def test_configuration_and_weights_rebuild_the_projector(name):
    projector = build(name).eval()
    again = build_projector(json.loads(json.dumps(projector.to_dict())), 4, 6, 10).eval()
    again.load_state_dict(projector.state_dict())
    features = torch.randn(3, 4, 6)
    torch.testing.assert_close(again(features), projector(features))


def test_every_parameter_has_a_gradient(name):
    projector = build(name)
    (projector(torch.randn(3, 4, 6)) ** 3).sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


def test_float32_features_meet_a_bfloat16_projector(name):
    projector = build(name).eval()
    features = torch.randn(3, 4, 6)
    expected = projector(features)
    tokens = projector.bfloat16()(features)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, atol=0.02, rtol=0.05)


def test_scaling_the_output_layer_scales_the_tokens(name):
    projector = build(name).eval()
    features = torch.randn(3, 4, 6)
    before = projector(features)
    with torch.no_grad():
        projector.output.weight *= 0.5
    torch.testing.assert_close(projector(features), 0.5 * before)


def test_linear_projects_each_feature_by_itself_or_all_together():
    features = torch.randn(1, 4, 6)
    changed = features.clone()
    changed[:, 3] += 1
    each, together = build("linear"), build("linear-tokens")
    torch.testing.assert_close(each(changed)[:, :3], each(features)[:, :3])
    assert ((together(changed) - together(features)).abs().amax(-1) > 0).all()


def test_mlp_is_llavas_on_averaged_neighbours():
    projector = build("mlp-pooled")
    llava = nn.Sequential(projector.hidden, nn.GELU(), projector.output)
    features = torch.randn(3, 4, 6)
    averaged = torch.stack([features[:, :2].mean(1), features[:, 2:].mean(1)], dim=1)
    torch.testing.assert_close(projector(features), llava(averaged))


def test_qformer_does_not_depend_on_the_order_of_features():
    projector = build("qformer").eval()
    features = torch.randn(2, 4, 6)
    torch.testing.assert_close(projector(features), projector(features.flip(1)), atol=1e-5, rtol=1e-5)


def test_qformer_defaults_are_the_published_sizes():
    projector = build_projector({"type": "qformer"}, 257, 1024, 64)
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert projector.num_tokens == 32
    assert shapes["queries"] == (1, 32, 768)
    for layer in (0, 1):
        assert shapes[f"qformer.encoder.layer.{layer}.crossattention.attention.key.weight"] == (768, 1024)
        assert shapes[f"qformer.encoder.layer.{layer}.intermediate_query.dense.weight"] == (3072, 768)
    assert not any(".layer.2." in name for name in shapes)


def official():
    golden = load_file(GOLDEN)
    weights = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    return weights, golden["vision_features"], golden["projected"]


def test_the_official_projector_is_reproduced():
    weights, features, projected = official()  # [2, 3 frames * 16 patches, 40], [2, 3 frames * 6 queries, 56]
    config = {"type": "qformer", "queries": 6, "hidden_size": 48, "heads": 4, "intermediate_size": 96}
    projector = build_projector(config, 16, 40, 56).eval()
    state, unused = import_official({f"model.vl_projector.{key}": value for key, value in weights.items()})
    projector.load_state_dict(state)
    with torch.no_grad():
        tokens = projector(features.reshape(2 * 3, 16, 40)).reshape(2, 3 * 6, 56)
    torch.testing.assert_close(tokens, projected, atol=1e-5, rtol=0)
    assert len(state) + len(unused) == len(weights)
    assert "model.vl_projector.visual_Qformer.bert.encoder.layer.0.intermediate.dense.weight" in unused
    assert "model.vl_projector.visual_Qformer.bert.encoder.layer.0.intermediate_query.dense.weight" not in unused


def test_the_official_audio_projector_has_the_same_names():
    weights, _, _ = official()
    audio = {f"model.al_projector.{key.replace('visual_', 'audio_')}": value for key, value in weights.items()}
    assert import_official(audio)[0].keys() == import_official(weights)[0].keys()


@pytest.mark.parametrize(("file", "in_width"), [("visual_pretrain.bin", 1024), ("audio_pretrain.bin", 768)])
def test_every_weight_of_the_published_files_is_mapped_or_named(file, in_width):
    with OFFICIAL_KEYS.open(newline="") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if row["file"] == file]
    # On no device: half a gigabyte otherwise.
    published = {row["key"]: torch.empty(json.loads(row["shape"]), device="meta") for row in rows}
    state, unused = import_official(published)
    assert len(state) + len(unused) == len(published) == 83
    with torch.device("meta"):
        ours = build_projector({"type": "qformer"}, 257, in_width, 4096)
    ours.load_state_dict(state, assign=True)  # strictly, by name and shape
    text = ("_Qformer.cls.", "word_embeddings", "position_embeddings", "position_ids", ".intermediate.", ".output.")
    assert all(any(part in name for part in text) for name in unused)
    assert sum(math.prod(value.shape) for value in state.values()) == sum(p.numel() for p in ours.parameters())


def test_frames_of_a_video_are_read_one_by_one():
    projector = build("qformer").eval()
    frames = torch.randn(3, 4, 6)  # three frames as three items
    tokens = projector(frames)
    assert tokens.flatten(0, 1).shape == (3 * 5, 10)
    changed = frames.clone()
    changed[1] = torch.randn(4, 6)
    differs = (projector(changed) - tokens).abs().amax((1, 2)) > 1e-6
    assert differs.tolist() == [False, True, False]


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_llavas_projectors_are_mapped(prefix):
    layers = {"linear": nn.Linear(6, 10), "mlp": nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10))}
    features = torch.randn(2, 4, 6)
    for kind, llava in layers.items():
        state, found = import_llava({prefix + key: value for key, value in llava.state_dict().items()})
        assert found == kind
        projector = build(kind)
        projector.load_state_dict(state)
        torch.testing.assert_close(projector(features), llava(features))


@pytest.mark.parametrize("keys", [(), ("weight", "bias"), ("model.mm_projector.0.weight", "model.mm_projector.0.bias")])
def test_other_projectors_are_not_taken_for_llavas(keys):
    with pytest.raises(MokaError, match="not one of LLaVA's projectors"):
        import_llava({key: torch.zeros(1) for key in keys})


def test_weights_fit_any_number_of_features_but_where_all_are_read_together(name):
    projector = build(name)
    assert projector.takes_any_number is (name != "linear-tokens")
    longer = build_projector(CONFIGS[name], in_tokens=8, in_width=6, out_width=10)
    if projector.takes_any_number:
        longer.load_state_dict(projector.state_dict())
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            longer.load_state_dict(projector.state_dict())


def test_a_tiny_projector_keeps_its_kind_and_fits_every_tiny_encoder(name):
    published = {"linear-tokens": 8, "mlp-pooled": 64}.get(name)
    config = {**CONFIGS[name], **({"tokens": published} if published else {})}
    if name == "qformer":
        config = {"type": "qformer", "layers": 3}
    tiny = tiny_projector(config)
    assert tiny_projector(tiny) == tiny
    assert tiny["type"] == config["type"]
    for kind in ("clip", "siglip", "dinov2", "whisper", "ast", "hubert", "wav2vec2", "beats", "patch-image"):
        encoder = build_encoder(tiny_encoder({"type": kind}))
        projector = build_projector(tiny, encoder.num_tokens, encoder.width, 16)
        assert projector(torch.randn(1, encoder.num_tokens, encoder.width)).shape == (1, projector.num_tokens, 16)
    if name == "qformer":
        assert len(projector.qformer.encoder.layer) == 3
        assert (projector.num_tokens, projector.config.hidden_size) == (4, 32)


def test_a_foreign_weight_is_named():
    with pytest.raises(MokaError, match=r"'model\.mm_projector\.0\.weight'"):
        import_official({"model.mm_projector.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "q-former"}, "Did you mean 'qformer'"),
        ({"type": "linear", "token": 2}, "Did you mean 'tokens'"),
        ({"type": "linear", "tokens": 0}, "at least 1"),
        ({"type": "mlp", "tokens": 9}, "given tokens 9; the encoder gives 4"),
        ({"type": "qformer", "hidden_size": 10, "heads": 4}, "not a multiple of heads 4"),
    ],
)
def test_bad_configurations_are_explained(config, message):
    with pytest.raises(MokaError, match=message):
        build_projector(config, 4, 6, 10)


def test_features_of_another_encoder_are_refused(name):
    with pytest.raises(MokaError, match="built for another encoder"):
        build(name)(torch.randn(3, 4, 7))
