"""``moka.diagnose``: its figures are those of the engine, on every kind of model; what cannot be had is named."""

import json
import math

import pytest
import torch

import moka
from moka.analysis import Contribution
from moka.analysis.attention import attention_by_modality
from moka.errors import MokaError


def test_figures_are_the_means_of_the_engine(composed):
    example = composed()
    found = moka.diagnose(example.model, [example.batch], ablate=["tokens", "adapter"], noise="visual", progress=False)
    engine = Contribution(example.model, example.batch)
    for ablate in ("tokens", "adapter"):
        overall = found.contributions[ablate]["all"]
        for modality in ("visual", "audio"):
            expected = engine.shapley(ablate=ablate)[modality].mean().item()
            assert overall["shapley"][modality]["value"] == pytest.approx(expected, abs=1e-5)
        expected = engine.log_likelihood(["visual"], ablate).mean().item()
        assert overall["log_likelihood"]["visual"]["value"] == pytest.approx(expected, abs=1e-5)
    shares = engine.shares("visual", "audio")
    of_pair = found.contributions["tokens"]["all"]["shares"]["visual, audio"]
    assert of_pair["synergistic"]["value"] == pytest.approx(shares.synergistic.mean().item(), abs=1e-5)
    assert found.n == 2
    assert found.gradients is not None
    assert sum(found.gradients["update_shares"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(found.gradients["fisher_shares"].values()) == pytest.approx(1, abs=1e-4)
    assert set(found.vulnerability["visual"]) == {"0", "0.25", "0.5", "1", "2"}
    assert found.attention is not None
    assert len(found.attention["total"]["visual"]) == 2  # layers
    expected = attention_by_modality(example.model, example.batch).mass["visual"].mean(-1).tolist()
    assert found.attention["total"]["visual"] == pytest.approx(expected, abs=1e-5)


def test_every_model_has_a_report_and_names_what_it_cannot_have(example, tmp_path):
    found = moka.diagnose(example.model, [example.batch], progress=False)
    found.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data-chart=") >= 6
    assert set(found.modalities) == set(example.media)
    has_moka = found.adapter == "MokA"
    assert (found.gradients is not None) == has_moka
    assert has_moka != ("gradients" in found.left_out)
    if not has_moka:
        assert "gradients" in page
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["n"] == len(example.batch["labels"])


def test_batches_of_rows_give_what_one_batch_gives(composed):
    example = composed()
    rows = []
    for k in range(2):
        row = {name: value[k : k + 1] for name, value in example.batch.items() if name != "input_features"}
        rows.append(row | ({"input_features": example.batch["input_features"]} if k == 0 else {}))
    one = moka.diagnose(example.model, [example.batch], progress=False).contributions["tokens"]["all"]
    two = moka.diagnose(example.model, rows, progress=False).contributions["tokens"]["all"]
    for figure in ("log_likelihood", "lift", "shapley"):
        for name, each in one[figure].items():
            assert two[figure][name]["value"] == pytest.approx(each["value"], abs=1e-5), (figure, name)


def test_the_model_is_left_as_it_was(composed):
    example = composed()
    example.model.train()
    before = {name: p.clone() for name, p in example.model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in example.model.named_parameters()}
    moka.diagnose(example.model, [example.batch], noise="audio", progress=False)
    assert example.model.training
    for name, parameter in example.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == wanted[name]
        assert parameter.grad is None


def test_samples_that_cannot_be_used_are_listed_and_the_others_counted(composed):
    example = composed()
    example.batch["labels"][1] = -100
    found = moka.diagnose(example.model, [example.batch], progress=False)
    assert found.n == 1
    assert [(one["id"], "labels" in one["error"]) for one in found.failed] == [("1", True)]
    assert all(math.isfinite(each["value"]) for each in found.contributions["tokens"]["all"]["lift"].values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"value": "likelihod"}, ["value", "likelihod", "log_likelihood"]),
        ({"ablate": "token"}, ["ablate", "token", "adapter", "blank"]),
        ({"ablate": []}, ["ablate", "empty"]),
        ({"noise": "image"}, ["noise", "image", "visual"]),
        ({"size": 0}, ["size", "0"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"ablate": "blank"}, ["blank"]),
    ],
)
def test_bad_settings_are_named(composed, settings, words):
    example = composed()
    with pytest.raises(MokaError) as error:
        moka.diagnose(example.model, [example.batch], progress=False, **settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("data", "words"),
    [([], ["data", "empty"]), ("no labels", ["labels"]), ("no answers", ["data", "labels"]), ("no media", ["medi"])],
)
def test_bad_data_are_named(composed, data, words):
    example = composed()
    if data == "no labels":
        data = [{**example.batch, "labels": None}]
    elif data == "no answers":
        data = [{**example.batch, "labels": torch.full_like(example.batch["labels"], -100)}]
    elif data == "no media":
        text = example.batch["input_ids"].clamp(max=60)
        data = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}]
        data[0]["mm_token_type_ids"] = torch.zeros_like(text)
    with pytest.raises(MokaError) as error:
        moka.diagnose(example.model, data, progress=False)
    assert all(word in str(error.value) for word in words), error.value


def test_a_page_that_cannot_be_written_is_named(composed, tmp_path):
    example = composed()
    found = moka.diagnose(example.model, [example.batch], progress=False)
    (tmp_path / "file").write_text("")
    for write in (found.to_html, found.to_json):
        with pytest.raises(MokaError, match="file"):
            write(tmp_path / "file" / "report")
