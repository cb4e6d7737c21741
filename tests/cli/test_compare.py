"""``moka compare``: one table of methods, that differ in the adapter only."""

import json
import statistics

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moka.evaluation import compare as comparing
from moka.modeling.build import adapter_parameters, build_model
from moka.training import config_from_dict

SHORT = {
    "training__max_steps": 2,
    "alignment__max_steps": 2,
    "training__save_strategy": "no",
    "alignment__save_strategy": "no",
    "data__validation": None,
}


def test_comparison_is_fair_complete_and_resumable(moka, config_file):
    path, root = config_file(**SHORT, adapter__r=3)
    command = ("compare", path, "--methods", "lora,uni_modal_lora,moka", "--seeds", "2", "--match-params")
    done = moka(*command)
    assert done.code == 0, done.err[-800:]
    result = json.loads((root / "comparison.json").read_text())
    assert result["seeds"] == [42, 43]
    assert list(result["methods"]) == ["lora", "uni_modal_lora", "moka"]

    # Parameters are matched as closely as full ranks allow, and alpha / r is kept.
    wanted = result["methods"]["moka"]["parameters"]
    assert result["methods"]["moka"]["adapter"]["r"] == 3
    model, _ = build_model(config_from_dict(yaml.safe_load(path.read_text())).model)
    for summary in result["methods"].values():
        raw = {**summary["adapter"], "r": 1}
        per_rank = adapter_parameters(model, config_from_dict({"adapter": raw}).adapter)
        assert summary["parameters"] == per_rank * summary["adapter"]["r"]
        assert abs(summary["parameters"] - wanted) <= per_rank / 2
        assert summary["adapter"]["alpha"] / summary["adapter"]["r"] == pytest.approx(4 / 3)
    assert len({summary["adapter"]["r"] for summary in result["methods"].values()}) == 3

    # The runs of one seed differ in the adapter section and their folder only.
    for seed in (42, 43):
        configs = {m: yaml.safe_load((root / f"seed{seed}/{m}/config.yaml").read_text()) for m in result["methods"]}
        for config in configs.values():
            config.pop("adapter")
            config.pop("output")
        assert configs["lora"] == configs["moka"] == configs["uni_modal_lora"]
        assert configs["moka"]["training"]["seed"] == seed
        assert configs["moka"]["model"]["connectors"] == [str(root / f"seed{seed}/stage1/connector")]

    # Mean and sample standard deviation over the seeds.
    for summary in result["methods"].values():
        for name, values in summary["runs"].items():
            assert len(values) == 2
            assert summary["mean"][name] == statistics.fmean(values)
            assert summary["spread"][name] == statistics.stdev(values)
    table = (root / "comparison.md").read_text()
    assert "| method | r | adapter parameters | written | spoken | same | sum | overall |" in table
    assert f"| moka | 3 | {wanted:,} |" in table
    assert "uni_modal_lora" in done.out
    assert result["missing"] == []
    expected = f"moka compare {path} --methods lora,uni_modal_lora,moka --seeds 2 --match-params"
    assert result["command"] == expected
    assert expected in table
    assert f"moka & 3 & {wanted:,} &" in (root / "comparison.tex").read_text()

    # The table can be had again without training, in each format.
    assert moka("compare", "--show", root, "--format", "markdown").out == table
    assert moka("compare", "--show", root, "--format", "latex").out == (root / "comparison.tex").read_text()
    assert "uni_modal_lora" in moka("compare", "--show", root).out

    # Again: nothing is trained twice but what is missing or was made with other settings.
    (root / "seed43/moka/comparison.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in root.rglob("adapter_model.safetensors")}
    adapter = load_file(root / "seed43/moka/adapter/adapter_model.safetensors")
    assert moka(*command).code == 0
    after = {p: p.stat().st_mtime_ns for p in root.rglob("adapter_model.safetensors")}
    assert {p.parent.parent.relative_to(root).as_posix() for p in after if after[p] != before[p]} == {"seed43/moka"}
    again = load_file(root / "seed43/moka/adapter/adapter_model.safetensors")
    assert all(torch.equal(again[key], adapter[key]) for key in adapter)
    assert json.loads((root / "comparison.json").read_text()) == result

    assert moka(*command[:-3], "--seeds", "1", "--match-params", "data.train_size=32").code == 0
    newest = {p: p.stat().st_mtime_ns for p in root.rglob("adapter_model.safetensors")}
    assert {p.parts[-4] for p in newest if newest[p] != after[p]} == {"seed42"}


def test_interrupted_comparison_shows_what_is_done_and_resumes(moka, config_file, monkeypatch):
    path, root = config_file(**SHORT)
    command = ("compare", path, "--methods", "lora,moka", "--seeds", "1")
    train = comparing.run_training

    def interrupted(config, **kwargs):
        if config.output.dir.endswith("moka"):
            raise KeyboardInterrupt
        return train(config, **kwargs)

    monkeypatch.setattr(comparing, "run_training", interrupted)
    assert moka(*command).code == 130
    monkeypatch.undo()
    shown = moka("compare", "--show", root)
    assert shown.code == 0
    assert "Missing: 1 of 2 runs: moka (seed 42)." in shown.out
    assert f"to continue: moka compare {path}" in shown.out
    assert moka(*command).code == 0
    assert "Missing" not in moka("compare", "--show", root).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], ["CONFIG.yaml", "--show"]),
        (["compare", "--show", "nowhere"], ["nowhere", "has no comparison"]),
        (["compare", "some.yaml", "--show", "nowhere"], ["--show", "some.yaml"]),
    ],
)
def test_show_wants_a_comparison_and_no_configuration(refused, arguments, words):
    line = refused(*arguments)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "lora,qlora"], ["--methods", "'qlora'", "known: lora"]),
        (["--methods", "lora,lora"], ["--methods", "once"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["data.test=null"], ["data.test"]),
        (["stages=[1]"], ["stages"]),
        (["adapter.rang=2"], ["adapter.rang"]),
    ],
)
def test_bad_comparisons_are_one_line_and_leave_nothing(refused, config_file, arguments, words):
    path, root = config_file(**SHORT)
    line = refused("compare", path, *arguments)
    for word in words:
        assert word in line, line
    assert not root.exists()


def test_folder_of_a_single_run_is_refused(refused, config_file, trained_run):
    path, _ = config_file(**SHORT)
    assert "has a single run" in refused("compare", path, f"output.dir={trained_run}")
