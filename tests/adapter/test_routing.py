"""Routing: which token is of which modality, who attends to whom, and where the ids come from."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import moka
from moka.adapter import MokaLayer
from moka.adapter.routing import build_view, modality_rows

ROUTED = ("input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")


def view(types, ids=None, valid=None, **settings):
    return views({"a": moka.MokaConfig(**settings)}, types, ids, valid)["a"]


def views(configs, *ids):
    """By adapter, of ids given as lists."""
    arrays = [None if own is None else np.array(own) for own in ids]
    return build_routing(configs, *arrays, only=None, device=torch.device("cpu")).views


def attended(view):
    """{(row, query position): [key positions]} of a view."""
    pairs, found = view.pairs, {}
    for row, query, key in pairs.mask.nonzero().tolist():
        where = row, int(pairs.query_index[row, query])
        found.setdefault(where, []).append(int(pairs.key_index[row, key]))
    return found


def test_types_map_to_the_rows_of_moka_A():
    assert view([[0, 1, 2, 3]]).row.tolist() == [[0, 1, 1, 2]]


def test_a_fourth_modality_of_the_users_own():
    modalities = {"text": [0], "visual": [1, 2], "audio": [3], "point": [4]}
    seen = view([[0, 4, 1, 3]], [[1, 1, 1, 0]], modalities=modalities, interaction_weight={"point": 0.25})
    assert seen.row.tolist() == [[0, 3, 1, 2]]
    assert attended(seen) == {(0, 1): [0], (0, 2): [0]}
    assert sorted(seen.pairs.weight[0].tolist()) == [0.25, 1.0]


def test_a_fourth_modality_runs_in_a_model(tiny):
    modalities = {"text": [0], "visual": [1, 2], "audio": [3], "point": [4]}
    model = tiny.adapted(modalities=modalities)
    batch = tiny.rows(["i i q q t"])
    image = model(**batch.kwargs(*ROUTED)).logits
    batch.mm_token_type_ids[batch.mm_token_type_ids == 1] = 4
    assert (model(**batch.kwargs(*ROUTED)).logits - image).abs().max() > 0.01


def test_equal_ids_attend_and_zero_takes_no_part():
    seen = view([[0, 1, 0, 3, 0, 1], [1, 0, 0, 0, 1, 0]], [[1, 1, 2, 2, 0, 0], [7, 7, 7, 0, 8, 9]])
    assert attended(seen) == {(0, 1): [0], (0, 3): [2], (1, 0): [1, 2]}


def test_reversed_swaps_query_and_key():
    assert attended(view([[0, 1, 1, 0]], [[1, 1, 1, 0]], interaction="reversed")) == {(0, 0): [1, 2]}


def test_padding_is_neither_adapted_nor_a_key():
    seen = view([[0, 0, 1, 1]], [[1, 1, 1, 1]], [[0, 1, 1, 0]])
    assert seen.adapted[0, :, 0].tolist() == [False, True, True, False]
    assert attended(seen) == {(0, 2): [1]}


def test_text_alone_needs_no_rows_and_no_padding_no_mask():
    seen = view([[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]])
    assert (seen.row, seen.adapted, seen.pairs) == (None, None, None)


@pytest.mark.parametrize("settings", [{"interaction": "none"}, {"adapt": ["visual"]}, {"adapt": ["text"]}])
def test_nothing_interacts(settings):
    assert view([[0, 1, 3]], [[1, 1, 1]], **settings).pairs is None


def test_adapters_of_the_same_settings_share_one_view():
    configs = {"a": moka.MokaConfig(r=2), "b": moka.MokaConfig(r=8), "c": moka.MokaConfig(interaction_weight=0.5)}
    found = views(configs, [[0, 1]], [[1, 1]], None)
    assert found["a"] is found["b"]
    assert found["c"] is not found["a"]


def test_types_are_derived_from_the_placeholder_tokens(model, batch):
    given = model(**batch.kwargs(*ROUTED)).logits
    assert torch.equal(model(**batch.kwargs("input_ids", "interaction_ids", "attention_mask")).logits, given)


def test_placeholder_tokens_come_from_the_models_own_config(tiny):
    backbone = tiny.backbone()
    backbone.config.image_token_id, backbone.config.audio_token_id = tiny.IMAGE, tiny.AUDIO
    model = tiny.adapted(backbone=backbone, modality_token_ids=None)
    assert model.peft_config["default"].modality_token_ids == {"visual": [tiny.IMAGE], "audio": [tiny.AUDIO]}
    batch = tiny.rows()
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


def test_without_labels_or_ids_the_whole_text_is_the_question(model, tiny):
    batch = tiny.rows(["i i q q", "q a a q"])
    whole = model(**batch.kwargs(*ROUTED)).logits
    assert torch.equal(model(**batch.kwargs("input_ids", "attention_mask")).logits, whole)


def test_padding_takes_the_bare_backbones_path(model, batch):
    """Through the first layer's q_proj, where a padding token has no context yet."""
    seen = {}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    model(**batch.kwargs(*ROUTED))
    padding = batch.attention_mask == 0
    assert padding.sum() == 10
    bare = layer.base_layer(seen["x"])
    assert torch.equal(seen["y"][padding], bare[padding])
    assert ((seen["y"] - bare)[~padding].abs().amax(-1) > 1e-3).all()


def test_one_routing_is_built_per_forward_and_read_by_all_layers(model, batch):
    read = []
    router = model.base_model.model.moka_router
    for module in model.modules():
        if isinstance(module, MokaLayer):
            module.register_forward_hook(lambda *_: read.append(router.routing))
    model(**batch.kwargs(*ROUTED))
    assert len(read) == 14
    assert all(routing is read[0] for routing in read)
    model(**batch.kwargs(*ROUTED))
    assert read[-1] is not read[0]
    assert router.routing is None


def test_routing_is_gone_after_an_error(model, batch, monkeypatch):
    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch.kwargs(*ROUTED))
    router = model.base_model.model.moka_router
    assert (router.routing, router.running) == (None, False)


def test_one_warning_without_routing(model, tiny):
    embeds = model.get_input_embeddings()(tiny.rows(["i i q q"]).input_ids)
    with pytest.warns(UserWarning, match=r"every token is treated as text.*mm_token_type_ids.*moka.routing") as caught:
        first, _ = [model(inputs_embeds=embeds).logits for _ in range(2)]
    assert sum("without routing" in str(w.message) for w in caught) == 1
    assert torch.equal(first, model(inputs_embeds=embeds, mm_token_type_ids=torch.zeros(1, 4).long()).logits)


def test_no_warning_where_text_is_the_only_modality(tiny):
    model = tiny.adapted(modalities={"text": [0]}, modality_token_ids={})
    embeds = model.get_input_embeddings()(tiny.rows(["t t"]).input_ids)
    assert torch.isfinite(model(inputs_embeds=embeds).logits).all()  # a warning is an error in these tests


def test_own_arguments_win_over_the_block(model, batch):
    given = model(**batch.kwargs(*ROUTED)).logits
    with moka.routing(model, mm_token_type_ids=torch.zeros_like(batch.input_ids)):
        assert torch.equal(model(**batch.kwargs(*ROUTED)).logits, given)


class Foreign(nn.Module):
    """A multimodal model of someone else: expands one placeholder into features inside, and cannot take our ids."""

    def __init__(self, language_model, placeholder):
        super().__init__()
        self.language_model, self.placeholder = language_model, placeholder
        self.features = nn.Parameter(torch.randn(3, 64), requires_grad=False)

    def embed(self, input_ids):
        words = self.language_model.get_input_embeddings()(input_ids[0])
        parts = [self.features if t == self.placeholder else words[i, None] for i, t in enumerate(input_ids[0])]
        return torch.cat(parts)[None]

    def forward(self, input_ids):
        return self.language_model(inputs_embeds=self.embed(input_ids))

    def generate(self, input_ids, **options):
        return self.language_model.generate(inputs_embeds=self.embed(input_ids), **options)

    def score(self, input_ids):
        """Never passes the model's own forward, only the language model's."""
        return self.language_model(inputs_embeds=self.embed(input_ids)).logits


@pytest.fixture
def foreign(tiny):
    model = get_peft_model(Foreign(tiny.backbone(), tiny.IMAGE), tiny.config(task_type=None))
    return tiny.strong_(model).eval()


EXPANDED = {
    "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 0, 0]]),
    "interaction_ids": torch.tensor([[0, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("verb", ["forward", "score", "generate"])
def test_foreign_model_is_routed_by_the_block(foreign, tiny, verb):
    prompt = torch.tensor([[5, tiny.IMAGE, 6, 7]])
    inner = foreign.base_model.model.language_model
    embeds = foreign.base_model.model.embed(prompt)
    steps = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if verb == "generate":
        with moka.routing(foreign, **EXPANDED):
            ours = torch.cat(foreign.generate(input_ids=prompt, **steps).logits)
        expected = torch.cat(inner.generate(inputs_embeds=embeds, **EXPANDED, **steps).logits)
    else:
        with moka.routing(foreign, **EXPANDED):
            ours = foreign.base_model.model.score(prompt) if verb == "score" else foreign(input_ids=prompt).logits
        expected = inner(inputs_embeds=embeds, **EXPANDED).logits
    assert torch.equal(ours, expected)
    with foreign.disable_adapter():
        bare = foreign.base_model.model.score(prompt)[0, -1]
    assert not torch.allclose(bare, expected[0] if verb == "generate" else expected[0, -1], atol=1e-2)


def test_foreign_model_without_the_block_is_an_error_where_the_tokens_expand(foreign, tiny):
    prompt = torch.tensor([[5, tiny.IMAGE, 6, 7]])
    with pytest.raises(moka.MokaError, match=r"covers a prompt of 4 tokens, .* given 6.*moka\.routing"):
        foreign.generate(input_ids=prompt, max_new_tokens=2)
    with pytest.raises(moka.MokaError, match=r"got \[1, 6\] tokens.*for \[1, 4\].*expands media inside"):
        foreign(input_ids=prompt)


@pytest.mark.parametrize("length", [5, 7])
def test_foreign_model_with_ids_of_another_length_is_an_error(foreign, tiny, length):
    prompt, types = torch.tensor([[5, tiny.IMAGE, 6, 7]]), torch.zeros(1, length, dtype=torch.long)
    for run in (lambda: foreign.generate(input_ids=prompt, max_new_tokens=2), lambda: foreign(input_ids=prompt)):
        with (
            moka.routing(foreign, mm_token_type_ids=types),
            pytest.raises(moka.MokaError, match=rf"\b{length}\b.*\b6\b"),
        ):
            run()


class OwnLoop(Foreign):
    """Decodes by itself, without the language model's ``generate``."""

    def generate(self, input_ids, steps=2):
        out, tokens = self.language_model(inputs_embeds=self.embed(input_ids), use_cache=True), []
        for _ in range(steps):
            tokens.append(out.logits[:, -1:].argmax(-1))
            out = self.language_model(input_ids=tokens[-1], past_key_values=out.past_key_values)
        return torch.cat(tokens, 1), out.logits


def test_foreign_model_with_a_decoding_loop_of_its_own(tiny):
    model = get_peft_model(OwnLoop(tiny.backbone(), tiny.IMAGE), tiny.config(task_type=None))
    model, prompt = tiny.strong_(model).eval(), torch.tensor([[5, tiny.IMAGE, 6, 7]])
    network = model.base_model.model
    with moka.routing(model, **EXPANDED):
        tokens, logits = model.generate(input_ids=prompt)
    words = network.language_model.get_input_embeddings()(tokens)
    ids = {name: nn.functional.pad(value, (0, 2)) for name, value in EXPANDED.items()}
    whole = network.language_model(inputs_embeds=torch.cat([network.embed(prompt), words], 1), **ids).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(moka.MokaError, match=r"covers a prompt of 4 tokens, .* given 6"):
        model.generate(input_ids=prompt)


class ByMethod(nn.Module):
    """A custom network whose layers run through a method and not through ``forward``."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def encode(self, x):
        return self.proj(x)

    def forward(self, x):
        return self.proj(x)


def test_block_routes_layers_that_run_outside_forward(tiny):
    model = tiny.strong_(get_peft_model(ByMethod(), tiny.config(target_modules=["proj"], task_type=None)))
    network, x = model.base_model.model, torch.randn(1, 6, 8)
    with moka.routing(model, **EXPANDED):
        assert torch.equal(network.encode(x), model(x))
        assert not torch.equal(network.encode(x), network.proj.base_layer(x))
        with pytest.raises(moka.MokaError, match=r"got \[1, 5\] tokens.*routing of this forward is for \[1, 6\]"):
            network.encode(x[:, :5])
    with pytest.warns(UserWarning, match="without routing"):
        network.encode(x)
