"""The parts of B's gradient sum to B's gradient, whatever the training does around the layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moka
from moka import MokaError
from moka.adapter import MokaLinear
from moka.analysis.gradients import FisherInformation, average, observed_gradients

ROOT = Path(moka.__file__).parents[1]


def step(model, batch, times=1):
    for _ in range(times):
        (model(**batch).loss / times).backward()


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MokaLinear) and not m.moka_tower}


def assert_sums_to_gradient(model, observed):
    for name, layer in layers(model).items():
        total = sum(observed.parts[name].values())
        torch.testing.assert_close(total, layer.moka_B["default"].weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["plain", "checkpointed", "accumulated", "dropout"])
def test_the_parts_sum_to_the_gradient(composed, how):
    example = composed()
    model = example.model.train()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if how == "dropout":
        for layer in layers(model).values():
            layer.moka_dropout["default"].p = 0.3
    with observed_gradients(model) as observed:
        step(model, example.batch, times=3 if how == "accumulated" else 1)
    assert_sums_to_gradient(model, observed)
    assert set(observed.modalities()) == {"text", "visual", "audio"}
    assert sum(observed.update_shares().values()) == pytest.approx(1)
    assert all(-1 <= cosine <= 1 for cosine in observed.cosines().values())


def row(batch, index):
    """One row of the batch of the examples; only the first has sound."""
    one = {name: value[index : index + 1] for name, value in batch.items() if name != "input_features"}
    return {**one, **({"input_features": batch["input_features"]} if index == 0 else {})}


def processes(rank, folder):
    """One of two processes: its row twice, by accumulation, with recomputation; writes its gradients and the parts."""
    from conftest import composed_example
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    example = composed_example()
    model = example.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    parallel, batch = DistributedDataParallel(model), row(example.batch, rank)
    with observed_gradients(model) as observed:
        with parallel.no_sync():
            (parallel(**batch).loss / 2).backward()
        (parallel(**batch).loss / 2).backward()
    gradients = {name: layer.moka_B["default"].weight.grad for name, layer in layers(model).items()}
    found = average(observed)
    torch.save((gradients, found.parts, dict(found.tokens), observed.modalities()), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's own end sometimes waits for a process that has left already


def test_the_parts_of_two_processes_sum_to_the_averaged_gradient(composed, tmp_path):
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [result[3] for result in results] == [["text", "visual", "audio"], ["text", "visual"]]
    for gradients, parts, tokens, _ in results:
        assert set(parts) == set(gradients)
        for name, own in parts.items():
            assert list(own) == ["text", "visual", "audio"]
            torch.testing.assert_close(sum(own.values()), gradients[name], atol=1e-5, rtol=1e-5)
        assert tokens == {"text": 2 * 12, "visual": 2 * 4, "audio": 2 * 3}  # without padding


def test_the_parts_sum_to_the_gradient_of_a_hugging_face_model(hugging_face):
    example = hugging_face("qwen2_5_omni", "moka")
    model = example.model.train()
    with observed_gradients(model) as observed:
        step(model, example.batch)
    assert_sums_to_gradient(model, observed)


def test_each_part_is_the_gradient_with_only_that_modality_adapted(composed):
    """With the interaction off, G_m is B's gradient if the other tokens' updates do not depend on B."""
    example = composed()
    model = example.model
    config = model.peft_config["default"]
    config.interaction = "none"
    name, layer = next(iter(layers(model).items()))
    with observed_gradients(model) as observed:
        step(model, example.batch)
    seen = {}

    def keep(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.__setitem__("delta", grad))

    handle = layer.register_forward_hook(keep)
    step(model, example.batch)
    handle.remove()
    types = example.batch["mm_token_type_ids"]
    for row, (modality, ids) in enumerate(config.modalities.items()):
        here = torch.isin(types, torch.tensor(ids))
        z = seen["x"][here] @ layer.moka_A["default"].weight[row].T
        expected = layer.moka_scaling["default"] * seen["delta"][here].T @ z
        torch.testing.assert_close(observed.parts[name][modality], expected.detach(), atol=1e-5, rtol=1e-4)


def test_nothing_is_observed_outside_of_the_block_and_training_is_the_same(composed):
    plain, watched = composed(), composed()
    step(plain.model, plain.batch)
    with observed_gradients(watched.model) as observed:
        pass
    step(watched.model, watched.batch)
    assert not observed.parts
    with observed_gradients(watched.model):
        watched.model.zero_grad()
        step(watched.model, watched.batch)
    pairs = zip(plain.model.named_parameters(), watched.model.parameters(), strict=True)
    for (name, one), other in pairs:
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), name


def test_fisher_shares_and_the_dominance_rate(composed):
    example = composed()
    fisher = FisherInformation()
    for _ in range(2):
        with observed_gradients(example.model) as observed:
            step(example.model, example.batch)
        fisher.add(observed)
    squares = {
        name: sum(float((parts[name] ** 2).sum()) for parts in observed.parts.values()) for name in fisher.traces()
    }
    assert fisher.traces() == pytest.approx(squares, rel=1e-4)
    larger = [(p["visual"] ** 2 + p["audio"] ** 2 > p["text"] ** 2).float() for p in observed.parts.values()]
    expected = sum(x.sum() for x in larger) / sum(x.numel() for x in larger)
    assert fisher.non_text_dominance_rate() == pytest.approx(expected.item())


def test_a_model_without_an_adapter_is_refused(composed):
    with pytest.raises(MokaError, match="no MokA adapter"), observed_gradients(composed("none").model):
        pass


if __name__ == "__main__":
    processes(int(sys.argv[1]), sys.argv[2])
