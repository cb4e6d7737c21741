"""Connectors from published files, and between runs whose encoders differ in the length of a clip only."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from moka import MokaError, MokaForConditionalGeneration
from moka.modeling import MokaModelConfig
from moka.modeling.artifacts import load_connector, save_connector
from moka.modeling.encoders import tiny_encoder

GOLDEN = Path(__file__).parents[1] / "golden" / "official_qformer_projector_small.safetensors"
# Of the golden projector: features 40 wide, tokens 56 wide.
QFORMER = {"type": "qformer", "queries": 6, "hidden_size": 48, "heads": 4, "intermediate_size": 96}
VISION = {**{"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}, "image_size": 8, "patch_size": 2}
CLIP = {"type": "clip", "model_config": {**VISION, "intermediate_size": 16}}
BEATS = tiny_encoder({"type": "beats"})
SOUND = {**BEATS, "model_config": {**BEATS["model_config"], "encoder_embed_dim": 40}}


def composed(visual=None, audio=None, width=56):
    """A model with these projectors after a CLIP and a BEATs whose features are 40 wide."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    modalities = {}
    if visual:
        modalities["visual"] = {"encoder": CLIP, "projector": visual}
    if audio:
        modalities["audio"] = {"encoder": SOUND, "projector": audio}
    return MokaForConditionalGeneration(MokaModelConfig(text, modalities)).eval()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def official(golden):
    """The golden projector under the names of either published file."""
    weights = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    return {
        "visual_pretrain.bin": {f"model.vl_projector.{key}": value for key, value in weights.items()},
        "audio_pretrain.bin": {
            f"model.al_projector.{key.replace('visual_', 'audio_', 1)}": value for key, value in weights.items()
        },
    }


def llava(kind, width=40):
    """LLaVA's `mm_projector.bin`, as it saves it."""
    torch.manual_seed(1)
    layers = {"linear": nn.Linear(width, 56), "mlp": nn.Sequential(nn.Linear(width, 56), nn.GELU(), nn.Linear(56, 56))}
    return layers[kind], {f"model.mm_projector.{key}": value for key, value in layers[kind].state_dict().items()}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(("file", "name"), [("visual_pretrain.bin", "visual"), ("audio_pretrain.bin", "audio")])
def test_the_authors_projectors_are_put_where_their_names_say(official, golden, tmp_path, file, name, suffix):
    path = (tmp_path / file).with_suffix(suffix)
    (torch.save if suffix == ".bin" else save_file)(official[file], path)
    model = composed(QFORMER, QFORMER)
    other = {"visual": "audio", "audio": "visual"}[name]
    before = {key: value.clone() for key, value in model.projectors[other].state_dict().items()}
    assert load_connector(model, path) == [f"projectors.{name}"]
    # read without the check of the number of features, which the golden data have their own of
    with torch.no_grad():
        tokens = model.projectors[name].project(golden["vision_features"].reshape(2 * 3, 16, 40))
    torch.testing.assert_close(tokens.reshape(2, 3 * 6, 56), golden["projected"], atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.projectors[other].state_dict().items())


def test_one_file_may_hold_both_of_the_authors_projectors(official, tmp_path):
    path = tmp_path / "both.bin"
    torch.save({**official["visual_pretrain.bin"], **official["audio_pretrain.bin"]}, path)
    assert load_connector(composed(QFORMER, QFORMER), path) == ["projectors.visual", "projectors.audio"]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_llavas_projector_is_taken_over(tmp_path, kind):
    plain, state = llava(kind)
    path = tmp_path / "mm_projector.bin"
    torch.save({key: value.half() for key, value in state.items()}, path)
    model = composed({"type": kind}, QFORMER)
    assert load_connector(model, path) == ["projectors.visual"]
    features = torch.randn(2, 16, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.projectors["visual"](features), plain.half().float()(features))


def test_a_file_for_a_medium_that_the_model_lacks_is_refused(official, tmp_path):
    path = tmp_path / "audio_pretrain.bin"
    torch.save(official[path.name], path)
    with pytest.raises(MokaError, match=r"projector of audio features; this model has no modality .* only visual"):
        load_connector(composed(QFORMER), path)


@pytest.mark.parametrize(
    ("projector", "width", "message"),
    [
        ({"type": "mlp"}, 56, r"of type 'qformer', and this run's visual projector is .*projector: \{type: qformer\}"),
        ({**QFORMER, "queries": 5}, 56, r"projector\.queries 6 \(this run: 5\)"),
        (QFORMER, 64, r"backbone width 56 \(this run: 64\)"),
        ({**QFORMER, "hidden_size": 96}, 56, r"projector\.hidden_size 48 \(this run: 96\)"),
        ({**QFORMER, "intermediate_size": 80}, 56, r"projector\.intermediate_size 96 \(this run: 80\)"),
        ({**QFORMER, "layers": 3}, 56, r"projector\.layers 2 \(this run: 3\)"),
        ({**QFORMER, "layers": 1}, 56, r"projector\.layers 2 \(this run: 1\)"),
        ({**QFORMER, "cross_attention_frequency": 2}, 56, r"layer\.1\.crossattention.*cross_attention_frequency: 1"),
    ],
)
def test_the_authors_projector_of_another_size_says_what_to_change(official, tmp_path, projector, width, message):
    path = tmp_path / "visual_pretrain.bin"
    torch.save(official[path.name], path)
    model = composed(projector, width=width)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MokaError, match=message) as error:
        load_connector(model, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_llavas_projector_of_another_encoder_is_refused(tmp_path, kind):
    path = tmp_path / "mm_projector.bin"
    torch.save(llava(kind, width=48)[1], path)
    with pytest.raises(MokaError, match=r"encoder width 48 \(this run: 40\)"):
        load_connector(composed({"type": kind}), path)


def test_llavas_linear_projector_reads_each_feature_by_itself(tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save(llava("linear")[1], path)
    with pytest.raises(MokaError, match=r"'tokens': 2.*Set .*projector: \{type: linear\}"):
        load_connector(composed({"type": "linear", "tokens": 2}), path)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran its code')",))


def test_files_that_are_no_projector_are_explained(official, tmp_path):
    model = composed(QFORMER)

    def given(message, content, name="visual_pretrain.bin"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(MokaError, match=message):
            load_connector(model, path)
        return path.read_bytes()

    given(r"code or objects other than tensors.*not executed", pickle.dumps(Harmful(), protocol=2))
    given(r"code or objects other than tensors.*not executed", {"model.vl_projector.visual_ln.weight": Harmful()})
    full = given(r"'model\.layers\.0\.weight' is no weight of a projector", {"model.layers.0.weight": torch.zeros(1)})
    given("truncated or damaged", full[: len(full) // 2])
    given("truncated or damaged", b"\x10", "visual.safetensors")
    given("objects other than named tensors", {"model.mm_projector.weight": 1})
    given("objects other than named tensors", torch.zeros(2))
    given("not one of LLaVA's projectors", {"model.mm_projector.4.weight": torch.zeros(2, 2)})
    key = "model.vl_projector.visual_proj.0.bias"
    given(f"not finite .*{key}", {**official["visual_pretrain.bin"], key: torch.full((56,), torch.nan)})
    with pytest.raises(MokaError, match=r"does not exist; .* or a published projector file"):
        load_connector(model, tmp_path / "missing.bin")


# folders


def sounding(seconds, projector, **fields):
    """A model with a BEATs of clips of so many seconds."""
    torch.manual_seed(int(10 * seconds))
    text = LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    audio = {"encoder": {**BEATS, "seconds": seconds, **fields}, "projector": projector}
    model = MokaForConditionalGeneration(MokaModelConfig(text, {"audio": audio}, backbone="the same"))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.fill_(0.5)
    return model


@pytest.mark.parametrize(
    "projector", [{**QFORMER, "hidden_size": 16}, {"type": "mlp"}, {"type": "mlp", "tokens": 2}, {"type": "linear"}]
)
def test_stage_two_may_take_longer_clips_than_stage_one(tmp_path, projector):
    one, two = sounding(1.0, projector), sounding(2.0, projector)
    save_connector(one, tmp_path)
    assert load_connector(two, tmp_path) == ["projectors.audio"]
    for key, value in one.projectors["audio"].state_dict().items():
        assert torch.equal(value, two.projectors["audio"].state_dict()[key])
    assert two.encode_media("audio", torch.zeros(1, *two.encoders["audio"].input_shape)).isfinite().all()


def test_a_projector_of_all_features_together_needs_clips_of_one_length(tmp_path):
    save_connector(sounding(1.0, {"type": "linear", "tokens": 2}), tmp_path)
    with pytest.raises(MokaError, match=r"its audio encoder has seconds 1\.0, and this run's has seconds 2\.0"):
        load_connector(sounding(2.0, {"type": "linear", "tokens": 2}), tmp_path)


def test_another_layer_of_the_same_encoder_is_refused(tmp_path):
    save_connector(sounding(1.0, {"type": "mlp"}, layer=-1), tmp_path)
    with pytest.raises(MokaError, match="its audio encoder has layer -1, and this run's has layer -2"):
        load_connector(sounding(2.0, {"type": "mlp"}, layer=-2), tmp_path)
