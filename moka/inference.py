"""``moka.load``: a trained run as an object that answers questions about a user's own media."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import BatchFeature

from moka.adapter import MokaConfig
from moka.adapter.checks import check_adapter_folder, check_finite
from moka.adapter.matching import match_names, some
from moka.analysis.contribution import media_modalities
from moka.analysis.fork_merge import fork_merge_decoding
from moka.analysis.modality_fusion import fused_generate
from moka.config import ModelSection, load_config
from moka.data import MediaDecoding, check_sample
from moka.data.media_io import BadMediaError
from moka.distributed import default_device
from moka.errors import MokaError
from moka.hub import fetch, names_repository
from moka.io import read_json, sha256_of
from moka.modeling import MokaForConditionalGeneration, MokaProcessor, TooLongError
from moka.modeling.artifacts import ADAPTER, AdapterDescription
from moka.modeling.build import build_model, choose_dtype, context_length
from moka.modeling.hf_model import backbone_fingerprint, base_info, model_inputs
from moka.modeling.quantization import check_quantization

# Next to what `moka merge` and `moka export` write: the format, its checks, and where it came from.
EXPORT = "export.json"
# The backbone quantised as the run says, or not at all.
AS_TRAINED = "as-trained"
DECODINGS = ("standard", "fork-merge", "entropy-fusion")


class LoadedModel:
    """A model with its adapter and processor. ``model`` is a ``PeftModel``; ``folder`` the adapter's folder."""

    def __init__(self, model: PeftModel, processor: MokaProcessor, folder: Path) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        self.settings: dict[str, Any] = {}  # defaults of `generate_tokens`, such as {"decoding": "entropy-fusion"}

    def generate(
        self,
        question: str | None = None,
        *,
        image: Any = None,
        audio: Any = None,
        video: Any = None,
        messages: list[dict] | None = None,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> str:
        """Answer one question.

        Args:
            question: the text.
            image, audio, video: a path or decoded medium each, or a list of them; they come before the question.
            messages: a full chat instead, in the format of ``moka.data.schema``.
            kwargs: for ``generate`` (``num_beams``, ``do_sample``, ...), and of ``generate_batch``. Decoding is greedy by
                default.
        Raises:
            MokaError: nothing to answer, a medium that cannot be read or has no encoder, a question that is too long.
        """
        if messages is None:
            if question is None:
                raise MokaError("generate: give a question, or messages.")
            if not question.strip() and image is None and audio is None and video is None:
                raise MokaError("generate: the question is empty and there are no media; ask something.")
            content = [
                {"type": kind, kind: one}
                for kind, media in (("image", image), ("audio", audio), ("video", video))
                for one in _as_list(media)
            ]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        return self.generate_batch([messages], max_new_tokens=max_new_tokens, **kwargs)[0]

    def generate_batch(
        self,
        chats: Sequence[list[dict]],
        max_new_tokens: int = 64,
        names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer several chats at once; each ends in a user's turn.

        Args:
            names: what errors call the chats.
            kwargs: of `generate_tokens`.
        """
        batch = self.encode(chats, max_new_tokens, names)
        settings = {**self.settings, **kwargs}
        return self.processor.batch_decode(self.generate_tokens(batch, max_new_tokens, **settings))

    def encode(
        self, chats: Sequence[list[dict]], max_new_tokens: int = 64, names: Sequence[str] | None = None
    ) -> BatchFeature:
        """Return chats as a batch of tensors on the model's device, padded on the left, with room for the answers.

        Raises:
            MokaError: a medium that cannot be read or has no encoder, a chat that is too long.
        """
        if max_new_tokens < 1:
            raise MokaError(f"generate: max_new_tokens is {max_new_tokens}; at least 1 is expected.")
        room = None
        if self.context is not None:
            room = self.context - max_new_tokens
            if room < 1:
                raise MokaError(
                    f"generate: max_new_tokens {max_new_tokens} leaves no room for a question in the backbone's context of "
                    f"{self.context} tokens; lower it."
                )
        if names is None:
            names = [f"chat {i}" for i in range(len(chats))] if len(chats) > 1 else ["the question"]
        encoded = []
        for name, chat in zip(names, chats, strict=True):
            sample = check_sample({"id": name, "messages": chat}, name, require_answer=False)
            try:
                messages = self.decoding.decode_sample(sample)["messages"]
            except BadMediaError as error:
                raise MokaError(f"{name}: {error.file}: {error.reason}") from error
            try:
                encoded.append(self.processor.encode(messages, add_generation_prompt=True, max_length=room))
            except TooLongError as error:
                reserved = f"{max_new_tokens} of the {self.context} tokens are kept for the answer"
                raise MokaError(f"{name}: {error} ({reserved})") from error
        batch = self.processor.pad(encoded, padding_side="left").to(self.model.device)
        batch.pop("labels")
        return batch

    @torch.no_grad()
    def generate_tokens(
        self,
        batch: BatchFeature,
        max_new_tokens: int = 64,
        decoding: str = DECODINGS[0],
        fork_layers: int | None = None,
        visual_weight: float = 0.5,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the tokens that answer what `encode` returned: [batch, new tokens].

        Args:
            decoding: "standard", "fork-merge", or "entropy-fusion" of forwards with one modality each.
            fork_layers, visual_weight: of ``moka.analysis.fork_merge``.
            kwargs: for ``generate`` of transformers; decoding is greedy by default.
        """
        if decoding not in DECODINGS:
            raise MokaError(f"generate: decoding {decoding!r} is not one of {', '.join(DECODINGS)}.")
        if kwargs.get("num_beams", 1) < 1:
            raise MokaError(f"generate: num_beams is {kwargs['num_beams']}; at least 1 is expected.")
        self.model.eval()
        model: Any = self.model
        settings = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        if decoding == "entropy-fusion":
            tokens = fused_generate(
                dict.fromkeys(media_modalities(model), model), batch, bound_generate, "entropy", **settings
            )
        else:
            fork = decoding == "fork-merge"
            with fork_merge_decoding(model, batch, fork_layers, visual_weight) if fork else nullcontext():
                tokens = model.generate(**model_inputs(model, batch), **settings)
        return tokens[:, batch["input_ids"].shape[1] :]

    @property
    def decoding(self) -> MediaDecoding:
        """How media files are decoded for this model, as they were in training."""
        return MediaDecoding.of(self.processor.decoding)

    @property
    def weights_sha256(self) -> str:
        """Of the adapter's file: says two trainings into the same folder apart."""
        return sha256_of(self.folder / "adapter_model.safetensors")

    @property
    def quantization(self) -> str | None:
        """Of the backbone: nf4, int8, or None for its own weights."""
        return base_info(self.model).quantization

    @property
    def context(self) -> int | None:
        """Tokens that fit into the backbone's context."""
        base: Any = self.model.get_base_model()
        return context_length(ModelSection(), base.config)


class Ensemble(LoadedModel):
    """UME: models that were trained on one modality each answer together; the next token's logits are their mean.

    Source: Du et al., ICML 2023, https://arxiv.org/abs/2305.01233.

    Args:
        members: modality -> the run that was trained on it only (``balance: [{name: single_modality, ...}]``).
    Raises:
        MokaError: fewer than two; runs whose prompts differ.
    """

    def __init__(self, members: Mapping[str, LoadedModel]) -> None:
        self.members = dict(members)
        if len(self.members) < 2:
            raise MokaError(f"ensemble: {list(self.members)} is one modality; give the runs of at least two.")
        first, *others = self.members.values()
        for other in others:
            if other.processor.modalities != first.processor.modalities:
                raise MokaError(
                    f"ensemble: {other.folder} has the modalities {other.processor.modalities} and {first.folder} has "
                    f"{first.processor.modalities}; train them with the same model section."
                )
        super().__init__(first.model, first.processor, first.folder)

    @torch.no_grad()
    def generate_tokens(
        self, batch: BatchFeature, max_new_tokens: int = 64, decoding: str = DECODINGS[0], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the tokens that answer what `encode` returned: [batch, new tokens]. ``kwargs``: for ``generate``.

        Raises:
            MokaError: another decoding than the standard one.
        """
        if decoding != DECODINGS[0]:
            raise MokaError(f"ensemble: decoding {decoding!r} is for one model; leave it out.")
        models = {name: member.model.eval() for name, member in self.members.items()}
        settings = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        tokens = fused_generate(models, batch, bound_generate, "equal", **settings)
        return tokens[:, batch["input_ids"].shape[1] :]

    @property
    def weights_sha256(self) -> str:
        """Of all members' adapters."""
        return "+".join(member.weights_sha256 for member in self.members.values())


def bound_generate(model: Any, batch: Mapping[str, Any]) -> Any:
    """Return ``generate`` of a model with the inputs that it takes of a batch."""
    return partial(model.generate, **model_inputs(model, batch))


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    return list(media) if isinstance(media, (list, tuple)) else [str(media) if isinstance(media, Path) else media]


def find_adapter(run: str | Path) -> Path:
    """Return the adapter folder of a run, the folder itself if it is one, or that of a repository on the Hub."""
    path = fetch(str(run)) if names_repository(run) else Path(run)
    kind = export_kind(path)
    folders = [folder for folder in (path / ADAPTER, path) if (folder / "adapter_config.json").is_file()]
    if folders and kind in (None, "text-merged"):
        return folders[0]
    problem, remedy = "has no adapter (no adapter/adapter_config.json)", "give a finished run of `moka train`"
    if kind is not None:
        problem = f"is an export in the format {kind}, which needs no moka: its README.md says how to load it"
    elif not path.exists():
        problem, remedy = "does not exist", "give a run folder of `moka train`, or an adapter folder"
    elif (path / "connector" / "connector.json").is_file():
        problem, remedy = "has a stage-1 run only, without an adapter", f"train stage 2 from {path}/connector"
    raise MokaError(f"{path} {problem}; {remedy}.")


def export_kind(path: str | Path) -> str | None:
    """The format of an export's folder; None for any other folder."""
    file = Path(path) / EXPORT
    description = read_json(file) if file.is_file() else None
    return description.get("kind") if isinstance(description, dict) else None


def load_base(
    run: str | Path,
    *,
    dtype: str = "auto",
    backbone: str | None = None,
    dequantize: bool = False,
    quantization: str | None = AS_TRAINED,
    device: str | None = None,
) -> MokaForConditionalGeneration:
    """The base model that an adapter folder belongs to, for ``PeftModel.from_pretrained(base, folder)``.

    Its projectors (and trainable encoders) are untrained until the adapter is loaded, which brings them.

    Args:
        run: a run folder or an adapter folder.
        dtype: float32, bfloat16 or auto.
        backbone: where the language model is here, if not at the recorded name.
        dequantize: ordinary weights: not quantised as in training, and turned into such where they are quantised on disk.
        quantization: how the language model is kept: as in training, "nf4", "int8", or None for its own weights.
        device: where a quantised model is; default: the accelerator if there is one. Others are on the CPU.
    Raises:
        MokaError: the backbone is another than the adapter was trained on.
    """
    return _load_base(run, dtype, backbone, dequantize, quantization, device)[0]


def _load_base(
    run: str | Path,
    dtype: str,
    backbone: str | None,
    dequantize: bool,
    quantization: str | None,
    device: str | None,
) -> tuple[Any, Any]:
    """Return what `load_base` does, and the processor that belongs to it."""
    folder = find_adapter(run)
    saved = AdapterDescription.read(folder)
    trained_on = saved.backbone
    if saved.backbone_relative:
        trained_on = os.path.normpath(folder.absolute() / saved.backbone)
    if saved.backbone_relative and backbone is None and not Path(trained_on).is_dir():
        raise MokaError(
            f"{run} belongs to the backbone in {trained_on}, which is not there: an export of `moka merge` is moved "
            "in full. Copy both folders, or say where the backbone is."
        )
    if quantization == AS_TRAINED:
        quantization = saved.quantization
    if dequantize:
        quantization = None
    if quantization is not None:
        check_quantization(quantization, "quantization")
    own: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    own |= {"kind": saved.kind, "modalities": saved.modalities, "interaction": saved.interaction}
    section = ModelSection(backbone=backbone or trained_on, **own)
    model, processor = build_model(section, device=device)
    if saved.kind == "hf":
        processor.decoding = saved.decoding
    else:
        model.config.fill_token_id = saved.fill_token_id
    found = backbone_fingerprint(model)
    if found != saved.backbone_fingerprint:
        raise MokaError(
            f"{run} was trained on backbone {trained_on!r} (fingerprint {saved.backbone_fingerprint}); "
            f"{section.backbone!r} has {found}. Use the backbone it was trained on."
        )
    if dequantize and saved.kind == "composed" and getattr(model.language_model, "is_quantized", False):
        model.language_model = _dequantized(model.language_model, choose_dtype(dtype))
    return model, processor


def _dequantized(language_model: Any, dtype: torch.dtype) -> Any:
    """The language model with ordinary weights, which can be saved again."""
    language_model = language_model.dequantize(dtype=dtype)
    # transformers 5.23 keeps the conversions of the quantised file, and cannot turn them round when it saves.
    kept = []
    for conversion in getattr(language_model, "_weight_conversions", None) or []:
        try:
            conversion.reverse_transform()
        except NotImplementedError:
            continue
        kept.append(conversion)
    language_model._weight_conversions = kept
    return language_model


def load(
    run: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    backbone: str | None = None,
    dequantize: bool = False,
    quantization: str | None = AS_TRAINED,
) -> LoadedModel:
    """Load a trained run: backbone, encoders, projectors, adapter and processor.

    Args:
        run: a run folder of ``moka train``, an adapter folder, the folder of ``moka merge``, or a name on the Hub.
        device: "cpu", "cuda", ...; default: the accelerator if there is one.
        dtype, backbone, dequantize, quantization: see ``load_base``.
    Raises:
        MokaError: no adapter there; tensors missing, damaged, or of another backbone.
    """
    folder = find_adapter(run)
    device = _device(device)
    read_json(folder / "adapter_config.json")
    saved = check_adapter_folder(str(folder))
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise MokaError(f"{folder} has no {weights.name}; moka.load reads safetensors only. Save the adapter as such.")
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
    # A projector that stays randomly initialised answers fluently and blindly.
    absent = [part for part in AdapterDescription.read(folder).parts if not any(f".{part}." in name for name in names)]
    base, processor = _load_base(folder, dtype, backbone, dequantize, quantization, device)
    if not base_info(base).hf:
        processor = MokaProcessor.from_pretrained(folder)
        processor.teach_end(base)
    try:
        model = PeftModel.from_pretrained(base, str(folder), torch_device=device)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    except KeyError as error:
        raise MokaError(f"{folder}: the weights lack {error}; the file lost tensors. Copy or save it again.") from error
    except RuntimeError as error:
        raise MokaError(
            f"{folder}: the weights do not fit this model ({str(error).splitlines()[-1].strip()}). Use the backbone it was "
            "trained on."
        ) from error
    check_finite(expected, str(folder))
    if isinstance(model.peft_config["default"], MokaConfig):
        # Files of format 1 and paths that moved between versions of transformers have other names than this model.
        match_names({name: tuple(t.shape) for name, t in expected.items()}, {} if saved is None else saved.shapes)
    else:
        absent = sorted(expected.keys() - names)
    if absent:
        raise MokaError(f"{folder}: the weights lack {some(absent)}, which would stay random. Copy or save it again.")
    return LoadedModel(model.to(device).eval(), processor, folder)


def share_equal_weights(models: Sequence[LoadedModel]) -> int:
    """Let models hold their equal tensors once, such as those of one backbone with several adapters; return the bytes saved.

    Only for answering: training one of them would change the others.
    """
    saved, kept = 0, dict[tuple[Any, ...], list[torch.nn.Parameter]]()
    for loaded in models:
        for name, parameter in loaded.model.named_parameters():
            others = kept.setdefault(
                (name.replace(".base_layer", ""), parameter.shape, parameter.dtype, parameter.device), []
            )
            same = next((other for other in others if torch.equal(other, parameter)), None)
            if same is None:
                others.append(parameter)
            elif same.data_ptr() != parameter.data_ptr():
                parameter.data = same.data
                saved += parameter.nbytes
    return saved


def load_ensemble(runs: Sequence[str | Path], **kwargs: Any) -> Ensemble:
    """Load runs that were trained on one modality each, by ``single_modality`` in their ``balance``, as one model.

    Args:
        runs: run folders of ``moka train``.
        kwargs: of `load`.
    Raises:
        MokaError: a run that was trained on all modalities; two of the same one.
    """
    members: dict[str, LoadedModel] = {}
    for run in runs:
        entries = load_config(Path(run) / "config.yaml").balance
        names = [str(entry.get("modality")) for entry in entries if entry.get("name") == "single_modality"]
        if not names:
            raise MokaError(
                f"ensemble: {run} was trained on all modalities. Train a run for each modality, with balance: "
                "[{name: single_modality, modality: ...}]."
            )
        if names[0] in members:
            raise MokaError(f"ensemble: {run} is a second run of {names[0]}; give one run for each modality.")
        members[names[0]] = load(run, **kwargs)
    return Ensemble(members)


def _device(name: str | None) -> str:
    """The accelerator if there is one, or the named device."""
    if name is None:
        return str(default_device())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MokaError(f"device {name!r} cannot be used here ({reason}). Leave it out, or name another.") from error
    return name
