"""``MokaConfig``: presets, the JSON round trip, and the message for each wrong field."""

import json

import pytest
from peft import PeftConfig

import moka
from moka.adapter.config import FORMAT_VERSION

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
    "adapt_towers": True,
    "exclude_modules": ["lm_head"],
    "modalities": {"visual": [1], "text": [0, 5], "point": [4]},
    "modality_token_ids": {"visual": [10, 11]},
    "structure_token_ids": [12],
    "turn_markers": {"user": [13, 14], "user_first": [14], "assistant": [15], "end": [16]},
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


def test_every_field_has_help_text_and_is_in_the_round_trip():
    own = set(moka.MokaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own - {"text_merged", "format_version"} == {*FULL, "method", "method_options"} - {"task_type"}
    assert all(len(moka.MokaConfig.__dataclass_fields__[name].metadata["help"]) > 20 for name in own)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r: .*\b0\b"),
        ({"r": -2}, r"r: .*-2"),
        ({"r": 2.5}, r"r is 2.5.*int"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: .*\b0\b"),
        ({"alpha": float("nan")}, r"alpha is nan.*finite"),
        ({"alpha": float("inf")}, r"alpha is inf.*finite"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern is \{'q_proj': nan\}.*finite"),
        ({"interaction_weight": float("nan")}, r"interaction_weight is nan.*finite"),
        ({"dropout": 1.0}, r"dropout: .*\[0, 1\).*1.0"),
        ({"share_b": "no"}, r"share_b is 'no'.*bool"),
        ({"adapt_towers": "no"}, r"adapt_towers is 'no'.*bool"),
        ({"use_rslora": 1}, r"use_rslora is 1.*bool"),
        ({"interaction": "questoin"}, r"interaction is 'questoin'.*question, .*mean.*Did you mean 'question'"),
        ({"scale_position": "before"}, r"scale_position is 'before'.*output, input"),
        ({"bias": "lora_only"}, r"bias is 'lora_only'.*none, all, moka_only"),
        ({"modalities": {"visual": [1]}}, r"modalities: 'text' .*\['visual'\].*\"text\": \[0\]"),
        ({"modalities": {"text": [0], "a": [1, 2], "b": [2]}}, r"modalities: id 2 .*'a' and 'b'"),
        ({"modalities": {"text": [0], "visual": []}}, r"modalities\['visual'\]: .*\[\]"),
        ({"modalities": {"text": [0], "visual": [-1]}}, r"modalities\['visual'\]: .*\[-1\]"),
        ({"modalities": {"text": [0], "visual": 1}}, r"modalities is .*'visual': 1.*list\[int\]"),
        ({"interaction_weight": {"visula": 0.5}}, r"interaction_weight: .*'visula'.*Did you mean 'visual'"),
        ({"adapt": ["video"]}, r"adapt: .*'video'.*\['text', 'visual', 'audio'\]"),
        ({"adapt": []}, r"adapt: .*\['text', 'visual', 'audio'\]"),
        ({"modality_token_ids": {"image": [1]}}, r"modality_token_ids: .*'image'"),
        ({"turn_markers": {"usr": [1]}}, r"turn_markers: 'usr'.*user, assistant, end.*Did you mean 'user'"),
        ({"turn_markers": {"user": 1}}, r"turn_markers is \{'user': 1\}.*list\[int\]"),
        ({"target_modules": []}, r"target_modules: "),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"layers_to_transform .*target_modules"),
        ({"layers_pattern": "layers"}, r"layers_pattern: .*layers_to_transform"),
        ({"format_version": 99}, r"format_version: .*\b99\b.*\b2\b.*pip install -U moka-peft"),
    ],
)
def test_wrong_field_is_named_with_what_is_allowed(fields, message):
    with pytest.raises(moka.MokaError, match=message):
        moka.MokaConfig(**fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(moka.MokaError, match=r"preset 'offical-vt'.*paper, .*Did you mean 'official-vt'"):
        moka.MokaConfig.preset("offical-vt")


@pytest.mark.parametrize("loader", [moka.MokaConfig, PeftConfig])
def test_config_of_a_newer_format_is_refused(tmp_path, loader):
    moka.MokaConfig().save_pretrained(tmp_path)
    path, newer = tmp_path / "adapter_config.json", FORMAT_VERSION + 1
    saved = json.loads(path.read_text())
    # A newer format has fields that this version does not know, and others for those that it knows.
    path.write_text(json.dumps({**saved, "format_version": newer, "gating": "soft", "share_b": "by modality"}))
    with pytest.raises(moka.MokaError, match=rf"format_version: .*\b{newer}\b.*pip install -U moka-peft"):
        loader.from_pretrained(tmp_path)


def test_the_folders_readme_says_how_to_load_it(tiny, tmp_path):
    """Without `import moka` peft raises KeyError: 'MOKA', which does not tell what to do."""
    model = tiny.adapted()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text.count("import moka\n") == 1
        assert "PeftModel.from_pretrained" in text
        assert text.startswith("---\n")  # peft's model card
