"""Real threads on one adapted model: each has the routing of its own forward, at any time."""

import sys
import threading

import pytest
import torch

import moka
from moka.adapter import active_modalities

IN_TURN = [["t i i i a a q q q t"] * 2, ["q q a a i t t t t t"] * 2, ["t q q q t t q t t t"] * 2, ["i q i q a t"] * 3]
REPEAT = 12


@pytest.fixture(autouse=True)
def _switch_often():
    """Let threads take turns between any two operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*tasks):
    """Run each task REPEAT times in a thread of its own, all from the same moment; return every result."""
    barrier = threading.Barrier(len(tasks))
    results, errors = [[] for _ in tasks], []

    def run(task, own):
        try:
            barrier.wait(60)
            for _ in range(REPEAT):
                own.append(task())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(tasks, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert all(len(own) == REPEAT for own in results)
    return results


def assert_all_equal(results, expected):
    for own, value in zip(results, expected, strict=True):
        for found in own:
            for name in value:
                torch.testing.assert_close(found[name], value[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture
def batches(tiny):
    return [tiny.rows(layouts, seed=i) for i, layouts in enumerate(IN_TURN)]


def forward(model, batch):
    with torch.no_grad():
        return {"logits": model(**batch.kwargs()).logits}


def decode(model, batch, **settings):
    with torch.no_grad():
        out = model.generate(
            **batch.kwargs(),
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    return {"sequences": out.sequences, "logits": torch.stack(out.logits)}


def block(model, batch):
    """A forward whose ids come from a ``with`` block."""
    ids = batch.ids
    with torch.no_grad(), moka.routing(model, **ids):
        return {"logits": model(**batch.text).logits}


@pytest.mark.parametrize("verb", [forward, decode, block])
def test_forwards_with_other_routings_at_once(model, batches, verb):
    tasks = [lambda batch=batch: verb(model, batch) for batch in batches]
    expected = [task() for task in tasks]
    assert_all_equal(at_once(*tasks), expected)


def test_a_forward_and_a_generation_at_once(model, batches):
    tasks = [lambda: forward(model, batches[0]), lambda: decode(model, batches[1]), lambda: block(model, batches[3])]
    expected = [task() for task in tasks]
    assert_all_equal(at_once(*tasks), expected)


def test_diagnostics_in_one_thread_leave_the_others(model, batches):
    def only_text():
        with active_modalities(model, ["text"]):
            return forward(model, batches[0])

    tasks = [only_text, lambda: forward(model, batches[0])]
    expected = [task() for task in tasks]
    assert (expected[0]["logits"] - expected[1]["logits"]).abs().max() > 0.01
    assert_all_equal(at_once(*tasks), expected)


@pytest.mark.filterwarnings("ignore:.*use_cache:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_training_with_checkpointing_while_another_thread_generates(tiny, batches, reentrant):
    model = tiny.adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [model.get_parameter(name) for name in names]

    def train():
        for parameter in parameters:
            parameter.grad = None
        losses = [model(**batch.kwargs(), labels=batch.input_ids, use_cache=False).loss for batch in batches[:2]]
        sum((i + 1) * loss for i, loss in enumerate(losses)).backward()
        return {name: p.grad.clone() for name, p in zip(names, parameters, strict=True)}

    tasks = [train, lambda: decode(model, batches[3], use_cache=False)]
    expected = [task() for task in tasks]
    assert_all_equal(at_once(*tasks), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_backward_in_another_thread_than_its_forward(tiny, batches, reentrant):
    """Where the engine recomputes for a GPU, too: in a thread of its own, which has seen no forward."""

    def gradients(thread):
        model = tiny.adapted()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        losses = [model(**batch.kwargs(), labels=batch.input_ids, use_cache=False).loss for batch in batches[:2]]
        backward = sum((i + 1) * loss for i, loss in enumerate(losses)).backward
        if thread:
            worker = threading.Thread(target=backward)
            worker.start()
            worker.join(60)
        else:
            backward()
        return tiny.gradients(model)

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    assert len(found) == 28
    tiny.same_gradients(found, expected)
