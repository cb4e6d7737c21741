"""Routing: which token is of which modality, who attends to whom, and where the ids come from."""

import numpy as np
import pytest
import torch

import moka
from moka.adapter import MokaLinear
from moka.adapter.context import current, running_call
from moka.adapter.routing import build_view, modality_rows

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
UNROUTED = r"without routing.*mm_token_type_ids.*moka\.routing"


def view(types, ids=None, only=None, **settings):
    """One adapter's view of ids given as lists."""
    config = moka.MokaConfig(**settings)
    groups = None if ids is None else np.array(ids)
    return build_view(config, modality_rows(config, np.array(types)), groups, only, torch.device("cpu"))


def attended(view):
    """{(row, query position): [key positions]} of a view."""
    attention, found = view.attention, {}
    mask = attention.mask
    if mask is None:
        mask = torch.ones(*attention.query.shape, attention.key.shape[1])
    for row, query, key in mask.nonzero().tolist():
        where = row, int(attention.query[row, query])
        found.setdefault(where, []).append(int(attention.key[row, key]))
    return found


POINT = {"text": [0], "visual": [1, 2], "audio": [3], "point": [4]}


@pytest.mark.parametrize(
    ("types", "modalities", "rows"),
    [
        ([0, 1, 2, 3], {"text": [0], "visual": [1, 2], "audio": [3]}, [0, 1, 1, 2]),
        ([0, 4, 1, 3], POINT, [0, 3, 1, 2]),
        ([9, 0, 5], {"text": [9], "visual": [0], "audio": [5]}, [2, 0, 1]),
    ],
)
def test_types_map_to_the_rows_of_moka_A(types, modalities, rows):
    seen = view([types], modalities=modalities)
    assert seen.rows.tolist() == [rows]
    assert seen.index.tolist() == [i * len(modalities) + row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("types", "ids", "settings", "expected"),
    [
        # Equal ids attend, 0 takes no part.
        (
            [[0, 1, 0, 3, 0, 1], [1, 0, 0, 0, 1, 0]],
            [[1, 1, 2, 2, 0, 0], [7, 7, 7, 0, 8, 9]],
            {},
            {(0, 1): [0], (0, 3): [2], (1, 0): [1, 2]},
        ),
        ([[0, 1, 1, 0]], [[1, 1, 1, 0]], {}, {(0, 1): [0], (0, 2): [0]}),
        ([[0, 1, 1, 0]], [[1, 1, 1, 0]], {"interaction": "reversed"}, {(0, 0): [1, 2]}),
        ([[0, 1, 1, 3]], [[1, 1, 1, 1]], {"adapt": ["text", "visual"]}, {(0, 1): [0], (0, 2): [0]}),
        ([[0, 4, 1, 3]], [[1, 1, 1, 0]], {"modalities": POINT}, {(0, 1): [0], (0, 2): [0]}),
    ],
)
def test_who_attends_to_whom(types, ids, settings, expected):
    assert attended(view(types, ids, **settings)) == expected


def test_each_query_has_the_weight_of_its_modality_and_one_without_keys_none():
    weights = {"point": 0.25, "visual": 0.5}
    seen = view([[0, 4, 1, 3, 1]], [[1, 1, 1, 1, 2]], modalities=POINT, interaction_weight=weights)
    assert seen.attention.query.tolist() == [[1, 2, 3, 4]]
    assert seen.attention.weight.tolist() == [[0.25, 0.5, 1.0, 0.0]]


@pytest.mark.parametrize(
    "settings", [{"interaction": "none"}, {"adapt": ["visual"]}, {"adapt": ["text"]}, {"only": {"visual"}}]
)
def test_nothing_interacts(settings):
    assert view([[0, 1, 3]], [[1, 1, 1]], **settings).attention is None


def test_only_tokens_of_adapted_modalities_go_through_the_adapter():
    assert view([[0, 1, 3]]).adapter_mask is None
    assert view([[0, 1, 3]], adapt=["visual", "text"]).adapter_mask.flatten().tolist() == [True, True, False]
    assert view([[0, 1, 3]], adapt=["visual", "text"], only={"visual", "audio"}).adapter_mask.flatten().tolist() == [
        *(False, True, False)
    ]


def test_text_needs_no_rows_and_no_mask():
    seen = view([[0, 0], [0, 0]], [[1, 1], [1, 1]])
    assert (seen.row, seen.rows, seen.adapter_mask, seen.attention) == (0, None, None, None)
    assert view([[0, 0]], adapt=["visual"]).disabled


def test_adapters_with_the_same_map_share_one_view_and_others_have_their_own(model, tiny):
    model.add_adapter("same", tiny.config(r=8))
    model.add_adapter("own", tiny.config(interaction_weight=0.5))
    model.base_model.set_adapter(["default", "same", "own"])
    seen = routings(model)
    model(**tiny.rows(["i i q q"]).kwargs(*ROUTED))
    views = seen[0].views
    assert views["default"] is views["same"]
    assert views["own"] is not views["same"]
    assert views["own"].attention.weight.max() == 0.5


def routings(model):
    """The routing that each layer's call runs under, as the calls come."""
    seen = []
    for module in model.modules():
        if isinstance(module, MokaLinear):
            module.register_forward_hook(lambda layer, *_: seen.append(running_call(layer.moka_model).routing))
    return seen


def test_a_fourth_modality_runs_in_a_model(tiny):
    model = tiny.adapted(modalities=POINT)
    batch = tiny.rows(["i i q q t"])
    image = model(**batch.kwargs(*ROUTED)).logits
    batch.mm_token_type_ids[batch.mm_token_type_ids == 1] = 4
    assert (model(**batch.kwargs(*ROUTED)).logits - image).abs().max() > 0.01


@pytest.mark.parametrize("source", ["the adapter's configuration", "the model's"])
def test_types_are_derived_from_the_placeholder_tokens(tiny, batch, source):
    backbone, settings = tiny.backbone(), {}
    if source == "the model's":
        backbone.config.image_token_id, backbone.config.audio_token_id = tiny.IMAGE, tiny.AUDIO
        settings = {"modality_token_ids": None}
    model = tiny.adapted(backbone=backbone, **settings)
    assert model.peft_config["default"].modality_token_ids == {"visual": [tiny.IMAGE], "audio": [tiny.AUDIO]}
    given = model(**batch.kwargs(*ROUTED)).logits
    assert torch.equal(model(**batch.kwargs("input_ids", "interaction_ids", "attention_mask")).logits, given)


def test_keys_are_derived_from_the_labels(model, tiny):
    """The text before the first supervised token, of each row for itself."""
    batch = tiny.rows(["i i q q q t t", "q i i q t t t"])
    labels = torch.where(batch.interaction_ids == 0, batch.input_ids, -100)
    given = model(**batch.kwargs(*ROUTED), labels=labels)
    derived = model(**batch.kwargs("input_ids", "attention_mask"), labels=labels)
    assert torch.equal(derived.logits, given.logits)
    late = torch.full_like(labels, -100)
    late[:, -1] = 5
    assert not torch.equal(model(**batch.kwargs("input_ids", "attention_mask"), labels=late).logits, given.logits)


def test_without_labels_or_ids_the_full_text_is_the_question(model, tiny):
    batch = tiny.rows(["i i q q", "q a a q"])
    given = model(**batch.kwargs(*ROUTED)).logits
    assert torch.equal(model(**batch.kwargs("input_ids", "attention_mask")).logits, given)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_text_that_takes_no_part(model, tiny, side):
    """In the first layer's q_proj, where a padding token has no context yet; also if its ids are others."""
    batch, seen = tiny.rows(side=side), {}
    padding = batch.attention_mask == 0
    assert padding.sum() == 10
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    logits = model(**batch.kwargs(*ROUTED)).logits
    A, B = layer.moka_A["default"].weight[0], layer.moka_B["default"].weight
    text = layer.base_layer(seen["x"]) + seen["x"] @ A.T @ B.T * 2
    torch.testing.assert_close(seen["y"][padding], text[padding], atol=1e-5, rtol=1e-5)
    batch.interaction_ids[padding] = 1
    for types in (0, 1):
        batch.mm_token_type_ids[padding] = types
        assert torch.equal(model(**batch.kwargs(*ROUTED)).logits[~padding], logits[~padding])


def test_text_with_padding_needs_no_work(model, tiny):
    batch = tiny.rows(["t t q", "t"])
    seen = routings(model)
    model(**batch.kwargs(*ROUTED))
    assert all(routing.views["default"].uniform for routing in seen)


def test_one_routing_is_built_per_forward_and_read_by_all_layers(model, batch):
    seen = routings(model)
    model(**batch.kwargs(*ROUTED))
    model(**batch.kwargs(*ROUTED))
    assert len(seen) == 28
    assert all(routing is seen[0] for routing in seen[:14])
    assert all(routing is seen[14] for routing in seen[14:])
    assert seen[0] is not seen[14]
    assert current.call is None


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_routing_is_gone_after_an_error(model, batch, error):
    def fail(*_):
        raise error

    before = model(**batch.kwargs(*ROUTED)).logits
    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(error):
        model(**batch.kwargs(*ROUTED))
    assert (current.call, current.block) == (None, None)
    handle.remove()
    assert torch.equal(model(**batch.kwargs(*ROUTED)).logits, before)


EMBEDS = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("known", [True, False], ids=["media known", "media unknown"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", ["the model", "the decoder"])
def test_a_forward_without_routing(tiny, known, training, called):
    """An error in training if the model's media are known; else one warning, and all is text."""
    model = tiny.adapted(**({} if known else {"modality_token_ids": {}})).train(training)
    module = model if called == "the model" else model.base_model.model.model
    if known and training:
        with pytest.raises(moka.MokaError, match=UNROUTED):
            module(inputs_embeds=EMBEDS)
        return
    with pytest.warns(UserWarning, match=UNROUTED) as caught:
        first, second = [module(inputs_embeds=EMBEDS)[0] for _ in range(2)]
    assert sum("without routing" in str(warning.message) for warning in caught) == 1
    text = module(inputs_embeds=EMBEDS, mm_token_type_ids=torch.zeros(1, 4).long())[0]
    assert torch.equal(first, text)
    assert torch.equal(second, text)


@pytest.mark.parametrize("training", [True, False])
def test_where_text_is_the_only_modality_no_routing_is_missing(tiny, training):
    model = tiny.adapted(modalities={"text": [0]}, modality_token_ids={}).train(training)
    assert torch.isfinite(model(inputs_embeds=EMBEDS).logits).all()  # a warning is an error in these tests


@pytest.mark.parametrize("called", ["decoder", "base", "peft"])
def test_training_through_any_of_the_models_is_routed(tiny, batch, called):
    """A trainer may call the decoder and the head itself, or replace ``forward``."""
    model = tiny.adapted().train()
    base = model.base_model.model
    module = {"decoder": base.model, "base": base, "peft": model}[called]
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    hidden = module(**batch.kwargs(*ROUTED))[0]
    logits = base.lm_head(hidden) if called == "decoder" else hidden
    torch.testing.assert_close(logits, model.eval()(**batch.kwargs(*ROUTED)).logits)
    logits.square().mean().backward()
    grads = [p.grad.flatten(1).norm(dim=1) for name, p in model.named_parameters() if "moka_A" in name]
    assert torch.stack(grads).min() > 0  # of every modality in every layer


def test_own_arguments_win_over_the_block(model, batch):
    given = model(**batch.kwargs(*ROUTED)).logits
    with moka.routing(model, mm_token_type_ids=torch.zeros_like(batch.input_ids)):
        assert torch.equal(model(**batch.kwargs(*ROUTED)).logits, given)
