"""The configuration: every mistake is reported with its key, what was given, and what is allowed."""

import dataclasses

import pytest
import yaml
from transformers import TrainingArguments

from moka.config import check_complete, describe
from moka.errors import MokaError
from moka.training import RunConfig, config_from_dict, load_config


@pytest.fixture
def config_file(tmp_path):
    def write(text="", name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refused(raw, *words):
    with pytest.raises(MokaError) as caught:
        config_from_dict(raw, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("raw", "key", "near"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"backbon": "x"}}, "model.backbon", "backbone"),
        ({"adapter": {"rank_": 4, "r": 4}}, "adapter.rank_", ""),
        ({"data": {"validaton": "x"}}, "data.validaton", "validation"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "learning_rate"),
        ({"alignment": {"objektive": "embedding"}}, "alignment.objektive", "objective"),
        ({"training": {"global_batch": 8}}, "training.global_batch", "global_batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(raw, key, near):
    refused(raw, f"unknown key '{key}'", f"Did you mean '{near}'" if near else "known: ")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"stages": 2}, ["stages", "2", "a list of integers is expected"]),
        ({"stages": [2, 1]}, ["stages", "[1, 2]"]),
        ({"stages": []}, ["stages"]),
        ({"stages": [3]}, ["stages", "3"]),
        ({"model": []}, ["model", "a section of keys is expected"]),
        ({"model": {"modalities": {"visual": None}}}, ["model.modalities"]),
        ({"model": {"connectors": [1]}}, ["model.connectors", "list of texts"]),
        ({"model": {"backbone": 7}}, ["model.backbone", "Quote it"]),
        ({"model": {"dtype": "float16"}}, ["model.dtype", "auto, float32, bfloat16"]),
        ({"adapter": {"method": "mokka"}}, ["adapter.method", "moka, lora, none", "Did you mean 'moka'"]),
        ({"adapter": {"method": "none"}}, ["adapter.method", "stages: [1]"]),
        ({"adapter": {"preset": "papr"}}, ["adapter.preset", "Did you mean 'paper'"]),
        ({"adapter": {"method": "lora", "share_b": False}}, ["adapter.share_b", "lora"]),
        ({"adapter": {"method": "lora", "interaction": "none"}}, ["adapter.interaction", "lora"]),
        ({"adapter": {"r": True}}, ["adapter.r", "integer"]),
        ({"adapter": {"r": "eight"}}, ["adapter.r", "'eight' is text"]),
        ({"stages": [1, 2], "model": {"connectors": ["x"]}}, ["model.connectors", "stages: [2]"]),
        ({"data": {"on_bad_media": "skp"}}, ["data.on_bad_media", "error, skip, substitute", "Did you mean 'skip'"]),
        ({"training": {"learning_rate": "fast"}}, ["training.learning_rate", "a number is expected"]),
        ({"training": {"bf16": "yes please"}}, ["training.bf16", "true or false"]),
        ({"training": {"eval_strategy": 5}}, ["training.eval_strategy", "text is expected"]),
        ({"training": {"output_dir": "x"}}, ["training.output_dir", "output.dir"]),
        ({"training": {"label_smoothing_factor": 0.1}}, ["training.label_smoothing_factor"]),
        ({"training": {"objective": "embedding"}}, ["training.objective", "alignment.objective"]),
        ({"training": {"observe_modalities": -1}}, ["training.observe_modalities", "-1", "0"]),
        ({"training": {"observe_modalities": True}}, ["training.observe_modalities", "True", "integer"]),
        (
            {"alignment": {"observe_modalities": 5}},
            ["alignment.observe_modalities", "5", "training.observe_modalities"],
        ),
        (
            {"adapter": {"method": "lora"}, "training": {"observe_modalities": 5}},
            ["training.observe_modalities", "5", "adapter.method", "lora"],
        ),
        ({"alignment": {"objective": "clip"}}, ["alignment.objective", "language_modeling, embedding"]),
    ],
)
def test_wrong_value_is_reported_with_what_is_expected(raw, words):
    refused(raw, *words)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "key",
    [
        *("adapter.r", "model.max_length", "data.train_size", "data.validation_size", "data.video_frames"),
        *("evaluation.size", "evaluation.blank_size", "evaluation.batch_size", "evaluation.max_new_tokens"),
        *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
        *("training.global_batch_size", "training.num_train_epochs", "training.logging_steps", "training.save_steps"),
        *("training.eval_steps", "alignment.per_device_train_batch_size", "training.save_total_limit"),
    ],
)
def test_zero_and_negative_sizes_are_refused(key, value):
    section, name = key.split(".")
    refused({section: {name: value}}, key, str(value), "too small")


@pytest.mark.parametrize(("key", "value"), [("max_steps", 0), ("max_steps", -5), ("seed", -1), ("learning_rate", -0.1)])
def test_numbers_that_would_mean_something_else_are_refused(key, value):
    refused({"training": {key: value}}, f"training.{key}", "too small")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_rates_are_finite(value):
    refused({"training": {"learning_rate": value}}, "training.learning_rate")


def test_yaml_readings_of_numbers_and_words_are_understood():
    # YAML 1.1 reads 1e-4 as text and a bare `no` as false.
    raw = yaml.safe_load("training: {learning_rate: 1e-4, save_strategy: no, max_grad_norm: 1, eval_steps: 5}")
    section = config_from_dict(raw).training
    assert section == {"learning_rate": 1e-4, "save_strategy": "no", "max_grad_norm": 1.0, "eval_steps": 5.0}
    weights = config_from_dict({"adapter": {"interaction_weight": {"visual": "5e-2"}}}).adapter.interaction_weight
    assert weights == {"visual": 0.05}


def test_overrides_reach_any_depth(config_file):
    path = config_file("training:\nadapter: {r: 4}\n")
    config = load_config(
        path,
        ["adapter.r=8", "training.max_steps=3", "model.modalities.visual.encoder={type: clip}", "data.train=a=b.jsonl"],
    )
    assert (config.adapter.r, config.training) == (8, {"max_steps": 3})
    assert config.model.modalities == {"visual": {"encoder": {"type": "clip"}}}
    assert config.data.train == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r", "section.key=value"),
        ("=4", "section.key=value"),
        ("adapter.r.deep=4", "'r' is a value, not a section"),
        ("adapter.r=[1", "is no YAML"),
        ("adapter.rr=1", "unknown key 'adapter.rr'"),
    ],
)
def test_wrong_overrides_are_reported(config_file, override, words):
    with pytest.raises(MokaError) as caught:
        load_config(config_file("adapter: {r: 4}"), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", ["cannot be read as YAML", "line 2"]),
        ("- 1\n- 2", ["top level must be a mapping"]),
        ("just words", ["top level must be a mapping"]),
        ("a:\t1\n\t b: 1", ["cannot be read as YAML", "line"]),
    ],
)
def test_wrong_yaml_is_reported_with_its_line(config_file, text, words):
    path = config_file(text)
    with pytest.raises(MokaError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_absent_and_unreadable_files_are_reported(tmp_path):
    with pytest.raises(MokaError, match="No configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(MokaError, match="is a folder; give one of the YAML files in it"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(MokaError, match=r"binary.yaml cannot be read as YAML"):
        load_config(tmp_path / "binary.yaml")


def test_resolved_configuration_reads_back_as_itself(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x"))
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))).to_dict() == config.to_dict()


def test_help_lists_every_key():
    keys = {line.split(":")[0].strip() for line in describe().splitlines() if not line.strip().startswith("#")}
    for section in dataclasses.fields(RunConfig):
        assert section.name in keys
        default = getattr(RunConfig(), section.name)
        for f in dataclasses.fields(default) if dataclasses.is_dataclass(default) else []:
            assert f.name in keys
    trainer = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert {"learning_rate", "global_batch_size", "projector_learning_rate"} <= keys
    # The rest are those that moka sets itself, or refuses.
    assert trainer - keys == {
        *("output_dir", "resume_from_checkpoint", "remove_unused_columns", "label_names", "prediction_loss_only"),
        *("save_only_model", "ignore_data_skip", "auto_find_batch_size"),
        *("enable_jit_checkpoint", "average_tokens_across_devices", "label_smoothing_factor"),
    }


def test_file_is_on_its_bases(config_file):
    config_file("adapter: {r: 2, alpha: 4}\ntraining: {seed: 1, learning_rate: 1e-3}\n", "low.yaml")
    config_file("base: low.yaml\nadapter: {r: 3}\n", "high.yaml")
    config_file("data: {train: other.jsonl}\n", "side.yaml")
    path = config_file("base: [high.yaml, side.yaml]\ntraining: {seed: 5}\n")
    config = load_config(path, ["adapter.dropout=0.5"])
    assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (3, 4, 0.5)
    assert config.training == {"seed": 5, "learning_rate": 1e-3}
    assert config.data.train == "other.jsonl"


def test_mapping_of_another_type_or_format_replaces_the_one_below(config_file):
    low = {
        "model": {"modalities": {"visual": {"encoder": {"type": "clip", "layer": -2}, "projector": {"type": "mlp"}}}},
        "data": {"train": {"format": "ave", "root": "a", "split": "train"}},
    }
    config_file(yaml.safe_dump(low), "low.yaml")
    high = {
        "base": "low.yaml",
        "model": {"modalities": {"visual": {"encoder": {"type": "siglip"}, "projector": {"tokens": 4}}}},
        "data": {"train": {"format": "pope", "root": "b"}},
    }
    config = load_config(config_file(yaml.safe_dump(high)))
    visual = config.model.modalities["visual"]
    assert visual == {"encoder": {"type": "siglip"}, "projector": {"type": "mlp", "tokens": 4}}
    assert config.data.train == {"format": "pope", "root": "b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: gone.yaml\n", ["run.yaml: base: no configuration file", "gone.yaml"]),
        ("base: run.yaml\n", ["its own base"]),
        ("base: [7]\n", ["base: 7 is no path"]),
    ],
)
def test_base_that_cannot_be_read_is_reported(config_file, text, words):
    path = config_file(text)
    with pytest.raises(MokaError) as caught:
        load_config(path)
    for word in words:
        assert word in str(caught.value)


def tiny_config(**changes):
    spec = {"encoder": {"type": "clip", "name_or_path": "openai/clip-vit-large-patch14", "layer": -2}}
    spec["projector"] = {"type": "qformer"}
    raw = {
        "stages": [2],
        "model": {
            "backbone": "meta-llama/Llama-2-7b-chat-hf",
            "tiny": True,
            "connectors": ["runs/one/connector", "visual.bin"],
            "modalities": {"visual": spec},
        },
        "training": {"bf16": True, "learning_rate": 1e-4},
        "output": {"dir": "runs/two"},
    }
    return config_from_dict({**raw, **changes})


def test_tiny_swaps_parts_and_folders_and_nothing_else():
    config = tiny_config()
    assert config.model.backbone == "tiny:llama-2"
    encoder = config.model.modalities["visual"]["encoder"]
    assert encoder["type"] == "clip"
    assert encoder["layer"] == -2
    assert not encoder.get("name_or_path")
    assert encoder["model_config"]["num_hidden_layers"] <= 3
    assert config.model.connectors[0] == "runs/one-tiny/connector"
    assert config.output.dir == "runs/two-tiny"
    assert config.training["learning_rate"] == 1e-4
    assert (config.training["bf16"], config.training["max_steps"]) == (False, 2)


def test_tiny_made_tiny_again_is_the_same():
    once = tiny_config().to_dict()
    assert config_from_dict(once).to_dict() == once


def test_backbone_without_a_stand_in_is_reported():
    with pytest.raises(MokaError, match=r"bigscience/bloom.*tiny:llama-2, tiny:llama-3, tiny:qwen2"):
        config_from_dict({"model": {"backbone": "bigscience/bloom", "tiny": True}})


def test_override_reaches_one_of_two_sections_that_a_file_shares_by_an_alias(config_file):
    config_file("alignment: &same {learning_rate: 1e-3}\ntraining: *same\n", "low.yaml")
    config = load_config(config_file("base: low.yaml\n"), ["training.learning_rate=5e-4"])
    assert (config.alignment["learning_rate"], config.training["learning_rate"]) == (1e-3, 5e-4)


def test_tiny_leaves_files_and_folders_below_a_tiny_one_only():
    config = tiny_config(output={"dir": "runs/two-tiny/seed1/stage1"})
    assert config.model.connectors[1] == "visual.bin"
    assert config.output.dir == "runs/two-tiny/seed1/stage1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  seed: 1\ntraining:\n  max_steps: 2\n", ["training", "twice", "line 1"]),
        ("model: " + "[" * 3000 + "]" * 3000, ["nested"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"k{n}: &k{n} [{'*b, ' * 40}*b]\n" for n in range(1)), None),
        ("a: &a {b: *a}\n", ["itself"]),
        ("training: {seed: " + "9" * 5000 + "}\n", ["digits"]),
        ("? [a, b]\n: 1\n", ["YAML"]),
    ],
)
def test_yaml_that_is_no_configuration_is_refused_by_file(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(MokaError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words or ["unknown key"])


def test_aliases_that_multiply_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(MokaError, match="100,000"):
        load_config(tmp_path / "run.yaml")


def test_a_date_is_text(tmp_path):
    (tmp_path / "run.yaml").write_text("output: {dir: 2024-01-31}\n")
    assert load_config(tmp_path / "run.yaml").output.dir == "2024-01-31"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(tmp_path, value):
    (tmp_path / "run.yaml").write_text(f"adapter: {{alpha: {value}}}\n")
    with pytest.raises(MokaError, match=r"adapter\.alpha.*(nan|inf)"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("given", "steps"), [(None, 2), (-1, 2), (3, 3), (5000, 20)])
def test_tiny_limits_the_steps(given, steps):
    training = {} if given is None else {"max_steps": given}
    config = config_from_dict({"model": {"tiny": True}, "training": training})
    assert config.training["max_steps"] == steps


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, ["data.train"]),
        ({"stages": [1, 2], "data": {"train": "x.jsonl"}}, ["data.alignment", "stage 1"]),
        (
            {"data": {"train": "x.jsonl"}, "training": {"eval_strategy": "steps"}},
            ["training.eval_strategy", "data.validation"],
        ),
    ],
)
def test_a_run_without_its_data_is_refused_before_anything_is_fetched(raw, words):
    with pytest.raises(MokaError) as error:
        check_complete(config_from_dict(raw))
    assert all(word in str(error.value) for word in words)


def test_each_stage_has_its_own_seeds():
    config = config_from_dict({"training": {"seed": 7}, "alignment": {"seed": 3, "data_seed": 5}})
    assert (config.seed(1), config.data_seed(1), config.seed(2), config.data_seed(2)) == (3, 5, 7, 7)
    assert config_from_dict({"training": {"seed": 7}}).seed(1) == 7
