"""The engine's figures against closed-form values, on a model trained on Gaussian templates."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka.analysis import Contribution, shapley_values
from moka.analysis.contribution import hidden_from_attention
from moka.demo.gaussian import GaussianTask
from moka.modeling import MokaModelConfig

STEPS, BATCH, WIDTH = 800, 256, 16
FIRST_CLASS, NO_HINT, ASK = 10, 21, 22  # token ids
SIGMA = {"visual": 2.0, "audio": 3.0}


def build():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    image = {"type": "conv-image", "image_size": 8, "channels": [4, 4], "width": WIDTH, "num_tokens": 1}
    sound = {"type": "conv-audio", "frames": 8, "channels": [6], "width": WIDTH, "num_tokens": 1}
    modalities = {
        "visual": {"encoder": image, "projector": {"type": "linear"}},
        "audio": {"encoder": sound, "projector": {"type": "linear"}},
    }
    return moka.MokaForConditionalGeneration(MokaModelConfig(text, modalities), LlamaForCausalLM(text))


def batch_of(model, samples):
    """``<s> picture sound ask hint answer``, with the samples' features in place of the encoders'."""
    n = len(samples)
    hint = torch.where(samples.hint >= 0, samples.hint + FIRST_CLASS, NO_HINT)
    columns = [1, model.config.placeholder_id(1), model.config.placeholder_id(3), ASK]
    ids = torch.stack([*(torch.full((n,), c) for c in columns), hint, samples.labels + FIRST_CLASS], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {
        "input_ids": ids,
        "mm_token_type_ids": torch.tensor([0, 1, 3, 0, 0, 0]).expand(n, -1),
        "interaction_ids": torch.tensor([0, 1, 1, 1, 1, 0]).expand(n, -1),
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "image_features": samples.features["visual"][:, None] / 2,
        "audio_features": samples.features["audio"][:, None] / 2,
    }


@pytest.fixture(scope="module")
def trained():
    """Trained on every coalition: each modality is hidden in 30 % of the samples."""
    task, model = GaussianTask(SIGMA), build().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batch = batch_of(model, task.sample(BATCH, seed=1000 + step))
        dropped = torch.rand(2, BATCH, 1, generator=generator) < 0.3
        types = batch["mm_token_type_ids"]
        with hidden_from_attention(model, ((types == 1) & dropped[0]) | ((types == 3) & dropped[1])):
            model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def spearman(found, true):
    ranks = torch.stack([values.argsort().argsort().float() for values in (found, true)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.slow
def test_lift_and_shapley_values_rank_samples_as_the_closed_form_does(trained):
    task = GaussianTask(SIGMA)
    samples = task.sample(1000, seed=1)
    found = Contribution(trained, batch_of(trained, samples))
    nothing = task.log_likelihood(samples, ())
    for coalition in (["visual"], ["audio"], ["visual", "audio"]):
        rank = spearman(found.lift(coalition), task.log_likelihood(samples, coalition) - nothing)
        print(f"lift of {coalition}: Spearman {rank:.3f}")
        assert rank >= 0.9
    true = shapley_values(lambda coalition: task.log_likelihood(samples, coalition), ["visual", "audio"])
    for name in ("visual", "audio"):
        rank = spearman(found.shapley()[name], true[name])
        print(f"Shapley value of {name}: Spearman {rank:.3f}")
        assert rank >= 0.9


@pytest.mark.slow
def test_corrupted_pictures_are_found(trained):
    samples = GaussianTask({**SIGMA, "visual": 1.5}, corrupt={"visual": 0.3}).sample(1000, seed=2)
    found = Contribution(trained, batch_of(trained, samples)).shapley()["visual"]
    bad, good = found[samples.corrupted["visual"]], found[~samples.corrupted["visual"]]
    auroc = (good[None] > bad[:, None]).float().mean().item()
    print(f"AUROC {auroc:.3f}")
    assert auroc >= 0.95


def test_the_closed_form_agrees_with_drawing_many_samples():
    """Among samples whose most likely class has probability about p, a share p is right."""
    task = GaussianTask({"visual": 2.0, "audio": 2.0}, leak=0.2)
    samples = task.sample(20_000, seed=3)
    for coalition in ((), ("audio",), ("visual", "audio")):
        confidence, guess = task.log_posterior(samples, coalition).exp().max(-1)
        right = (guess == samples.labels).float()
        assert right.mean().item() == pytest.approx(confidence.mean().item(), abs=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"leak": 1.5}, ["leak", "1.5"]), ({"corrupt": {"smell": 0.1}}, ["corrupt", "smell", "visual"])],
)
def test_bad_knobs_are_refused_by_name(fields, words):
    with pytest.raises(moka.MokaError) as error:
        GaussianTask(**fields)
    assert all(word in str(error.value) for word in words)
