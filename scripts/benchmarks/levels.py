"""The levels: one layer, one block, a training step, prefill, decode.

Every variant gets the same tokens and gives the gradient of its input too, as a trained projector before the backbone
needs it; a frozen backbone only has nothing else to give.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import moka
from moka.analysis.gradients import FisherInformation, observed_gradients

from .batches import Batch, make_batch
from .measure import Case, Point, measure, synchronize
from .reference import Masks
from .sizes import DTYPES, one_block, open_backbone, quantize
from .variants import ALL, OBSERVED, check_same, forward_arguments, make_variants, precision, trained

LOSS = "loss at supervised positions"  # the range of it in a profile
DECODED = ("bare", "bare again", "lora", "moka", "moka merged")


class OneLinear(nn.Module):
    """A network of one linear map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def chosen(arguments: Namespace, known: tuple[str, ...] = ALL) -> list[str]:
    """The variants to measure: those asked for, and always the bare backbone twice, which says the noise."""
    return [name for name in known if name.startswith("bare") or not arguments.variants or name in arguments.variants]


def layer(arguments: Namespace) -> list[Point]:
    """One linear map, forward and backward; the routing is built before, as a model does once for all its layers."""
    torch.manual_seed(arguments.seed)
    network = OneLinear(arguments.inputs, arguments.outputs).to(arguments.device, DTYPES[arguments.dtype])
    if arguments.dtype == "nf4":
        quantize(network, arguments.device)
    models, shared = make_variants(network.requires_grad_(False), arguments, chosen(arguments), ["proj"])
    return [_passes(models, shared, make_batch(arguments, 100), arguments.inputs, arguments)]


def block(arguments: Namespace) -> list[Point]:
    """One decoder block of the backbone's shape, forward and backward; the routing is built in it."""
    network = one_block(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    models, shared = make_variants(network, arguments, chosen(arguments))
    return [_passes(models, shared, make_batch(arguments, 100), network.config.hidden_size, arguments)]


def _passes(
    models: dict[str, nn.Module], shared: dict[str, Masks], batch: Batch, width: int, arguments: Namespace
) -> Point:
    """Measure forward and backward of networks that take and give [batch, seq, width] vectors."""
    shared["masks"] = batch.masks
    whole = arguments.level == "block"
    source = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(*batch.ids.shape, width, generator=source).to(arguments.device, DTYPES[arguments.dtype])
    x.requires_grad_(True)

    def call(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not whole:
            return model(x)
        return model(inputs_embeds=x, use_cache=False, **forward_arguments(name, batch))[0]

    with ExitStack() as stack:
        if not whole:
            for name in set(models) & {"moka"}:
                stack.enter_context(moka.routing(models[name], attention_mask=batch.mask, **batch.routing))
        if arguments.dtype == "float32" and {"moka", "reference"} <= set(models):
            check_same(models["moka"], models["reference"], x, call)
        cases = {
            name: Case(_forward_backward(model.train(), partial(call, name, model), x, arguments), batch.tokens)
            for name, model in models.items()
        }
        return measure(cases, arguments, {})


def _forward_backward(model: nn.Module, call: Callable, x: torch.Tensor, arguments: Namespace) -> Callable[[], None]:
    parameters = trained(model)
    with torch.no_grad(), precision(arguments):
        gradient = torch.randn_like(call(x))
    if arguments.compile:
        call = torch.compile(call)

    def run() -> None:
        with precision(arguments):
            output = call(x)
        output.backward(gradient)
        for tensor in (x, *parameters):
            tensor.grad = None

    return run


def step(arguments: Namespace) -> list[Point]:
    """A full training step, without gradient checkpointing and with it."""
    backbone = open_backbone(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    names = chosen(arguments) + [name for name in arguments.variants or () if name == OBSERVED]
    models, shared = make_variants(backbone, arguments, names)
    batch = make_batch(arguments, backbone.config.vocab_size)
    shared["masks"] = batch.masks
    check_step(models, batch, arguments)
    wanted = {"no": [False], "yes": [True], "both": [False, True]}[arguments.checkpointing]
    return [step_point(models, batch, arguments, {"checkpointing": one}, one) for one in wanted]


def step_point(
    models: dict[str, nn.Module], batch: Batch, arguments: Namespace, settings: dict, checkpointing: bool = False
) -> Point:
    """Measure training steps of ``models`` on ``batch``. They train: have ``check_step`` run before the first."""
    set_checkpointing(models, checkpointing)
    cases = {name: Case(training_step(name, model, batch, arguments), batch.tokens) for name, model in models.items()}
    point = measure(cases, arguments, settings)
    set_checkpointing(models, False)
    return point


def set_checkpointing(models: dict[str, nn.Module], on: bool) -> None:
    for model in models.values():
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def check_step(models: dict[str, nn.Module], batch: Batch, arguments: Namespace) -> None:
    """Assert that MokA and the reference give the same logits and gradients; in float32 only."""
    if arguments.dtype == "float32" and {"moka", "reference"} <= set(models):
        embeds = embedded(models["moka"], batch)
        check_same(models["moka"], models["reference"], embeds, partial(logits_of, batch))


def embedded(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[batch, seq, hidden]: for media too the vectors of random tokens."""
    with torch.no_grad():
        return model.get_input_embeddings()(batch.ids)


def logits_of(batch: Batch, name: str, model: nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    """[batch, kept, vocabulary]: at the supervised positions only."""
    given = forward_arguments(name, batch)
    return model(inputs_embeds=embeds, use_cache=False, logits_to_keep=batch.keep, **given).logits


def training_step(name: str, model: nn.Module, batch: Batch, arguments: Namespace) -> Callable[[], None]:
    """Forward, loss at the supervised positions, backward, AdamW as transformers' Trainer chooses it (fused)."""
    embeds = embedded(model, batch).requires_grad_(True)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    forward = torch.compile(logits_of) if arguments.compile else logits_of

    def observed_step() -> None:
        with observed_gradients(model) as observed:
            run()
        fisher = FisherInformation()
        fisher.add(observed)
        observed.update_shares(), observed.cosines(), observed.z_norms()
        fisher.shares(), fisher.non_text_dominance_rate()

    def run() -> None:
        with precision(arguments):
            logits = forward(batch, name, model, embeds)
            with torch.profiler.record_function(LOSS):
                loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        embeds.grad = None

    return observed_step if name == OBSERVED else run


def prefill(arguments: Namespace) -> list[Point]:
    """A prompt of media and text through the model, into a cache; logits of the last token."""
    backbone = open_backbone(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    names = chosen(arguments, (*ALL, "moka merged"))
    models, shared = make_variants(backbone, arguments, names)
    batch = make_batch(arguments, backbone.config.vocab_size, answer=False)
    batch.keep = torch.arange(arguments.seq - 4, arguments.seq, device=batch.ids.device)
    shared["masks"] = batch.masks
    check_step(models, batch, arguments)

    def run(name: str, model: nn.Module) -> Callable[[], None]:
        embeds, given = embedded(model, batch), forward_arguments(name, batch)

        @torch.no_grad()
        def once() -> None:
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **given)

        return once

    cases = {name: Case(run(name, model.eval()), batch.tokens) for name, model in models.items()}
    return [measure(cases, arguments, {})]


def decode(arguments: Namespace) -> list[Point]:
    """Tokens one by one after a prompt, greedily; the prefill is not in the times, but in peak memory and FLOPs."""
    backbone = open_backbone(arguments.backbone, arguments.dtype, arguments.device, arguments.seed)
    models, _ = make_variants(backbone, arguments, chosen(arguments, DECODED))
    batch = make_batch(arguments, backbone.config.vocab_size, answer=False)
    cases = {}
    for name, model in models.items():
        cases[name] = Case(decoding(name, model.eval(), batch, arguments.tokens), arguments.tokens * arguments.batch)
    return [measure(cases, arguments, {})]


def decoding(name: str, model: nn.Module, batch: Batch, tokens: int) -> Callable[[], float]:
    """Seconds of ``tokens`` greedy steps after the prompt."""
    settings = {"do_sample": False, "max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1, "pad_token_id": 0}
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    given = {"input_ids": batch.ids, **forward_arguments(name, batch), "attention_mask": mask}
    device = batch.ids.device

    @torch.no_grad()
    def run() -> float:
        begin: list[float] = []

        def note(_, scores: torch.Tensor) -> torch.Tensor:
            if not begin:
                synchronize(device)
                begin.append(time.perf_counter())  # the prefill's scores: decoding begins
            return scores

        model.generate(**given, logits_processor=[note], **settings)
        synchronize(device)
        return time.perf_counter() - begin[0]

    return run


RUN: dict[str, Callable[[Namespace], list[Point]]] = {
    "layer": layer,
    "block": block,
    "step": step,
    "prefill": prefill,
    "decode": decode,
}
