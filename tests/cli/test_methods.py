"""Every method that `moka compare` knows runs through `moka train` and `moka compare`."""

import json
from collections import defaultdict

import pytest
import yaml

import moka as package
from moka.adapter.config import PRESETS
from moka.errors import MokaError
from moka.evaluation import compare as comparing
from moka.evaluation.compare import METHODS
from moka.modeling.build import adapter_parameters, build_model
from moka.training import config_from_dict

SHORT = {
    **{"stages": [2], "training__max_steps": 2, "training__save_strategy": "no", "data__validation": None},
    **{"training__eval_strategy": "no", "training__gradient_accumulation_steps": 2, "output__samples": 0},
}


@pytest.mark.parametrize("name", METHODS)
def test_train_and_load(moka, config_file, name):
    settings = METHODS[name]
    path, root = config_file(**SHORT)
    done = moka("train", path, *(f"adapter.{key}={json.dumps(value)}" for key, value in settings.items()))
    assert done.code == 0, done.err[-800:]
    loaded = package.load(root)
    trained = {k: p for k, p in loaded.model.named_parameters() if ".moka_B." in k or ".lora_B." in k}
    assert trained
    assert all(parameter.abs().max() > 0 for parameter in trained.values())
    assert yaml.safe_load((root / "config.yaml").read_text())["adapter"]["method"] == settings["method"]
    assert isinstance(loaded.generate("Which digit?", max_new_tokens=2), str)


@pytest.mark.parametrize("name", [name for name, settings in METHODS.items() if name in PRESETS])
def test_preset_sets_what_compare_sets(name):
    adapter = config_from_dict({"stages": [2], "adapter": {"preset": name}}, "run.yaml").adapter
    assert all(adapter[key] == value for key, value in METHODS[name].items())


def test_ranks_are_matched_for_all_methods(config_file):
    path, _ = config_file(**SHORT, adapter__r=8)
    config = config_from_dict(yaml.safe_load(path.read_text()))
    adapters = {name: comparing._adapter_section(config, name) for name in METHODS}
    comparing._match(config, adapters)
    model, _ = build_model(config.model)
    counts = defaultdict(dict)
    for name, section in adapters.items():
        for r in (section["r"] - 1, section["r"], section["r"] + 1):
            counts[name][r - section["r"]] = adapter_parameters(model, {**section, "r": max(r, 1)})
    wanted = counts["moka"][0]
    assert adapters["moka"]["r"] == 8
    for name, found in counts.items():
        nearest = min(found.values(), key=lambda count: abs(count - wanted))
        assert abs(found[0] - wanted) == abs(nearest - wanted), name


def test_method_that_cannot_be_as_small_is_refused(refused, config_file):
    path, root = config_file(**SHORT, adapter__r=1)
    line = refused("compare", path, "--methods", "moka,loramoe", "--match-params")
    for word in ("--match-params", "loramoe", "rank 1", "adapter.r"):
        assert word in line
    assert not root.exists()


def test_comparison_takes_options_of_its_own_method_only(config_file):
    options = {"adapter__method": "imod", "adapter__method_options": {"seed": 3}, "adapter__adapt": ["visual"]}
    path, _ = config_file(**SHORT, **options)
    config = config_from_dict(yaml.safe_load(path.read_text()))
    sections = {name: comparing._adapter_section(config, name) for name in METHODS}
    assert sections["imod"]["method_options"] == {"seed": 3}
    for name, section in sections.items():
        built = comparing._with(config, adapter=section).adapter
        assert built["method"] == METHODS[name]["method"]
        assert name == "imod" or not built.get("method_options")


def test_comparison_of_new_methods(moka, config_file):
    path, root = config_file(**SHORT)
    done = moka("compare", path, "--methods", "imod,hydralora,official-avt", "--seeds", "1", "--match-params")
    assert done.code == 0, done.err[-800:]
    table = (root / "comparison.md").read_text()
    assert all(f"| {name} |" in table for name in ("imod", "hydralora", "official-avt"))


def test_what_has_no_meaning_for_a_method_is_refused():
    for raw, words in (
        ({"method": "loramoe", "share_b": False}, ["adapter.share_b", "loramoe"]),
        ({"method": "dora", "interaction": "none"}, ["adapter.interaction", "dora"]),
        ({"method": "hydralora", "method_options": {"k": 1}}, ["adapter.method_options", "'k'", "hydralora"]),
    ):
        with pytest.raises(MokaError) as caught:
            config_from_dict({"adapter": raw}, "run.yaml")
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(MokaError, match=r"training\.fp16"):
        config_from_dict({"adapter": {"method": "imod"}, "training": {"fp16": True}}, "run.yaml")


def test_diagnose_and_export_of_another_method(moka, refused, config_file, tmp_path):
    path, root = config_file(**SHORT, adapter__method="hydralora")
    assert moka("train", path).code == 0
    done = moka("diagnose", root, "--size", "4")
    assert done.code == 0, done.err[-800:]
    assert "hydralora" in done.out
    assert "hydralora" in refused("export", root, "--format", "lora", "--output", tmp_path / "out")
