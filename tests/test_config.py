"""The configuration: every mistake is reported with its key, what was given, and what is allowed."""

import dataclasses

import pytest
import yaml
from transformers import TrainingArguments

from moka import MokaConfig
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


NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        # unknown keys, with the nearest known one
        ("modle", {}, ["'model'"]),
        ("model.backbon", "x", ["'backbone'"]),
        ("adapter.rank_pattrn", {}, ["'rank_pattern'"]),
        ("data.validaton", "x", ["'validation'"]),
        ("training.learning_rat", 1, ["'learning_rate'"]),
        ("alignment.objektive", "embedding", ["'objective'"]),
        ("training.global_batch", 8, ["'global_batch_size'"]),
        # values of another type, or not among those allowed
        ("stages", 2, ["list[int]"]),
        ("stages", [2, 1], ["[1, 2]"]),
        ("stages", [], ["[1, 2]"]),
        ("stages", [3], ["[1, 2]"]),
        ("model", [], ["mapping"]),
        ("model.modalities", {"visual": None}, ["dict"]),
        ("model.connectors", [1], ["list[str]"]),
        ("model.backbone", 7, ["str"]),
        ("model.dtype", "float16", ["auto", "float32", "bfloat16"]),
        ("model.quantization", "int4", ["nf4", "Did you mean 'int8'"]),
        ("adapter.method", "mokka", ["lora", "none", "Did you mean 'moka'"]),
        ("adapter.method", "none", ["stages: [1]"]),
        ("adapter.preset", "papr", ["Did you mean 'paper'"]),
        ("adapter.interaction", "reverse", ["Did you mean 'reversed'"]),
        ("adapter.r", True, ["int"]),
        ("adapter.r", "eight", ["int"]),
        ("adapter.alpha", NAN, ["finite"]),
        ("adapter.alpha", float("inf"), ["finite"]),
        ("adapter.dropout", 1.5, ["[0, 1)"]),
        ("adapter.adapt", ["smell"], ["'smell'", "'visual'"]),
        ("adapter.modalities", {"text": [0]}, ["model.modalities"]),
        ("data.on_bad_media", "skp", ["error", "substitute", "Did you mean 'skip'"]),
        ("training.learning_rate", "fast", ["float"]),
        ("training.learning_rate", NAN, ["finite"]),
        ("training.learning_rate", "nan", ["float"]),
        ("training.bf16", "yes please", ["bool"]),
        ("training.packing", "yes", ["bool"]),
        ("training.eval_strategy", 5, ["str"]),
        ("training.train_sampling_strategy", "batch_rebalance", ["random", "sequential", "group_by_length"]),
        ("training.output_dir", "x", ["output.dir"]),
        ("training.label_smoothing_factor", 0.1, ["answer"]),
        ("training.objective", "embedding", ["alignment.objective"]),
        ("alignment.objective", "clip", ["language_modeling", "embedding"]),
        # numbers out of range
        *(
            (key, value, [str(value)])
            for value in (0, -1)
            for key in (
                *("adapter.r", "model.max_length", "data.train_size", "data.validation_size", "data.video_frames"),
                *("evaluation.size", "evaluation.blank_size", "evaluation.batch_size", "evaluation.max_new_tokens"),
                *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
                *("training.global_batch_size", "training.num_train_epochs", "training.logging_steps"),
                *("training.save_steps", "training.eval_steps", "training.save_total_limit"),
                "alignment.per_device_train_batch_size",
            )
        ),
        ("training.max_steps", 0, ["0"]),
        ("training.max_steps", -5, ["-5"]),
        ("training.seed", -1, ["-1"]),
        ("training.learning_rate", -0.1, ["-0.1"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(key, value, words):
    section, _, name = key.partition(".")
    refused({section: {name: value} if name else value}, key, *words)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"adapter": {"method": "lora", "share_b": False}}, ["adapter.share_b", "lora"]),
        ({"adapter": {"method": "lora", "interaction": "none"}}, ["adapter.interaction", "lora"]),
        ({"stages": [1, 2], "model": {"connectors": ["x"]}}, ["model.connectors", "stages: [2]"]),
        ({"training": {"packing": True}}, ["training.packing", "model.max_length"]),
        (
            {"alignment": {"packing": True, "objective": "embedding"}, "model": {"max_length": 96}},
            ["alignment.packing", "alignment.objective: language_modeling"],
        ),
        ({"training": {"observe_modalities": -1}}, ["training.observe_modalities", "-1", "0"]),
        ({"training": {"observe_modalities": True}}, ["training.observe_modalities", "True", "int"]),
        (
            {"alignment": {"observe_modalities": 5}},
            ["alignment.observe_modalities", "5", "training.observe_modalities"],
        ),
        (
            {"adapter": {"method": "lora"}, "training": {"observe_modalities": 5}},
            ["training.observe_modalities", "5", "adapter.method", "lora"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(raw, words):
    refused(raw, *words)


def test_the_adapter_is_that_of_mokaconfig(tmp_path):
    """Each field of `MokaConfig` can be set, unless moka derives it; defaults are those of the preset."""
    raw = {"modalities": {"visual": {}, "audio": {}}}
    config = config_from_dict({"model": raw, "adapter": {"preset": "official-avt", "rank_pattern": {"q_proj": 8}}})
    fields = {f.name for f in dataclasses.fields(MokaConfig)}
    assert {"r", "bias", "rank_pattern", "adapt_towers"} <= set(config.adapter) - {"method", "preset"} <= fields
    assert (config.adapter["scale_position"], config.adapter["rank_pattern"]) == ("input", {"q_proj": 8})
    preset = MokaConfig.preset("official-avt", rank_pattern={"q_proj": 8})
    assert all(getattr(preset, key) == config.adapter[key] for key in set(config.adapter) & fields)
    # A run folder of earlier versions has null for what its preset decides.
    assert config_from_dict({"model": raw, "adapter": {"interaction_weight": None}}).adapter["interaction_weight"] == 1


def test_yaml_readings_of_numbers_and_words_are_understood(config_file):
    """YAML 1.1 reads 1e-4 as text and a bare `no` as false."""
    text = "training: {learning_rate: 1e-4, save_strategy: no, max_grad_norm: 1, eval_steps: 5, weight_decay: 1.e3}"
    section = load_config(config_file(text)).training
    assert section == {
        **{"learning_rate": 1e-4, "save_strategy": "no", "max_grad_norm": 1.0, "eval_steps": 5.0, "weight_decay": 1e3}
    }
    config = load_config(config_file("output: {dir: 1e4x}"), ["adapter.interaction_weight.visual=5e-2"])
    assert (config.output.dir, config.adapter["interaction_weight"]) == ("1e4x", {"visual": 0.05})


def test_overrides_reach_any_depth(config_file):
    path = config_file("training:\nadapter: {r: 4}\n")
    config = load_config(
        path,
        ["adapter.r=8", "training.max_steps=3", "model.modalities.visual.encoder={type: clip}", "data.train=a=b.jsonl"],
    )
    assert (config.adapter["r"], config.training) == (8, {"max_steps": 3})
    assert config.model.modalities == {"visual": {"encoder": {"type": "clip"}}}
    assert config.data.train == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r", "section.key=value"),
        ("=4", "section.key=value"),
        ("adapter.r.deep=4", "'r' is a value, not a section"),
        ("adapter.r=[1", "is no YAML"),
        ("adapter.rr=1", "adapter.rr"),
    ],
)
def test_wrong_overrides_are_reported(config_file, override, words):
    with pytest.raises(MokaError) as caught:
        load_config(config_file("adapter: {r: 4}"), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", ["line 2"]),
        ("- 1\n- 2", ["mapping"]),
        ("just words", ["mapping"]),
        ("a:\t1\n\t b: 1", ["line"]),
        (b"\xff\xfe\x00\x80", ["decode"]),
        ("training:\n  seed: 1\ntraining:\n  max_steps: 2\n", ["training", "twice", "line 1"]),
        ("model: " + "[" * 3000 + "]" * 3000, ["nested"]),
        ("a: &a {b: *a}\n", ["itself"]),
        ("training: {seed: " + "9" * 5000 + "}\n", ["digits"]),
        ("? [a, b]\n: 1\n", ["YAML"]),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)),
            ["100,000"],
        ),
        ("base: gone.yaml\n", ["base", "gone.yaml", "No such file"]),
        ("base: run.yaml\n", ["its own base"]),
        ("base: [7]\n", ["base: 7"]),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_the_place(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MokaError) as caught:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_absent_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(MokaError, match=str(path)):
            load_config(path)


def test_resolved_configuration_reads_back_as_itself(tiny_config, tmp_path):
    config = config_from_dict(tiny_config(tmp_path / "x"))
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))).to_dict() == config.to_dict()


def test_help_lists_every_key_that_can_be_set():
    keys = {line.split(":")[0].strip() for line in describe().splitlines() if not line.strip().startswith("#")}
    sections = {section.name: getattr(RunConfig(), section.name) for section in dataclasses.fields(RunConfig)}
    assert set(sections) <= keys
    for default in sections.values():
        assert keys.issuperset(vars(default) if dataclasses.is_dataclass(default) else [])
    trainer = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert {"learning_rate", "global_batch_size", "projector_learning_rate", *RunConfig().adapter} <= keys
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
    assert [config.adapter[key] for key in ("r", "alpha", "dropout")] == [3, 4, 0.5]
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
    assert config_from_dict(config.to_dict()).to_dict() == config.to_dict()  # made tiny again it is the same


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


def test_a_date_is_text(tmp_path):
    (tmp_path / "run.yaml").write_text("output: {dir: 2024-01-31}\n")
    assert load_config(tmp_path / "run.yaml").output.dir == "2024-01-31"


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
