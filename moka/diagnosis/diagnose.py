"""``moka.diagnose``: which modality a model uses for its answers to a data set, with everything that the report shows.

    data -> batches, media decoded once -> likelihoods by coalition -> a record a sample (kept: a killed run resumes)
    the first samples again              -> attention, gradients, interaction
    records                              -> figures with intervals -> Diagnosis

Several processes share the batches, which are those of one process.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm

import moka
from moka.adapter.config import TEXT
from moka.adapter.layer import MokaLinear
from moka.analysis.attention import attention_by_modality, conditional_utilization
from moka.analysis.coalitions import all_coalitions
from moka.analysis.contribution import ABLATIONS, VALUES, Contribution, adapter_config, evaluating, media_modalities
from moka.analysis.gradients import FisherInformation, observed_gradients
from moka.data.sources import describe_source
from moka.distributed import (
    all_gather_object,
    broadcast_from_main,
    collective_errors,
    is_main,
    print_main,
    rank_and_world_size,
    run_on_main,
)
from moka.errors import MokaError, counted, nearest
from moka.evaluation.records import KeptRecords
from moka.inference import LoadedModel
from moka.io import read_json, write_json

from .examples import examples_of, interaction_pictures
from .reading import Batch, open_model, open_reader
from .summary import Diagnosis, coalition_name, figures_of, means

SAMPLES, DETAILS = "samples.jsonl", "details.json"
NOISE_LEVELS = (0.25, 0.5, 1.0, 2.0)
NO_ADAPTER = "the model has no MokA adapter"
# What carries a medium into a model, by type of its tokens: how the names of the arguments begin.
_INPUTS = {1: ("pixel_values", "image_features"), 2: ("pixel_values", "video_features"), 3: ("input_", "audio_")}


def diagnose(
    model: str | Path | nn.Module | LoadedModel,
    data: Any,
    value: str = "log_likelihood",
    ablate: str | Sequence[str] = "tokens",
    size: int | None = None,
    *,
    batch_size: int = 8,
    noise: str | Sequence[str] = (),
    details: int = 32,
    examples: int = 10,
    seed: int = 0,
    processor: Any = None,
    folder: str | Path | None = None,
    split: str = "test",
    media_root: str | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Measure which modalities a model uses for its answers. Every process has to call it.

    Args:
        model: a run of `moka train`, the folder or name of a Hugging Face multimodal LLM, or a loaded one: with a MokA
            adapter, with LoRA, or with none.
        data: JSONL file, ``embedded:TASK``, a mapping with ``format``, a list of samples, or a list of batches with ``labels``.
        value: what a coalition is worth for Shapley values and shares: "log_likelihood", "correct" or "weighted_correct".
        ablate: how modalities are taken away, one or several of "tokens", "adapter" and "blank" (see `Contribution`).
        size: use that many samples, from the first.
        batch_size: samples of one forward.
        noise: modalities whose inputs are disturbed more and more; 4 more forwards of each sample for each.
        details: samples for attention, gradients and interaction, from the first.
        examples: samples in which a modality matters most, and least, to be shown.
        seed: of the noise.
        processor: of a loaded Hugging Face model, if ``data`` are chats.
        folder: keeps a record of each sample at once, so that a killed run resumes; default: nothing is kept.
        split: of embedded tasks, and of formats that name none.
        media_root: folder of the media of a JSONL file; default: its own.
    Raises:
        MokaError: an unknown name; data of which no sample can be used; an ablation that this model or data cannot have.
    """
    ablations = _names(ablate, ABLATIONS, "ablate")
    _names(value, VALUES, "value")
    for name, number in {"batch_size": batch_size, "size": 1 if size is None else size}.items():
        if number < 1:
            raise MokaError(f"{name} is {number}; at least 1 is expected.")
    described = str(model) if isinstance(model, (str, Path)) else ""
    if isinstance(model, (str, Path)):
        model, processor = open_model(model)
    if isinstance(model, LoadedModel):
        described = described or str(model.folder)
        model, processor = model.model, model
    reader = open_reader(model, data, processor, split, media_root)
    noisy = _names(noise, media_modalities(model), "noise") if noise else []
    has_adapter = adapter_config(model) is not None
    left_out = (
        {}
        if has_adapter
        else dict.fromkeys(("adapter use", "gradients", "interaction", "interaction maps"), NO_ADAPTER)
    )
    if not has_adapter and "adapter" in ablations:
        ablations.remove("adapter")
        if not ablations:
            raise MokaError(f"ablate: 'adapter' cannot be measured, {NO_ADAPTER}; allowed: tokens, blank.")
    if "adapter" not in ablations:
        left_out.setdefault("adapter use", "ablate= does not name adapter")
    n = min(size or len(reader), len(reader))
    source = (
        describe_source(data if isinstance(data, dict) else str(data))
        if isinstance(data, (str, Path, dict))
        else f"{type(data).__name__} of {len(data)}"
    )
    settings = _settings(model, source, ablations, noisy, seed, batch_size)
    with ExitStack() as stack:
        kept = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="moka-diagnosis-"))
        store = KeptRecords(kept, SAMPLES)
        records = _records(model, reader, store, settings, ablations, noisy, n, batch_size, seed, progress)
        used = [record for record in records if "error" not in record]
        failed = [{"id": record["id"], "error": record["error"]} for record in records if "error" in record]
        if failed:
            told = f"{len(failed)} of {counted(n, 'sample')} cannot be used; the first, {failed[0]['id']!r}: {failed[0]['error']}"
            if not used:
                raise MokaError(f"data: {told}")
            print_main(f"note: {told}")
        first = {record["place"] for record in used[:details]}
        batches = [[place for place in batch if place in first] for batch in reader.batches(n, batch_size)]
        found = broadcast_from_main(lambda: _details(model, reader, batches, store, settings))
    left_out |= found.pop("left_out")
    diagnosis = figures_of(used, value, ablations, examples)
    diagnosis.model, diagnosis.data, diagnosis.failed, diagnosis.settings = (
        described or type(model).__name__,
        source,
        failed,
        settings,
    )
    diagnosis.adapter = adapter_kind(model)
    diagnosis.left_out = left_out | diagnosis.left_out
    for name, figures in found.items():
        setattr(diagnosis, name, figures)
    if not noisy:
        diagnosis.left_out["vulnerability"] = "noise= names no modality"
    run_on_main(lambda: _show_examples(diagnosis, model, reader, has_adapter))
    if folder is not None:
        run_on_main(lambda: store.write([*diagnosis.samples, *(r for r in records if "error" in r)]))
    return diagnosis


def _names(given: str | Sequence[str], allowed: Collection[str], field: str) -> list[str]:
    """Return one or several names, each of them known."""
    names = list(dict.fromkeys([given] if isinstance(given, str) else given))
    if not names:
        raise MokaError(f"{field}: it is empty; allowed: {', '.join(allowed)}.")
    for name in names:
        if name not in allowed:
            raise MokaError(f"{field}: unknown {name!r}; allowed: {', '.join(allowed)}.{nearest(name, allowed)}")
    return names


def adapter_kind(model: nn.Module) -> str:
    """Return "MokA", the name of another method, or "none"."""
    found = adapter_config(model)
    if found is not None:
        return "MokA" if found.method == "moka" else found.method
    configs = getattr(model, "peft_config", {})
    return str(next(iter(configs.values())).peft_type.value) if configs else "none"


def _settings(
    model: nn.Module, source: str, ablations: list[str], noisy: list[str], seed: int, batch_size: int
) -> dict[str, Any]:
    """Return all that a sample's record depends on."""
    return {
        "source": source,
        "weights_sha256": fingerprint(model),
        "ablate": ablations,
        "noise": noisy,
        "seed": seed,
        "batch_size": batch_size,
        "moka": moka.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes and up to 1024 evenly spaced values of every parameter that is used."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft keeps it next to the trained copy; a run's is random
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 1024)].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()


def _records(
    model: nn.Module,
    reader: Any,
    store: KeptRecords,
    settings: dict[str, Any],
    ablations: list[str],
    noisy: list[str],
    n: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return a record for each of the first ``n`` samples, the same on every process; those that are kept are not made again."""
    abouts = [_about(reader, place) for place in range(n)]
    known = broadcast_from_main(lambda: {r["key"]: r for r in store.read(settings) if "key" in r and "error" not in r})
    found = {place: known[about["key"]] for place, about in enumerate(abouts) if about.get("key") in known}
    found |= {place: about for place, about in enumerate(abouts) if "error" in about}
    resumed = sum("error" not in record for record in found.values())
    if resumed:
        print_main(f"note: {resumed} of {counted(n, 'sample')} are in {store.path} already; resuming from there.")
    batches = [[p for p in places if p not in found] for places in reader.batches(n, batch_size)]
    batches = [places for places in batches if places]
    rank, world = rank_and_world_size()
    with tqdm(
        total=n, initial=len(found), desc="diagnosing", unit="sample", disable=not (progress and is_main())
    ) as bar:
        for start in range(0, len(batches), world):
            together = batches[start : start + world]
            with collective_errors():
                for places in together[rank : rank + 1]:
                    for place, record in measure(model, reader.load(places), ablations, noisy, seed):
                        if place in places:
                            found[place] = {**abouts[place], **record}
                            store.append(found[place])
            bar.update(sum(map(len, together)))
    for other in all_gather_object({p: found[p] for places in batches[rank::world] for p in places}):
        found |= other
    return [found[place] for place in range(n)]


def _about(reader: Any, place: int) -> dict[str, Any]:
    try:
        return {"place": place, "key": reader.key(place), **reader.about(place)}
    except MokaError as error:  # a line of the file that is no sample
        return {"place": place, "id": str(place), "category": "all", "error": str(error)}


def measure(
    model: nn.Module, batch: Batch, ablations: Sequence[str], noisy: Sequence[str] = (), seed: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield place and record of each sample of a batch: log-likelihood and correctness of its answer by coalition."""
    for place, problem in batch.failed.items():
        yield place, {"error": problem}
    if not set(batch.places) - set(batch.failed):
        return
    started = time.perf_counter()
    found = Contribution(model, batch.inputs, blank=batch.blank)
    names = list(found.rows)
    table: dict[str, dict[str, dict[str, torch.Tensor]]] = {"log_likelihood": {}, "correct": {}}
    for ablate in ablations:
        for coalition in all_coalitions([TEXT, *names] if ablate == "adapter" else names):
            name = coalition_name(coalition, [TEXT, *names])
            table["log_likelihood"].setdefault(ablate, {})[name] = found.log_likelihood(coalition, ablate)
            table["correct"].setdefault(ablate, {})[name] = found.correct(coalition, ablate)
    noises: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name in noisy:
        for level in NOISE_LEVELS:
            disturbed = Contribution(model, with_noise(model, batch.inputs, name, level, seed + batch.places[0]))
            values = {"log_likelihood": disturbed.log_likelihood(), "correct": disturbed.correct()}
            noises.setdefault(name, {})[f"{level:g}"] = values
    valid = batch.inputs.get("attention_mask", torch.ones_like(found.labels)).bool()
    counts = {name: tokens.sum(1) for name, tokens in found.rows.items()}
    counts = {TEXT: valid.sum(1) - sum(counts.values()), **counts, "answer": (found.labels[:, 1:] != -100).sum(1)}
    seconds = (time.perf_counter() - started) / len(batch.places)
    for row, place in enumerate(batch.places):
        if place not in batch.failed:
            tokens = {name: int(count[row]) for name, count in counts.items() if count[row]}
            record = {"modalities": [name for name in names if name in tokens], "tokens": tokens, "seconds": seconds}
            yield place, {**record, **_row(table, row), **({"noise": _row(noises, row)} if noises else {})}


def _row(table: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return nested tables of tensors [batch] as tables of one row's numbers."""
    return {
        name: float(value[row]) if isinstance(value, torch.Tensor) else _row(value, row)
        for name, value in table.items()
    }


def with_noise(model: nn.Module, inputs: Mapping[str, Any], modality: str, level: float, seed: int) -> dict[str, Any]:
    """Return a batch with Gaussian noise of ``level`` standard deviations on the inputs of a modality's encoder.

    Raises:
        MokaError: the batch has no such input.
    """
    beginnings = tuple(b for i in media_modalities(model)[modality] for b in _INPUTS.get(i, ()))
    names = [
        name
        for name, value in inputs.items()
        if name.startswith(beginnings) and isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    if not names and Contribution(model, inputs).rows[modality].any():
        raise MokaError(f"noise: no input of {modality!r} is known among {sorted(inputs)}; leave it out.")
    generator, changed = torch.Generator().manual_seed(seed), dict(inputs)
    for name in names:
        clean = inputs[name]
        drawn = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
        changed[name] = clean + level * clean.float().std().to(clean.dtype) * drawn
    return changed


def _details(
    model: nn.Module, reader: Any, batches: list[list[int]], store: KeptRecords, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return figures of attention, gradients and interaction over a few batches; one that cannot be had is named with its reason."""
    path, wanted = store.folder / DETAILS, {**settings, "batches": batches}
    if path.exists() and (kept := read_json(path)).get("settings") == wanted:
        return kept["figures"]
    loaded = [batch for batch in (reader.load(places) for places in batches if places) if batch.inputs]
    found: dict[str, Any] = {"left_out": {}}
    sections = {"attention": attention_figures}
    if adapter_config(model) is not None:
        sections |= {"gradients": gradient_figures, "interaction": interaction_figures}
    for name, figures in sections.items():
        try:
            found[name] = figures(model, [batch.inputs for batch in loaded])
        except MokaError as error:
            found["left_out"][name] = str(error)
    write_json(path, {"settings": wanted, "figures": found})
    return found


def attention_figures(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return attention by modality and layer, the mean over heads: total, per token, and RollingQ's imbalance rate."""
    found = [attention_by_modality(model, batch) for batch in batches]
    names = list(dict.fromkeys(name for one in found for name in one.mass))
    rows = {name: sum(one.rows.get(name, 0) for one in found) for name in names}
    names = [name for name in names if rows[name]]

    def mean(name: str, values: Sequence[Any]) -> Any:
        return sum(v * one.rows[name] for v, one in zip(values, found, strict=True) if name in one.rows) / rows[name]

    total = {name: mean(name, [one.mass.get(name, torch.zeros(1)).mean(-1) for one in found]) for name in names}
    tokens = {name: float(mean(name, [one.tokens.get(name, 0.0) for one in found])) for name in names}
    cosine = {name: mean(name, [one.alignment.get(name, torch.zeros(1)).mean(-1) for one in found]) for name in names}
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    return {
        "n": max(rows.values()),
        "tokens": tokens,
        "total": {name: each.tolist() for name, each in total.items()},
        "per_token": {name: (each / tokens[name]).tolist() for name, each in total.items()},
        "imbalance_rate": {f"{a} - {b}": (cosine[a] - cosine[b]).tolist() for a, b in pairs},
    }


def gradient_figures(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the shares of the modalities in the update and the Fisher information of B, of the mean log-likelihood's gradient."""
    layers = [m for m in model.modules() if isinstance(m, MokaLinear) and not m.moka_tower]
    parameters = [p for m in layers for name in m.adapters_in_use() for p in m.moka_B[name].parameters()]
    wanted = [p.requires_grad for p in parameters]
    fisher, updates, cosines = FisherInformation(), [], []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in batches:
            with evaluating(model), observed_gradients(model) as observed:
                loss = -Contribution(model, batch).log_likelihood(grad=True).nanmean()
                torch.autograd.grad(loss, parameters, allow_unused=True)
            fisher.add(observed)
            updates.append(observed.update_shares())
            cosines.append({f"{a}, {b}": value for (a, b), value in observed.cosines().items()})
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)

    def mean(each: list[dict[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for one in each for name in one)
        return {name: sum(one.get(name, 0.0) for one in each) / len(each) for name in names}

    return {
        "n": sum(len(batch["labels"]) for batch in batches),
        "batches": len(batches),
        "update_shares": mean(updates),
        "cosines": mean(cosines),
        "fisher_shares": fisher.shares(),
        "non_text_dominance_rate": fisher.non_text_dominance_rate(),
    }


def interaction_figures(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the conditional utilization: nats per token that the interaction adds to the answers."""
    found = torch.cat([conditional_utilization(model, batch).cpu() for batch in batches])
    found = found[found.isfinite()]
    return {"n": len(found), **means({"conditional_utilization": found.numpy()})}


def _show_examples(diagnosis: Diagnosis, model: nn.Module, reader: Any, has_adapter: bool) -> None:
    """Fill in the media of the samples that are shown, and the maps of the interaction over their pictures."""
    most, least = (
        list(dict.fromkeys(place for ends in diagnosis.extremes.values() for place in ends[end]))
        for end in ("most", "least")
    )
    diagnosis.media = {place: examples_of(reader.decoded(place)) for place in dict.fromkeys([*most, *least])}
    if has_adapter:
        diagnosis.maps, reason = interaction_pictures(model, reader, most)
        diagnosis.left_out |= {"interaction maps": reason} if reason else {}
