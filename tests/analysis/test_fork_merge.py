"""Fork-Merge Decoding equals a plain computation of its equations, with and without a cache, alone and in a batch."""

import pytest
import torch

from moka import MokaError
from moka.adapter.text_decoder import decoder_blocks
from moka.analysis.contribution import hidden_from_attention, modality_index
from moka.analysis.fork_merge import fork_merge_decoding
from moka.testing.mllms import SPECIAL

NAMES = ("composed, moka", "composed, lora", "composed, none", "qwen2_5_omni, none", "qwen2_5_omni, moka")
# Without a cache a placeholder among the decoded tokens would be taken for a medium.
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "pad_token_id": 0,
    "suppress_tokens": [*SPECIAL],
}


@pytest.fixture(params=NAMES)
def case(request, composed, hugging_face):
    name, adapter = request.param.split(", ")
    example = composed(adapter) if name == "composed" else hugging_face(name, adapter)
    # A Hugging Face model's own generate takes no ids of ours: its placeholder tokens say which token is of which modality.
    left_out = ("labels", "mm_token_type_ids", "interaction_ids", "question_mask")[: 1 if name == "composed" else 4]
    example.batch = {key: value for key, value in example.batch.items() if key not in left_out}
    return example


def row(example, index):
    """One row of a composed batch; only the first has sound."""
    names = ("pixel_values", "input_ids", "mm_token_type_ids", "interaction_ids", "attention_mask")
    one = {name: example.batch[name][index : index + 1] for name in names}
    return {**one, **({"input_features": example.batch["input_features"]} if index == 0 else {})}


@torch.no_grad()
def logits(example, batch=None, **settings):
    batch = example.batch if batch is None else batch
    if not settings:
        return example.model(**batch, use_cache=False).logits
    with fork_merge_decoding(example.model, batch, **settings):
        return example.model(**batch, use_cache=False).logits


@torch.no_grad()
def answers(example, batch=None, settings=None, **generation):
    batch = example.batch if batch is None else batch
    tokens = {**GREEDY, **generation}
    if settings is None:
        return example.model.generate(**batch, **tokens)[:, batch["input_ids"].shape[1] :]
    with fork_merge_decoding(example.model, batch, **settings):
        return example.model.generate(**batch, **tokens)[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def by_hand(example, depth, weight):
    """Logits of the equations, from two forwards whose states before block ``depth`` are kept, and one that is given them."""
    model, blocks, rows = example.model, decoder_blocks(example.model)[1], modality_index(example.model, example.batch)
    both = rows["visual"].any(1, keepdim=True) & rows["audio"].any(1, keepdim=True)
    states = {}
    for seen, other in (("visual", "audio"), ("audio", "visual")):
        handle = blocks[depth].register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: states.__setitem__(
                seen, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        with hidden_from_attention(model, rows[other] & both):
            model(**example.batch, use_cache=False)
        handle.remove()
    text = weight * states["visual"] + (1 - weight) * states["audio"]
    merged = torch.where(rows["audio"][..., None], states["audio"], text)
    merged = torch.where(rows["visual"][..., None], states["visual"], merged)
    handle = blocks[depth].register_forward_pre_hook(
        lambda module, args, kwargs: ((merged, *args[1:]), kwargs), with_kwargs=True
    )
    found = model(**example.batch, use_cache=False).logits
    handle.remove()
    return found


def valid(example):
    return example.batch["attention_mask"].bool()


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_logits_are_those_of_the_equations(case, weight):
    found = logits(case, fork_layers=1, visual_weight=weight)
    torch.testing.assert_close(found[valid(case)], by_hand(case, 1, weight)[valid(case)], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], logits(case)[0], atol=1e-3)


def test_depth_zero_is_plain_decoding(case):
    assert torch.equal(logits(case, fork_layers=0), logits(case))
    assert torch.equal(answers(case, settings={"fork_layers": 0}), answers(case))


def test_rows_without_both_media_are_decoded_as_usual(composed):
    """Their two branches are the same, and so is what is merged of them, for every weight."""
    example = composed()
    example.batch.pop("labels")
    for weight in (0.0, 0.3, 1.0):
        forked = logits(example, fork_layers=2, visual_weight=weight)
        torch.testing.assert_close(forked[1, 3:], logits(example)[1, 3:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_generation_with_a_cache_equals_that_without(case, depth):
    settings = {"fork_layers": depth, "visual_weight": 0.4}
    cached = answers(case, settings=settings)
    assert torch.equal(cached, answers(case, settings=settings, use_cache=False))
    assert cached.shape[1] == 6


def test_beams_with_a_cache_equal_those_without(case):
    settings = {"fork_layers": 1}
    beams = {"num_beams": 3}
    assert torch.equal(
        answers(case, settings=settings, **beams), answers(case, settings=settings, use_cache=False, **beams)
    )


def test_a_batch_is_answered_as_its_rows(composed):
    example = composed()
    together = answers(
        example, {key: value for key, value in example.batch.items() if key != "labels"}, {"fork_layers": 1}
    )
    assert torch.equal(together[:1], answers(example, row(example, 0), {"fork_layers": 1}))
    assert torch.equal(together[1:], answers(example, row(example, 1)))


def test_the_model_is_as_before_afterwards(case):
    before = logits(case)
    logits(case, fork_layers=1)
    with pytest.raises(RuntimeError), fork_merge_decoding(case.model, case.batch):
        raise RuntimeError
    assert torch.equal(logits(case), before)
    assert not any("forward" in module.__dict__ for module in decoder_blocks(case.model)[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fork_layers": 3}, ["fork_layers", "3", "2"]),
        ({"fork_layers": -1}, ["fork_layers", "-1"]),
        ({"visual_weight": 1.5}, ["visual_weight", "1.5"]),
    ],
)
def test_bad_settings_are_refused(composed, settings, words):
    example = composed()
    with pytest.raises(MokaError) as error, fork_merge_decoding(example.model, example.batch, **settings):
        pass
    assert all(word in str(error.value) for word in words)


def test_a_prompt_without_sound_is_refused(composed):
    example = composed()
    with pytest.raises(MokaError, match="no sound"), fork_merge_decoding(example.model, row(example, 1)):
        pass
