"""NormBalance by hand, and the norms of z~ that it makes equal."""

import pytest
import torch

from moka.adapter.diagnostics import modality_norms
from moka.balance import Handles, NormBalance
from moka.balance.norms import norm_factors

EXACT = {"abs": 1e-6, "rel": 0}


def test_factors_by_hand():
    # The mean of 1, 2 and 6 is 3.
    assert norm_factors({"a": 1.0, "b": 2.0, "c": 6.0}, 1.0) == pytest.approx({"a": 3.0, "b": 1.5, "c": 0.5}, **EXACT)
    assert norm_factors({"a": 1.0, "b": 3.0}, 0.5) == pytest.approx({"a": 2**0.5, "b": (2 / 3) ** 0.5}, **EXACT)
    assert norm_factors({"a": 1.0, "b": 3.0}, 0.0) == {"a": 1.0, "b": 1.0}
    assert norm_factors({"a": 1.0}, 1.0) == norm_factors({"a": 1.0, "b": 0.0}, 1.0) == {}


@pytest.mark.parametrize("loud", ["visual", "audio"])
def test_every_modality_comes_to_have_the_same_norm(kit, tmp_path, loud):
    """In the layers whose inputs do not depend on the adapter, of the one batch that the data are."""
    model = kit.make_model(interaction="none")
    handles = Handles(model)
    handles.scale(loud, dict.fromkeys(handles.layers, 5.0))
    data = kit.make_data(model, 4)
    batch = kit.collate(data)
    batch.pop("sample_ids")
    first = [name for name in handles.layers if ".layers.0." in name and "q_proj" in name]
    assert len(first) == 1

    def norms():
        return {name: norm.z for name, norm in modality_norms(model, batch)[first[0]].items()}

    before = norms()
    assert max(before, key=before.get) == loud
    kit.make_trainer(tmp_path, [NormBalance(every=1)], model, data, max_steps=1, learning_rate=0.0).train()
    after, mean = norms(), sum(before.values()) / 3
    assert after == pytest.approx(dict.fromkeys(("text", "visual", "audio"), mean), rel=1e-4)


def test_scaled_rows_keep_their_moments(kit):
    handles = Handles(kit.make_model())
    stacked = [layer.moka_A["default"].weight for layer in handles.layers.values()]
    handles.optimizer = torch.optim.AdamW(stacked)
    for weight in stacked:
        weight.grad = torch.ones_like(weight)
    handles.optimizer.step()
    before = handles.copy("audio")
    handles.scale("audio", dict.fromkeys(handles.layers, 2.0))
    for name, row in handles.A("audio").items():
        torch.testing.assert_close(row, 2 * before[name])
    assert all(handles.optimizer.state[weight]["exp_avg"].all() for weight in stacked)


def test_norms_are_running_means_that_follow_the_scaling(kit):
    strategy = NormBalance(every=1, decay=0.5)
    strategy.norms = {"layer": {"visual": 1.0, "audio": 3.0}}
    seen = {}
    handles = type("H", (), {"scale": staticmethod(lambda name, factors: seen.__setitem__(name, factors))})
    strategy.interval(handles, type("C", (), {"step": 0}))
    assert seen == {"visual": {"layer": 2.0}, "audio": {"layer": pytest.approx(2 / 3)}}
    assert strategy.norms == {"layer": {"visual": 2.0, "audio": pytest.approx(2.0)}}
