"""The adapter on a GPU: the numbers of the CPU, and what only a GPU has. Run where there is one, skipped elsewhere."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import moka
from moka.adapter import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = "cuda"


@pytest.fixture(autouse=True)
def _exact_float32():
    """The matrix products of float32 in float32: TF32 has 10 bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def moved(batch, device=GPU):
    return type(batch)(**{name: value.to(device) for name, value in batch.kwargs().items()})


def loss_and_gradients(tiny, model, batch):
    model.train().zero_grad()
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    loss = model(**batch.kwargs(), labels=labels).loss
    loss.backward()
    return loss.detach().cpu(), {name: grad.cpu() for name, grad in tiny.gradients(model).items()}


@pytest.mark.parametrize("rank", [3, 4, 8])
@pytest.mark.parametrize("interaction", ["question", "mean", "reversed", "none"])
def test_logits_and_gradients_are_those_of_the_cpu(tiny, batch, rank, interaction):
    model = tiny.adapted(r=rank, interaction=interaction)
    expected = tiny.logits(model, batch), *loss_and_gradients(tiny, model, batch)
    model = copy.deepcopy(model).eval().to(GPU)
    found = tiny.logits(model, moved(batch)).cpu(), *loss_and_gradients(tiny, model, moved(batch))
    real = batch.attention_mask.bool()
    tiny.same(found[0][real], expected[0][real])
    tiny.same(found[1], expected[1])
    tiny.same_gradients(found[2], expected[2], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["kwargs", "routing"])
def test_ids_on_the_host_and_on_the_gpu_route_alike(tiny, batch, way):
    """A collator's ids may stay on the host while the model's inputs are on the GPU."""
    model = tiny.adapted().to(GPU)
    there, here = moved(batch), batch.routed
    expected = tiny.logits(model, there)
    with torch.no_grad():
        if way == "kwargs":
            found = model(**there.text, **here).logits
        else:
            with moka.routing(model, **here, attention_mask=batch.attention_mask):
                found = model(**there.text).logits
    assert torch.equal(found, expected)


def test_ids_edited_on_the_gpu_after_collation_are_obeyed(tiny, batch):
    """What routes is the values that a forward is given, not a copy that the collator made of them."""
    model = tiny.adapted()
    edited = copy.deepcopy(batch)
    edited.interaction_ids = torch.zeros_like(batch.interaction_ids)
    expected, before = tiny.logits(model, edited), tiny.logits(model, batch)
    model = model.to(GPU)
    there = moved(batch)
    tiny.same(tiny.logits(model, there).cpu(), before)
    there.interaction_ids.zero_()
    found = tiny.logits(model, there).cpu()
    tiny.same(found, expected)
    assert (found - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generation_is_that_of_the_cpu(tiny, batch, options):
    model = tiny.adapted()
    expected = tiny.generate(model, batch, **options)
    found = tiny.generate(model.to(GPU), moved(batch), **options)
    assert torch.equal(found[0].cpu(), expected[0])
    tiny.same(found[1].cpu(), expected[1])


def test_merged_equals_live(tiny, batch):
    model = tiny.adapted().to(GPU)
    there = moved(batch)
    live = tiny.logits(model, there)
    model.merge_adapter()
    tiny.same(tiny.logits(model, there), live)
    model.unmerge_adapter()
    tiny.same(tiny.logits(model, there), live)


def test_dropout_drops_its_share_and_is_drawn_again_in_backward():
    torch.manual_seed(0)
    x = torch.randn(512, 256, device=GPU, requires_grad=True)
    A = torch.randn(8, 256, device=GPU, requires_grad=True)
    seed = 11
    dropped = ops._drawn(x.shape, x.device, 0.25, seed)
    assert 0.24 < dropped.float().mean().item() < 0.26
    kept = x.detach().masked_fill(dropped, 0) / 0.75
    z = ops._DroppedProduct.apply(x, A, 0.25, seed)
    tolerance = {"atol": 1e-3, "rtol": 1e-4}
    torch.testing.assert_close(z, kept @ A.detach().t(), **tolerance)
    z.backward(torch.ones_like(z))
    torch.testing.assert_close(A.grad, torch.ones_like(z).t() @ kept, **tolerance)
    ones = torch.ones_like(z) @ A.detach()
    torch.testing.assert_close(x.grad, ones.masked_fill(dropped, 0) / 0.75, **tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_without(tiny, batch, reentrant):
    model, there = tiny.adapted(dropout=0.3).to(GPU), moved(batch)
    model.enable_input_require_grads()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        results.append(loss_and_gradients(tiny, model, there))
    tiny.same(results[1][0], results[0][0])
    tiny.same_gradients(results[1][1], results[0][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_float32(tiny, batch, autocast):
    model, there = tiny.adapted().to(GPU), moved(batch)
    real = there.attention_mask.bool()
    expected = tiny.logits(model, there)[real]
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast(GPU, torch.bfloat16, enabled=autocast):
        found = tiny.logits(model, there)[real].float()
        loss, gradients = loss_and_gradients(tiny, model, there)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.isfinite(loss)
    assert gradients
    assert all(torch.isfinite(grad).all() for grad in gradients.values())


def test_compiled_equals_eager(tiny, batch):
    model, there = tiny.adapted().to(GPU), moved(batch)
    expected = tiny.logits(model, there)
    found = tiny.logits(torch.compile(model), there)
    real = there.attention_mask.bool()
    tiny.same(found[real], expected[real])


def test_the_model_can_be_spread_over_gpu_and_cpu(tiny, batch):
    from accelerate import dispatch_model

    model = tiny.adapted()
    expected = tiny.logits(model, batch)
    base = "base_model.model"
    places = {f"{base}.model.embed_tokens": 0, f"{base}.model.rotary_emb": 0, f"{base}.model.layers.0": 0}
    places |= {f"{base}.model.layers.1": "cpu", f"{base}.model.norm": 0, f"{base}.lm_head": 0}
    found = tiny.logits(dispatch_model(model, places, main_device=0), moved(batch)).cpu()
    real = batch.attention_mask.bool()
    tiny.same(found[real], expected[real])


def test_nf4_trains_saves_and_loads(tiny, batch, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = copy.deepcopy(tiny.backbone().config)
    config.intermediate_size, config.num_key_value_heads = 128, 4
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def backbone():
        return LlamaForCausalLM.from_pretrained(tmp_path / "backbone", quantization_config=settings, device_map={"": 0})

    model, there = tiny.adapted(backbone=backbone()).train(), moved(batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast(GPU, torch.bfloat16):
            loss = model(**there.kwargs(), labels=there.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = tiny.logits(model.eval(), there)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(backbone(), tmp_path / "adapter").eval()
    assert torch.equal(tiny.logits(loaded, there), expected)
