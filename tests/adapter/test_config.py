"""``MokaConfig``: presets, the JSON round trip, and the message for each wrong field."""

import json

import pytest
from peft import PeftConfig

import moka

AVT = {"text": [0], "visual": [1, 2], "audio": [3]}


@pytest.mark.parametrize(
    ("name", "position", "weight", "modalities"),
    [
        ("paper", "output", 1.0, AVT),
        ("official-avt", "input", 1.0, AVT),
        ("official-vt", "output", 0.05, {"text": [0], "visual": [1, 2]}),
    ],
)
def test_presets(name, position, weight, modalities):
    config = moka.MokaConfig.preset(name)
    assert (config.r, config.alpha, config.dropout) == (4, 16, 0.05)
    assert (config.scale_position, config.interaction_weight, config.modalities) == (position, weight, modalities)
    assert (config.interaction, config.share_b, config.adapt) == ("question", True, None)


def test_the_paper_is_the_default():
    assert moka.MokaConfig() == moka.MokaConfig.preset("paper")


def test_overrides_win_and_presets_stay_as_they_are():
    config = moka.MokaConfig.preset("official-vt", r=16, interaction_weight=0.5)
    assert (config.r, config.interaction_weight) == (16, 0.5)
    config.modalities["visual"].append(9)
    assert moka.MokaConfig.preset("official-vt").modalities["visual"] == [1, 2]
    assert moka.MokaConfig().modalities["visual"] == [1, 2]


FULL = {
    "r": 8,
    "alpha": 4.5,
    "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "modalities": {"visual": [1], "text": [0, 5], "point": [4]},
    "modality_token_ids": {"visual": [10, 11]},
    "interaction": "mean",
    "interaction_weight": {"visual": 0.5},
    "scale_position": "input",
    "share_b": False,
    "adapt": ["visual", "text"],
    "use_rslora": True,
    "init_weights": False,
    "bias": "moka_only",
    "modules_to_save": ["projector"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 1.0},
    "task_type": "CAUSAL_LM",
}


def test_every_field_survives_json(tmp_path):
    config = moka.MokaConfig(**FULL)
    config.save_pretrained(tmp_path)
    for loader in (moka.MokaConfig, PeftConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is moka.MokaConfig
        assert loaded == config
        assert list(loaded.modalities) == list(config.modalities)
    assert [config.weight_of(name) for name in config.modalities] == [1.0, 0.5, 1.0]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOKA"


@pytest.mark.parametrize("order", [["text", "visual", "audio"], ["audio", "visual", "text"]])
def test_rows_follow_the_ids_in_whatever_order_the_names_come(tmp_path, order):
    """JSON files of peft have their keys sorted; rows must not move with them."""
    config = moka.MokaConfig(modalities={name: AVT[name] for name in order}, adapt=order[:2])
    config.save_pretrained(tmp_path)
    for one in (config, moka.MokaConfig.from_pretrained(tmp_path)):
        assert list(one.modalities) == ["text", "visual", "audio"]
        assert one.adapted == [name for name in one.modalities if name in order[:2]]
    last = moka.MokaConfig(modalities={"text": [9], "b": [4], "a": [7, 3]})
    assert (list(last.modalities), last.text_row) == (["a", "b", "text"], 2)


def test_every_field_has_help_text():
    own = set(moka.MokaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert len(own) == 22
    assert all(len(moka.MokaConfig.__dataclass_fields__[name].metadata["help"]) > 20 for name in own)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: the rank must be a positive integer, got 0"),
        ({"r": -2}, "r: .*got -2"),
        ({"r": 2.5}, "r: .*got 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: .*got 0"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
        (
            {"interaction": "questoin"},
            "interaction: 'questoin' is not one of question, .*mean.* Did you mean 'question'",
        ),
        ({"scale_position": "before"}, "scale_position: 'before' is not one of output, input"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not one of none, all, moka_only"),
        ({"modalities": {"visual": [1]}}, r"modalities: 'text' is missing; given: \['visual'\].*Add \"text\": \[0\]"),
        (
            {"modalities": {"text": [0], "a": [1, 2], "b": [2]}},
            "id 2 is claimed by both 'a' and 'b'; give each its own",
        ),
        ({"modalities": {"text": [0], "visual": []}}, r"modalities\['visual'\]: needs at least one id"),
        ({"modalities": {"text": [0], "visual": [-1]}}, r"modalities\['visual'\]: .*integer >= 0; got \[-1\]"),
        ({"modalities": {"text": [0], "visual": 1}}, r"modalities\['visual'\]: needs at least one id.*got 1"),
        (
            {"interaction_weight": {"visula": 0.5}},
            "interaction_weight: unknown modality 'visula'.*Did you mean 'visual'",
        ),
        ({"adapt": ["video"]}, r"adapt: unknown modality 'video'; known: \['text', 'visual', 'audio'\]"),
        ({"adapt": []}, "adapt: the list is empty; name at least one of"),
        ({"modality_token_ids": {"image": [1]}}, "modality_token_ids: unknown modality 'image'"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform cannot be used"),
        (
            {"format_version": 99},
            "format_version: .*format 99, .*reads up to 1. Upgrade with `pip install -U moka-peft`",
        ),
    ],
)
def test_wrong_field_is_named_with_what_is_allowed(fields, message):
    with pytest.raises(moka.MokaError, match=message):
        moka.MokaConfig(**fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(
        moka.MokaError, match=r"Unknown preset 'offical-vt'; known: paper, .*Did you mean 'official-vt'"
    ):
        moka.MokaConfig.preset("offical-vt")


@pytest.mark.parametrize("loader", [moka.MokaConfig, PeftConfig])
def test_config_of_a_newer_format_is_refused(tmp_path, loader):
    moka.MokaConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    # A newer format has fields that this version does not know.
    path.write_text(json.dumps({**saved, "format_version": 2, "gating": "soft"}))
    with pytest.raises(moka.MokaError, match=r"format_version: .*saved in format 2"):
        loader.from_pretrained(tmp_path)
