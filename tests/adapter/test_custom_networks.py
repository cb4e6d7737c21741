"""Networks of someone else around a language model, or without one: routed by a block, or a clear error."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import moka

UNROUTED = r"without routing.*mm_token_type_ids.*moka\.routing"


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


@pytest.mark.parametrize("verb", ["forward", "score", "generate", "tuner's generate"])
def test_foreign_model_is_routed_by_the_block(foreign, tiny, verb):
    prompt = torch.tensor([[5, tiny.IMAGE, 6, 7]])
    network = foreign.base_model.model
    words, ids, count = network.embed(prompt), EXPANDED, 6
    with moka.routing(foreign, **EXPANDED):
        if "generate" in verb:
            steps = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            out = (foreign if verb == "generate" else foreign.base_model).generate(input_ids=prompt, **steps)
            ours, count = torch.cat(out.logits), 4
            words = torch.cat([words, network.language_model.get_input_embeddings()(out.sequences[:, :-1])], 1)
            ids = {name: nn.functional.pad(value, (0, 3)) for name, value in EXPANDED.items()}
        else:
            ours = (network.score(prompt) if verb == "score" else foreign(input_ids=prompt).logits)[0]
    with moka.routing(foreign, **ids):
        expected = network.language_model(inputs_embeds=words).logits[0, -count:]
    tiny.same(ours, expected)
    with foreign.disable_adapter():
        bare = network.language_model(inputs_embeds=words).logits[0, -count:]
    assert not torch.allclose(bare, expected, atol=1e-2)


def test_foreign_model_without_the_block_is_an_error_where_the_tokens_expand(foreign, tiny):
    prompt = torch.tensor([[5, tiny.IMAGE, 6, 7]])
    for verb in (foreign.generate, foreign.base_model.generate):
        with pytest.raises(moka.MokaError, match=r"\b4\b.*\b6\b.*moka\.routing"):
            verb(input_ids=prompt, max_new_tokens=2)
    with pytest.raises(moka.MokaError, match=r"\[1, 6\].*\[1, 4\].*moka\.routing"):
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
    expected = network.language_model(inputs_embeds=torch.cat([network.embed(prompt), words], 1), **ids).logits
    tiny.same(logits[:, -1], expected[:, -1])
    with pytest.raises(moka.MokaError, match=r"\b4\b.*\b6\b.*moka\.routing"):
        model.base_model.generate(input_ids=prompt)


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
        with pytest.raises(moka.MokaError, match=r"\[1, 7\].*\[1, 6\].*exclude_modules"):
            network.encode(torch.randn(1, 7, 8))
    with pytest.raises(moka.MokaError, match=UNROUTED):
        network.encode(x)
    with pytest.warns(UserWarning, match=UNROUTED):
        model.eval().base_model.model.encode(x)
