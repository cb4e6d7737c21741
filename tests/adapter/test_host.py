"""No forward waits for the device: what the routing depends on is known in host memory, and goes up in one copy.

The device is torch's ``meta``, whose tensors have no values: whoever reads one back fails, as ``bool(t.any())``,
``int(t.sum())``, ``t.nonzero()``, ``t.tolist()`` and ``t.cpu()`` do.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moka
from moka.adapter.routing import build_routing
from moka.host import HostIds, upload

NAMES = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
META = torch.device("meta")


class Ops(TorchDispatchMode):
    """Counts tensor operations (what hands memory to numpy and back is none), and copies from the host to the device."""

    def __init__(self):
        super().__init__()
        self.names, self.uploads = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith(("aten.detach.", "aten.lift_fresh.")):
            self.names.append(str(function))
        out = function(*args, **(kwargs or {}))
        if str(function).startswith("aten._to_copy"):
            self.uploads += args[0].device.type == "cpu" and out.device.type != "cpu"
        return out


@pytest.fixture(autouse=True)
def _others_read_no_values(monkeypatch):
    """It asks masks and positions whether they can be left out; where it traces a graph, it does not."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)  # knows no such device


@pytest.fixture
def away(tiny):
    """An adapted llama in training on a device that gives no value back."""
    return tiny.adapted().to(META).train()


def on_meta(tensors):
    return {name: tensor.to(META) for name, tensor in tensors.items()}


@pytest.fixture
def labelled(batch):
    ids = batch.kwargs(*NAMES)
    return {**ids, "labels": torch.where(ids["interaction_ids"] == 0, ids["input_ids"], -100)}


@pytest.mark.parametrize("left_out", [(), ("interaction_ids",), ("interaction_ids", "mm_token_type_ids")])
def test_a_training_step_with_ids_on_the_host_reads_nothing_back(away, labelled, left_out):
    given = {name: tensor for name, tensor in labelled.items() if name not in left_out}
    loss = away(**on_meta(given), host_ids=HostIds(given)).loss
    loss.backward()
    assert loss.device == META
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        away(**on_meta(given))  # without them it has to


def test_ids_may_lie_on_the_host_by_themselves(away, labelled):
    ids = {name: labelled.pop(name) for name in ("mm_token_type_ids", "interaction_ids")}
    labelled.pop("attention_mask")
    away(**on_meta(labelled), **ids).loss.backward()
    with moka.routing(away, **ids):
        away(**on_meta(labelled)).loss.backward()


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_routing_goes_up_in_one_copy(batch, adapters):
    configs = {str(i): moka.MokaConfig(interaction_weight=i / 4) for i in range(adapters)}
    ids = batch.mm_token_type_ids, batch.interaction_ids, batch.attention_mask
    with Ops() as ops:
        routing = build_routing(configs, *(own.numpy() for own in ids), only=None, device=META)
    assert ops.uploads == 1
    for view in routing.views.values():
        tensors = [
            view.row,
            view.adapted,
            *(getattr(view.pairs, n) for n in ("query_index", "key_index", "mask", "weight")),
        ]
        assert all(tensor.device == META for tensor in tensors)


def test_an_upload_keeps_every_array(monkeypatch):
    """Packed and taken apart again, on a device that does have values: the packing is that of any device but the CPU."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(-9, 9, (3, 5), generator=generator),
        torch.rand(2, 7, generator=generator) > 0.5,
        torch.rand(4, generator=generator),
        torch.zeros(0, 3),
        torch.randint(0, 9, (6, 4), generator=generator).T,
    ]

    class Elsewhere:
        type = "elsewhere"

    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, **k: to(t, "cpu") if isinstance(a[0], Elsewhere) else to(t, *a, **k)
    )
    arrays = [tensor.numpy() for tensor in tensors]
    for got, expected in zip(upload(arrays, Elsewhere()), tensors, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_what_only_the_device_knows_is_read_at_once_and_once(monkeypatch):
    reads = []
    monkeypatch.setattr(
        "moka.host._read_back", lambda away: reads.append(list(away)) or dict.fromkeys(away, torch.ones(2, 3))
    )
    batch = {name: torch.zeros(2, 3).long() for name in ("input_ids", "labels", "attention_mask")}
    known = HostIds({"input_ids": batch["input_ids"]})
    for _ in range(2):
        held = known.read({**on_meta(batch), "question_mask": None})
    assert reads == [["labels", "attention_mask"]]
    assert held["input_ids"] is batch["input_ids"]
    assert held["question_mask"] is None
    cut = batch["input_ids"][:, 1:].to(META)
    known.read({"input_ids": cut})
    assert reads[1:] == [["input_ids"]]  # the copy is of the batch before it was cut


def test_host_ids_are_those_of_the_tensors(model, batch):
    given = batch.kwargs(*NAMES)
    expected = model(**given).logits
    assert torch.equal(model(**given, host_ids=HostIds(given)).logits, expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decoding_takes_no_operation_of_the_routing(model, batch, monkeypatch, static):
    """In ``generate`` the position tells that a token is text."""
    router = model.base_model.model.moka_router
    route, steps = type(router.root.forward)._route, []

    def counted(self, args, kwargs):
        with Ops() as ops:
            routed = route(self, args, kwargs)
        steps.append((kwargs["input_ids"].shape[1], routed[0].views["default"].uniform, ops.names))
        return routed

    monkeypatch.setattr(type(router.root.forward), "_route", counted)
    cache = {"cache_implementation": "static"} if static else {}
    model.generate(**batch.kwargs(*NAMES), max_new_tokens=6, do_sample=False, **cache)
    (length, uniform, _), *decoded = steps
    assert (length, uniform) == (batch.input_ids.shape[1], False)
    assert [(length, uniform) for length, uniform, _ in decoded] == [(1, True)] * 5
    # The first of them prepares the layers, and asks for the length of a static cache, which is a tensor.
    assert [names for _, _, names in decoded[1:]] == [[]] * 4
    assert router._past_prompt is None


@pytest.mark.parametrize("layouts", [["t q t q", "q q q q"], ["i i q q", "a q t t"]], ids=["text", "media"])
def test_few_operations_build_a_routing(model, tiny, layouts):
    rows = tiny.rows(layouts)
    forward = model.base_model.model.forward
    forward._route((), rows.kwargs(*NAMES))
    with Ops() as ops:
        routing, _ = forward._route((), rows.kwargs(*NAMES))
    view = routing.views["default"]
    assert view.uniform == ("i" not in layouts[0])
    assert len(ops.names) <= (0 if view.uniform else 8), ops.names


@pytest.mark.parametrize(
    ("types", "ids", "full"),
    [
        ([[0, 1, 0, 1]], [[1, 1, 1, 1]], True),
        ([[0, 1, 0, 1], [0, 1, 1, 0]], [[1, 1, 1, 1], [2, 2, 2, 2]], True),
        ([[0, 1, 0, 1]], [[1, 1, 2, 2]], False),
        ([[0, 1, 0, 1], [0, 0, 0, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]], False),
        ([[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]], False),
    ],
    ids=["one", "groups-by-row", "groups-in-a-row", "padded", "text-row"],
)
def test_full_pairs_are_known_without_looking_at_the_mask(types, ids, full):
    arrays = np.array(types), np.array(ids), None
    pairs = build_routing({"a": moka.MokaConfig()}, *arrays, only=None, device=torch.device("cpu")).views["a"].pairs
    assert pairs.full is full
    assert bool(pairs.mask.all()) is full
