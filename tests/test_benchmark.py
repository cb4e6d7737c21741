"""The benchmark's levels on a tiny backbone, and what its counters count."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark
from benchmarks import bars, batches, levels, measure, options, profiling, sizes, variants

TRAINED = {"bare", "bare again", "lora", "moka", "reference"}
SHORT = ["--rounds", "2", "--warm-up", "1", "--threads", "1"]
TINY = ["--backbone", "random:tiny"]
LEVELS = {
    "layer": (["--batch", "2", "--seq", "16", "--inputs", "32", "--outputs", "48"], TRAINED, 1),
    "block": ([*TINY, "--batch", "2", "--seq", "16", "--padding", "0.2"], TRAINED, 1),
    "step": ([*TINY, "--batch", "2", "--seq", "16"], TRAINED, 2),
    "prefill": ([*TINY, "--seq", "16"], {*TRAINED, "moka merged"}, 1),
    "decode": ([*TINY, "--prompt", "16", "--tokens", "2"], {*TRAINED, "moka merged"} - {"reference"}, 1),
    "growth": ([*TINY, "--curves", "seq", "--longest", "256"], TRAINED, 2),
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_writes_every_time_and_figure_of_every_variant(level, tmp_path, capsys):
    words, names, points = LEVELS[level]
    path = tmp_path / "own" / "result.json"
    benchmark.main([level, *words, *SHORT, "--json", str(path)])
    record = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 0
    assert {"level", "command", "machine", "versions", "commit", "dirty", "settings", "points"} <= set(record)
    assert record["settings"]["rounds"] == 2
    assert len(record["points"]) == points
    table = capsys.readouterr().out
    for point in record["points"]:
        assert set(point["seconds"]) == set(point["variants"]) == names
        for name, own in point["variants"].items():
            assert name in table
            assert len(point["seconds"][name]) == 2
            assert own["flops"] >= point["variants"]["bare"]["flops"] > 0
            assert own["peak_bytes"] > 0
            assert own["ms"] == sorted(own["ms"])
        assert point["variants"]["bare"]["of_bare"] == [1, 1, 1]


def test_sizes_that_need_a_gpu_are_said_to_be_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = benchmark.main(["ladder", "--sizes", "random:7b", *SHORT, "--json", str(tmp_path / "ladder.json")])
    assert [point["missing"] for point in record["points"]] == ["not run: no GPU"] * 2
    assert capsys.readouterr().out.count("not run: no GPU") == 2


def test_a_profile_says_the_adapter_from_the_backbone(tmp_path):
    words = ["profile", *TINY, "--batch", "2", "--seq", "32", "--variants", "lora", "moka", *SHORT]
    found = benchmark.main([*words, "--json", str(tmp_path / "profile.json")])["profile"]
    groups = {name: own["groups_ms"] for name, own in found.items()}
    assert groups["bare"]["adapter"] == groups["bare"]["optimizer"] == 0
    for name in ("lora", "moka"):
        assert all(groups[name][group] > 0 for group in profiling.GROUPS)


def test_attention_in_an_adapted_layer_is_the_adapters():
    grouping = profiling.Grouping(sizes.backbone_config("random:tiny"), rank=4, modalities=3)
    shapes = [[2, 3, 16, 4]] * 3
    for name in ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_backward"):
        assert grouping.group(name, shapes, "") == "attention"
        assert grouping.group(name, shapes, f"{name} {profiling.ADAPTED}") == "adapter"


def made(words, names=("moka", "reference")):
    """Models by variant and their batch."""
    arguments = options.parse([*words, "--threads", "1"])
    backbone = sizes.open_backbone(arguments.backbone, "float32", "cpu", 0)
    models, shared = variants.make_variants(backbone, arguments, names)
    batch = batches.make_batch(arguments, 100)
    shared["masks"] = batch.masks
    return models, batch, arguments


@pytest.mark.parametrize("more", [[], ["--padding", "0.2"], ["--modalities", "6"], ["--modalities", "1"]])
def test_the_plain_reference_computes_what_moka_computes(more):
    models, batch, arguments = made(["step", *TINY, "--batch", "3", "--seq", "24", *more])
    levels.check_step(models, batch, arguments)


def test_a_reference_that_computes_something_else_ends_the_benchmark():
    models, batch, arguments = made(["step", *TINY, "--batch", "3", "--seq", "24"])
    batch.masks.question[0] = batch.masks.question[0].roll(1)
    with pytest.raises(variants.MokaError, match="do not compute the same"):
        levels.check_step(models, batch, arguments)


def test_copies_of_a_large_backbone_share_weights_but_for_the_merged_one(monkeypatch):
    monkeypatch.setattr(variants, "SHARED_ABOVE", 0)
    models, _, _ = made(["decode", *TINY, "--prompt", "16"], ("bare", "moka", "moka merged"))
    weights = [models[name].get_submodule(path).weight for name, path in WEIGHTS.items()]
    assert weights[0] is weights[1]
    assert not torch.equal(weights[0], weights[2])


WEIGHTS = {
    "bare": "model.layers.0.mlp.up_proj",
    "moka": "base_model.model.model.layers.0.mlp.up_proj.base_layer",
    "moka merged": "base_model.model.model.layers.0.mlp.up_proj.base_layer",
}


def test_peak_memory_is_counted_to_the_byte():
    before = torch.ones(1000)

    def run():
        first = torch.empty(1000)  # 4,000 bytes
        second = before + first  # 8,000: the peak
        del first
        third = torch.empty(250)  # 5,000
        return second, third

    assert measure.peak_bytes(run, torch.device("cpu")) == 8000


def test_flops_of_one_layer_are_what_arithmetic_says(tmp_path):
    batch, seq, inputs, outputs, rank, kinds = 2, 40, 64, 96, 4, 3
    words = ["layer", "--batch", "2", "--seq", "40", "--inputs", "64", "--outputs", "96", *SHORT]
    record = benchmark.main([*words, "--json", str(tmp_path / "layer.json")])
    flops = {name: own["flops"] for name, own in record["points"][0]["variants"].items()}
    tokens = batch * seq
    bare = 4 * tokens * inputs * outputs  # forward, gradient of x
    assert flops["bare"] == flops["bare again"] == bare
    assert flops["lora"] == bare + 6 * tokens * rank * (inputs + outputs)  # forward, gradients of input and weight
    adapter = 6 * tokens * rank * (kinds * inputs + outputs)
    interaction = 2 * batch * 24 * 8 * rank  # one product of 24 media tokens with 8 of the question
    assert flops["reference"] == bare + adapter + 6 * interaction
    # The interaction's products may be computed again for the backward pass, and no other.
    assert bare + adapter + 6 * interaction <= flops["moka"] <= bare + adapter + 10 * interaction


def test_products_in_place_and_attention_on_a_cpu_are_counted():
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert measure.counted_flops(lambda: torch.zeros(2, 5).addmm_(a, b)) == 2 * 2 * 3 * 5
    x = torch.ones(1, 2, 7, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert measure.counted_flops(lambda: attention(x, x, x)) == 2 * (2 * 2 * 7 * 7 * 4)


def test_a_round_runs_every_case_once():
    ran = []
    cases = {name: measure.Case(lambda name=name: ran.append(name), 1) for name in "abc"}
    given = Namespace(device="cpu", rounds=4, seed=0, seconds=None)
    seconds = measure.interleaved(cases, given, "")
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 4)  # and one to warm up


def test_time_runs_out_after_three_rounds_at_least():
    case = {"a": measure.Case(lambda: 1.0, 1)}
    given = Namespace(device="cpu", rounds=50, seed=0, seconds=0.0)
    assert len(measure.interleaved(case, given, "")["a"]) == measure.FEWEST


def point(**times):
    names = {"bare": 1.0, "again": 1.0, "lora": 2.0, "moka": 1.5, "reference": 3.0, "merged": 1.0, **times}
    names["bare again"], names["moka merged"] = names.pop("again"), names.pop("merged")
    peak = {"bare": 100, "lora": 180, "moka": 140}
    return measure.Point({}, 1, {name: [t, t, t] for name, t in names.items()}, peak)


def test_bars_are_met_or_not_by_the_median_and_missing_ones_are_reported():
    found = {command: [point()] for command in dict.fromkeys(bar.command for bar in bars.BARS)}
    found[bars.GROWTH] = [point(moka=1.25), point(moka=1.5)]  # its share rises from 1/5 to 1/3
    found[bars.DECODE] = [point(merged=1.1)]  # 0.91 of the bare backbone's speed
    found[bars.LARGE] = [measure.Point({}, missing="not run: no GPU")]
    records = bars.rows(found)
    met = [record["met"] for record in records]
    # Half of the extra memory of LoRA is more than 0.4 of it.
    assert met == [True, True, False, True, False, True, True, False, None, None]
    assert records[2]["measured"] == (0.5, 0.5, 0.5)
    assert records[7]["measured"][1] == pytest.approx(1 / 3 - 1 / 5)
    assert [bars.cells(record)[-1] for record in records[3:5]] == ["yes", "NO"]
    assert bars.cells(records[-1])[2] == "not run: no GPU"


def test_every_bar_has_a_command_that_its_level_understands():
    given = options.parse(["bars", "--rounds", "3", "--backbone", "random:tiny"])
    parsed = [options.parse(command.split()) for command in bars.commands(given)]
    assert {one.level for one in parsed} == {"layer", "step", "prefill", "decode", "growth", "ladder"}
    assert all(one.rounds == 3 for one in parsed)
    assert {one.backbone for one in parsed if one.level in ("step", "prefill", "decode")} == {"random:tiny"}


def test_all_runs_every_level_with_what_it_was_given():
    words = ["all", "--minutes", "1", "--rounds", "3", "--device", "cuda", "--dtype", "nf4", "--curves", "media"]
    given = options.parse([*words, "--sizes", "random:15m", "--json", "folder/own.json"])
    parsed = {one.level: one for one in map(options.parse, options.commands_of_all(given, points=10))}
    assert list(parsed) == [level for level in options.LEVELS if level not in ("bars", "all")]
    assert all((one.rounds, one.device) == (3, "cuda") for one in parsed.values())
    assert all(one.dtype == "nf4" for level, one in parsed.items() if level != "ladder")
    assert (parsed["growth"].curves, parsed["ladder"].sizes) == (["media"], ["random:15m"])
    assert (parsed["step"].seconds, parsed["step"].json) == (6, Path("folder/own-step.json"))


def test_too_few_tokens_for_question_and_answer_is_an_error():
    with pytest.raises(SystemExit, match="leave 2 of text; 3 are needed"):
        benchmark.main(["layer", "--seq", "20", "--media", "0.9"])
