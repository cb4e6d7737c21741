"""``torch.compile``: the layers are one graph; how many tokens interact depends on the data and is settled before it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainingArguments

import moka


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_block(tiny):
    """A model that compiles in a few seconds."""
    backbone = tiny.backbone(num_hidden_layers=1)
    return tiny.adapted(backbone=backbone, target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_full_model_is_one_graph(tiny, batch, merged):
    model = tiny.adapted()
    if merged:
        model.merge_adapter()
    with torch.no_grad():
        expected = model(**batch.kwargs(), use_cache=False).logits
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        got = compiled(**batch.kwargs(), use_cache=False).logits
    torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    assert counter.op_count > 14 * 3  # at least the base layer's product, A's and B's, in every adapted layer


def test_other_routings_of_the_compiled_model(tiny, batch):
    """Guards or inputs, whatever the compiler makes of a routing: no routing may be baked into the graph."""
    model = one_block(tiny)
    compiled = torch.compile(model, backend="eager")
    swapped = tiny.rows()
    swapped.mm_token_type_ids = torch.where(swapped.mm_token_type_ids == 1, 3, swapped.mm_token_type_ids)
    others = tiny.rows(["q q q i i t t a t t", "t q i i q q"]), tiny.rows(["t t q q t t"])
    with torch.no_grad():
        for rows in (batch, *others, batch, swapped):
            expected = model(**rows.kwargs(), use_cache=False).logits
            torch.testing.assert_close(compiled(**rows.kwargs(), use_cache=False).logits, expected)


def test_full_graph_inside_a_routing_block(tiny, batch):
    """``fullgraph=True`` refuses any break: forward and backward equal those without the compiler."""
    ids = batch.ids

    def train(model, run):
        with moka.routing(model, **ids):
            loss = run(
                input_ids=batch.input_ids,
                attention_mask=ids["attention_mask"],
                labels=batch.input_ids,
                use_cache=False,
            ).loss
        loss.backward()
        return tiny.gradients(model)

    model = one_block(tiny).train()
    expected = train(model, model)
    model.zero_grad()
    got = train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert got.keys() == expected.keys()
    tiny.same_gradients(got, expected)


class Breaks(torch.nn.Module):
    """A layer that no compiler can trace."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "way"),
    [("mlp", "torch.compile"), ("lm_head", "model.compile"), ("norm", "base.compile")],
)
def test_graph_breaks_inside_the_model(tiny, batch, place, way):
    model = one_block(tiny)
    base = model.get_base_model()
    if place == "mlp":
        base.model.layers[0].mlp = Breaks(base.model.layers[0].mlp)
    else:
        owner = base if place == "lm_head" else base.model
        setattr(owner, place, Breaks(getattr(owner, place)))
    with torch.no_grad():
        expected = model(**batch.kwargs(), use_cache=False).logits
        run = torch.compile(model, backend="eager") if way == "torch.compile" else model
        if way != "torch.compile":
            (model if way == "model.compile" else base).compile(backend="eager")
        torch.testing.assert_close(run(**batch.kwargs(), use_cache=False).logits, expected)


def test_decoding_compiles_no_further_graphs(tiny):
    """Each call of generate, and each of its steps after the first two, finds the graphs of those before."""
    model = one_block(tiny)
    counter = CompileCounter()
    for block in model.get_base_model().model.layers:
        block.compile(backend=counter, dynamic=True)
    prompt = tiny.rows(["t i i q q t"]).kwargs()
    plain = one_block(tiny).generate(**prompt, max_new_tokens=6, do_sample=False)
    counts = []
    for new in (3, 6, 6, 9):
        tokens = model.generate(**prompt, max_new_tokens=new, do_sample=False)
        assert torch.equal(tokens[:, : min(new, 6)], plain[:, : min(new, 6)])
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpointing_inside_a_compiled_model(tiny, batch, reentrant):
    def gradients(compiled):
        model = one_block(tiny).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(**batch.kwargs(), labels=batch.input_ids, use_cache=False).loss.backward()
        return tiny.gradients(model)

    expected, got = gradients(False), gradients(True)
    tiny.same_gradients(got, expected)


def test_trainer_with_torch_compile(tiny, batch, tmp_path):
    rows = [{name: tensor[i] for name, tensor in batch.kwargs().items()} for i in range(4)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]

    def losses(compiled):
        arguments = TrainingArguments(
            str(tmp_path),
            **{"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"},
            **{"learning_rate": 1e-2, "logging_steps": 1, "remove_unused_columns": False, "use_cpu": True},
            **({"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}),
        )
        trainer = Trainer(one_block(tiny), arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
