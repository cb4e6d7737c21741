"""The multimodal LLMs of transformers, tiny and random, under MokA: the table of docs/mllms.md is what is found here.

A class that the installed transformers lacks is skipped by name. Where MokA fails a check, LoRA is tried: "LoRA too" means that it
fails alike. MOKA_WRITE_DOCS=1 writes the table; without it, the page has to agree.
"""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import moka
from moka.adapter.text_decoder import coverage, language_decoder
from moka.testing import mllms

PAGE = Path(__file__).parents[2] / "docs/mllms.md"
OLDER = {case.model_class.__name__: case for case in mllms.CASES.values()}
NAMES = sorted([*OLDER, *mllms.NEWER])
LETTERS = {"I": "image", "V": "video", "A": "audio"}


def case_of(name):
    case = OLDER.get(name) or mllms.newer_case(name)
    if case is None:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return case


def attach(case, method="moka"):
    """Return the model with an adapter that clearly changes its logits."""
    model = mllms.backbone(case)
    if method == "lora":
        decoder = next(name for name, module in model.named_modules() if module is language_decoder(model))
        targets = rf"{re.escape(decoder)}\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    else:
        config = moka.MokaConfig(r=4, alpha=8, dropout=0.0, task_type="CAUSAL_LM", init_weights=False)
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            std = 0.3 if "_A." in name else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return adapted.eval()


def inputs_of(model, batch, **more):
    """Return what the model takes of a batch; MokA takes the types in any case."""
    takes = "mm_token_type_ids" in inspect.signature(type(model.get_base_model()).forward).parameters
    routed = any(isinstance(config, moka.MokaConfig) for config in model.peft_config.values())
    return {**(batch.everything if takes or routed else batch.tokens), **more}


@torch.no_grad()
def logits_of(model, batch, **more):
    return model(**inputs_of(model, batch, **more)).logits


def same(ours, theirs, tolerance=1e-4):
    scale = theirs.abs().max().clamp(min=1.0)
    difference = float((ours - theirs).abs().max() / scale)
    assert difference <= tolerance, f"differs by {difference:.2g} of the largest"


def derived(case, method):
    """The types follow from the configuration's placeholder ids, and give the logits of given ones."""
    model, batch = attach(case), mllms.prompt(case)
    wanted = {}
    for letter in case.media:
        wanted.setdefault("audio" if letter == "A" else "visual", []).append(mllms.PLACEHOLDER[letter][0])
    found = model.peft_config["default"].modality_token_ids
    assert all(set(tokens) <= set(found.get(name, [])) for name, tokens in wanted.items()), found
    if "mm_token_type_ids" not in inspect.signature(case.model_class.forward).parameters:
        with torch.no_grad():
            same(model(**batch.tokens).logits, logits_of(model, batch), 0.0)


def gradients(case, method):
    """Every modality that occurs gets a gradient in the first block."""
    model, batch = attach(case).train(), mllms.prompt(case)
    model(**batch.everything, labels=batch.labels).loss.backward()
    rows = [True, *(any(letter in case.media for letter in mllms.ROW[row]) for row in (1, 2))]
    seen = 0
    for name, parameter in model.named_parameters():
        if "moka_A" in name and re.search(r"layers\.0\.", name):
            assert [bool(row.abs().max() > 0) for row in parameter.grad] == rows, name
            seen += 1
    assert seen


def no_leak(case, method):
    """No answer token changes a logit before it; the question does reach the media before it."""
    model, batch = attach(case).train(), mllms.prompt(case)

    def logits(one):
        return model(**one.everything, labels=one.labels).logits.detach()

    plain = logits(batch)
    answer = batch.answer[0].nonzero()[0].item()
    for position in range(answer, batch.answer.shape[1]):
        changed = logits(batch.with_token(0, position, 117))
        same(changed[0, :position], plain[0, :position], 1e-6)
        assert (plain[0, position:] - changed[0, position:]).abs().max() > 1e-4
    media = batch.mm_token_type_ids[0].nonzero()[0].item()
    assert (plain[0, media] - logits(batch.with_token(0, answer - 1, 117))[0, media]).abs().max() > 1e-5


@torch.no_grad()
def generate(model, batch, **more):
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(mllms.SPECIAL), "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    found = model.generate(**inputs_of(model, batch, **more), **settings)
    return torch.stack(found.logits)


def cache(case, method):
    """Generation with a cache equals recomputation without one."""
    model, batch = attach(case, method), mllms.prompt(case)
    with_cache = generate(model, batch)
    same(with_cache, generate(model, batch, use_cache=False))
    same(with_cache[0], logits_of(model, batch)[:, -1])


def padding(case, method):
    """Rows of a left-padded batch equal single rows."""
    model, both = attach(case, method), mllms.prompt(case)
    together = logits_of(model, both)
    for i, layout in enumerate(case.layouts):
        real, media = both.attention_mask[i].bool(), {}
        for letter, (_, make) in case.media.items():
            total = sum(row.count(letter) for row in case.layouts)
            before = sum(row.count(letter) for row in case.layouts[:i])
            for name in make(1) if letter in layout else ():
                size = len(both.media[name]) // total
                media[name] = both.media[name][before * size : (before + 1) * size]
                if name == "image_token_pooling":  # patches are counted from the batch's first picture
                    media[name] = media[name] - media[name].min()
        columns = [t[i, real][None] for t in (both.input_ids, both.mm_token_type_ids, both.attention_mask, both.answer)]
        same(logits_of(model, mllms.Prompt(*columns, media))[0], together[i, real])


def saved(case, method, folder):
    """A saved adapter, loaded on a new model, gives the same logits to the bit."""
    model, batch = attach(case, method), mllms.prompt(case)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(mllms.backbone(case), folder).eval()
    same(logits_of(loaded, batch), logits_of(model, batch), 0.0)


def merged(case, method):
    """Merging the text path changes no logit."""
    model, batch = attach(case, method), mllms.prompt(case)
    plain = logits_of(model, batch)
    model.merge_adapter()
    same(logits_of(model, batch), plain)
    model.unmerge_adapter()
    same(logits_of(model, batch), plain)


def checkpointing(case, method):
    """Gradients with checkpointing are those without."""

    def train(enable):
        model, batch = attach(case, method).train(), mllms.prompt(case)
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs_of(model, batch), labels=batch.labels, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, ours = train(False), train(True)
    for name, gradient in expected.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            same(ours[name], gradient, 1e-5)


CHECKS = {
    "types derived": derived,
    "gradients": gradients,
    "no leak": no_leak,
    "cache": cache,
    "padding": padding,
    "save, load": saved,
    "merge": merged,
    "checkpointing": checkpointing,
}


def outcome(check, case, folder):
    """Return "yes", or "LoRA too" if MokA and LoRA fail alike; a failure of MokA only is raised."""
    more = (folder,) if check is saved else ()
    try:
        check(case, "moka", *more)
    except Exception:
        if check in (derived, gradients, no_leak):
            raise
        try:
            check(case, "lora", *more)
        except Exception:
            return "LoRA too"
        raise
    return "yes"


@pytest.mark.parametrize("name", NAMES)
def test_a_class_passes_every_check(name, tmp_path):
    case = case_of(name)
    model = attach(case)
    layers = [path for path, module in model.get_base_model().named_modules() if hasattr(module, "moka_A")]
    share = coverage(model.get_base_model(), layers)
    media = ", ".join(LETTERS[letter] for letter in case.media)
    cells = [outcome(check, case, tmp_path / "adapter") for check in CHECKS.values()]
    row = f"| `{name}` | {media} | {share:.0%} | {' | '.join(cells)} |"
    text = PAGE.read_text()
    shown = re.search(rf"^\| `{name}` \|.*$", text, re.M)
    if os.environ.get("MOKA_WRITE_DOCS"):
        head = "|---|---|---|" + "---|" * len(CHECKS) + "\n"
        text = text.replace(shown[0], row) if shown else text.replace(head, f"{head}{row}\n", 1)
        PAGE.write_text(text)
    elif tf.__version__ == "5.23.0":  # of the page
        assert shown is not None
        assert shown[0] == row


def test_the_page_names_the_checks_and_no_other_class():
    text = PAGE.read_text()
    assert f"| class | media | adapted | {' | '.join(CHECKS)} |" in text
    assert set(re.findall(r"^\| `(\w+For\w+)` \|", text, re.M)) == set(NAMES)
