"""The composed multimodal LLM: encoder -> projector -> placeholder positions of the embeddings -> language model."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moka.adapter.inputs import CACHE, cache_of
from moka.errors import MokaError

from .configuration import MokaModelConfig
from .encoders import CachedEncoder, build_encoder, features_name
from .language_models import HUB_ARGUMENTS, create_language_model, load_language_model
from .logits import HeadCut, logits_at, shifted, supervised_places
from .placeholders import media_positions
from .positions import flash_lengths, grid_positions, restarted, samples_begin
from .projectors import build_projector
from .quantization import load_quantized, mark_quantized
from .sharding import full_shape, full_tensor, is_sharded, without_sharding

# Keywords of ``forward`` and ``generate``: the inputs of encoders, and the features that encoders make of them.
MEDIA_INPUTS = ("pixel_values", "input_features", "image_features", "audio_features")


class MokaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Any decoder-only language model with an encoder and a projector for each medium.

    The adapter attaches as to any model: ``get_peft_model(model, MokaConfig(...))``.
    """

    config_class = MokaModelConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Small, newly trained, or fed with raw media: float32 also with a bfloat16 backbone.
    _keep_in_fp32_modules_strict = ["encoders", "projectors"]
    # Of the language model's linear layers, if we quantised them: one of `QUANTIZATIONS`.
    quantization: str | None = None

    def __init__(
        self,
        config: MokaModelConfig,
        language_model: PreTrainedModel | None = None,
        encoders: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(config)
        self._has_loaded_parts = language_model is not None
        self._fingerprint: str | None = None
        self._counted: int | None = None
        self._head_cut = HeadCut()
        self.language_model = language_model or create_language_model(config.text_config)
        self.encoders = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        width = config.text_config.hidden_size
        for name, spec in config.modalities.items():
            encoder = (encoders or {}).get(name) or build_encoder(spec["encoder"], pretrained=False)
            self.encoders[name] = encoder
            self.projectors[name] = build_projector(spec["projector"], encoder.num_tokens, encoder.width, width)
        inputs = [encoder.input_name for encoder in self.encoders.values()]
        if len(set(inputs)) < len(inputs):
            raise MokaError(
                f"modalities: two encoders take the same input ({inputs}); use encoders of different media."
            )
        self.generation_config = copy.deepcopy(self.language_model.generation_config)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        modalities: dict[str, dict],
        *,
        name: str | None = None,
        pretrained: bool = True,
        quantization: str | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> MokaForConditionalGeneration:
        """Compose a model around a causal language model on disk or on the hub.

        Args:
            backbone: folder or hub name, read by ``AutoModelForCausalLM.from_pretrained``; of a Qwen2.5-VL checkpoint
                only the language model is read.
            modalities: see ``MokaModelConfig``.
            name: what to record as the backbone's name, if it differs from its folder.
            pretrained: load published encoders' weights (False: only their configuration).
            quantization: "nf4" or "int8": quantise the language model's linear layers as they are read (needs ``dtype``).
            device: of a quantised model; default: this process's GPU if there is one. Others are built on the CPU.
            kwargs: for ``AutoModelForCausalLM.from_pretrained`` (dtype, quantization_config, ...).
        """
        if quantization is None:
            language_model = load_language_model(backbone, **kwargs)
        else:
            language_model = load_quantized(backbone, quantization, device=device, **kwargs)
        config = MokaModelConfig(language_model.config, modalities, backbone=name or str(backbone))
        with without_sharding():
            encoders = {n: build_encoder(s["encoder"], pretrained=pretrained) for n, s in config.modalities.items()}
        for modality, encoder in encoders.items():
            config.modalities[modality]["encoder"] = encoder.to_dict()
        bos = language_model.config.bos_token_id
        config.fill_token_id = bos if isinstance(bos, int) else 0
        model = cls(config, language_model, encoders)
        if quantization is not None:
            mark_quantized(model, quantization)
            # Mapped from the files, of which a few numbers are read.
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            model._fingerprint = fingerprint(load_language_model(backbone, dtype="auto", **hub))
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained`, which makes new parameters; frozen encoders are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        for encoder in model.encoders.values():
            encoder.freeze()
        return loaded

    def initialize_weights(self) -> None:
        # Parts that come with their weights must keep them.
        if not self._has_loaded_parts:
            super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Encoders and projectors initialise themselves; the language model has its own rule."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def derive_type_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return ``mm_token_type_ids`` [batch, seq] from the placeholder ids, which follow the vocabulary."""
        return (input_ids - (self.config.vocab_size - 1)).clamp(min=0)

    def encode_media(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """values [items, ...] of one modality -> tokens of the language model [items, tokens, hidden]."""
        encoder = self.encoders[name]
        # Of a cached encoder the values are the features; no module runs in its place, on no process.
        features = values if isinstance(encoder, CachedEncoder) else encoder(values)
        return self.projectors[name](features)

    def merge_embeddings(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None,
        **media: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed the tokens and put media features at their placeholders' positions: [batch, seq, hidden].

        Of each modality ``media`` has either the inputs of its encoder, or the encoder's features. Type ids (None: those
        of the placeholder ids) that are not in host memory are read back.

        Raises:
            MokaError: more or fewer placeholders than the given media fill.
        """
        types = self.derive_type_ids(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        known = {name: media.get(features_name(encoder)) for name, encoder in self.encoders.items()}
        values = {n: media.get(self.encoders[n].input_name) if known[n] is None else known[n] for n in known}
        given = {n: (0 if v is None else v.shape[0], self.projectors[n].num_tokens) for n, v in values.items()}
        positions = media_positions(types, self.config.type_ids, given, input_ids.device)
        # The ids of placeholders follow the vocabulary, and have no embedding.
        text = input_ids.masked_fill(types.to(input_ids.device, non_blocking=True) > 0, 0)
        embeds = self.get_input_embeddings()(text)  # [batch, seq, hidden]
        for name, value in values.items():
            encoder, projector = self.encoders[name], self.projectors[name]
            if given[name][0] and value is not None:
                value = value.to(embeds.device)
                # [items, tokens, hidden]
                features = self.encode_media(name, value) if known[name] is None else projector(value)
                flat = embeds.flatten(0, 1).index_copy(0, positions[name], features.flatten(0, 1).to(embeds.dtype))
                embeds = flat.view_as(embeds)
            elif (self.training and torch.is_grad_enabled()) or is_sharded(encoder) or is_sharded(projector):
                # Every rank touches every encoder and projector in every step, or DDP and ZeRO-3 never end their wait.
                dummy = torch.zeros_like(encoder.dummy_input(), device=embeds.device)
                embeds = embeds + 0.0 * self.encode_media(name, dummy).sum().to(embeds.dtype)
        return embeds

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.LongTensor | None = None,
        interaction_ids: torch.LongTensor | None = None,
        question_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss with ``labels``.

        Args:
            input_ids: [batch, seq]; placeholders have ids that follow the vocabulary, or any id if
                their ``mm_token_type_ids`` are given.
            mm_token_type_ids: [batch, seq] 0 text, 1 image, 2 video, 3 audio.
            interaction_ids, question_mask: [batch, seq], for a MokA adapter; without one they have no effect.
            pixel_values: [pictures and frames, ...] of all rows, in order of appearance.
            input_features: [sounds, ...] likewise.
            image_features, audio_features: [items, tokens, width] the features of pictures or sound that an encoder made,
                instead of ``pixel_values`` or ``input_features``.
            position_ids: [batch, seq]; a row in which they restart at 0 has several samples, of which none attends to
                another (``moka.data.packing``).
            prompt_embeds: [batch, prompt, hidden] the merged embeddings of the full prompt (``generate`` makes them).
            loss_only: give the loss without logits, and compute them for no position that has no label.

        With labels in training the logits are only those of the supervised positions, row after row: [1, positions,
        vocabulary]; in evaluation of all positions.
        """
        past_key_values = cache_of({"past_key_values": past_key_values, "cache": kwargs.pop("cache", None)})
        types, merges = mm_token_type_ids, inputs_embeds is None and prompt_embeds is None
        if inputs_embeds is None and input_ids is None:
            raise MokaError("forward: pass input_ids or inputs_embeds.")
        if types is None and input_ids is not None and (merges or self.config.uses_grid_positions):
            types = self.derive_type_ids(input_ids)
        at_labels = (self.training or loss_only) and isinstance(logits_to_keep, int) and logits_to_keep == 0
        types_on_host, supervised, begins = _read_back(
            types if merges else None,
            labels if at_labels else None,
            position_ids if past_key_values is None else None,
            attention_mask,
        )
        if merges:
            inputs_embeds = self.merge_embeddings(
                input_ids,
                types_on_host,
                pixel_values=pixel_values,
                input_features=input_features,
                image_features=image_features,
                audio_features=audio_features,
            )
        elif inputs_embeds is None:
            inputs_embeds = self._continue_prompt(input_ids, prompt_embeds, past_key_values)
        placed = self._placed(inputs_embeds, types, begins, position_ids, attention_mask, past_key_values)
        targets = None
        if labels is not None:
            targets = shifted(labels)  # [batch, seq] what each position predicts
            if use_cache is None and past_key_values is None:
                use_cache = False  # the language model's own default would copy all keys and values, which are not used
            if supervised is not None:
                targets = targets.flatten().index_select(0, supervised)  # [positions]
        num_items = kwargs.pop("num_items_in_batch", None)
        with self._head_cut.at(self.get_output_embeddings(), supervised, inputs_embeds):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                logits_to_keep=logits_to_keep,
                **{**kwargs, CACHE: past_key_values, "use_cache": use_cache, **placed, "return_dict": True},
            )
        cache = getattr(outputs, CACHE)
        if self.config.uses_grid_positions and cache is not None:
            # A picture takes fewer positions than it has tokens, so the next one does not follow from the length of the cache.
            positions = placed["position_ids"]
            rows = positions if positions.dim() == 2 else positions[-3:].amax(0)  # [batch, seq]
            cache.next_position = rows.amax(-1) + 1  # [batch]
        if supervised is not None:
            outputs["logits"] = logits_at(outputs.logits, supervised, inputs_embeds)  # [1, positions, vocabulary]
        if targets is not None:
            outputs["loss"] = self.loss_function(
                logits=outputs.logits,
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items,
            )
        return CausalLMOutputWithPast(loss=outputs.loss) if loss_only else outputs

    def _placed(
        self,
        embeds: torch.Tensor,
        types: torch.Tensor | None,
        begins: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        mask: Any,
        cache: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the language model for the positions of the tokens of ``embeds`` [batch, seq, hidden].

        ``begins`` [batch, seq] in host memory, or None: where the samples of a packed row begin.
        """
        if begins is None:
            if position_ids is None and self.config.uses_grid_positions:
                position_ids = self._grid_positions(embeds, types, mask, cache)
            elif position_ids is None and cache is None and _is_mask(mask, embeds):
                position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
            return {"position_ids": position_ids, "attention_mask": mask}
        flash = "flash" in str(self.language_model.config._attn_implementation)
        lengths = flash_lengths(begins, embeds.device) if flash else {}
        begins = begins.to(embeds.device, non_blocking=True)
        # transformers keeps the samples apart by these positions, if it gets no mask of padding and no cache.
        position_ids = position_ids.masked_fill(begins, 0)
        if self.config.uses_grid_positions:
            grids = self._grid_positions(embeds, types, mask, None)
            position_ids = torch.cat([position_ids[None], restarted(grids, begins)])  # [4, batch, seq]
        return {"position_ids": position_ids, "attention_mask": None, "use_cache": False, **lengths}

    def _grid_positions(
        self, tokens: torch.Tensor, types: torch.Tensor | None, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """Return positions [3, batch, seq] of ``tokens`` [batch, seq, ...], which follow those in the cache."""
        (batch, seq), past = tokens.shape[:2], int(cache.get_seq_length()) if cache is not None else 0
        valid = torch.ones(batch, seq, dtype=torch.long, device=tokens.device)
        counted = torch.full((batch,), past, device=tokens.device)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            is_full = mask.shape[1] >= past + seq  # or of these tokens only
            valid = mask[:, past : past + seq] if is_full else mask[:, -seq:]
            counted = mask[:, :past].sum(-1) if is_full else counted
        types = torch.zeros_like(valid) if types is None else types.to(tokens.device)[:, -seq:]
        grids = []
        for name, spec in self.config.modalities.items():
            grid = getattr(self.encoders[name], "grid", None)
            if grid is not None and grid[0] * grid[1] == self.projectors[name].num_tokens:
                grids.append((spec["type_ids"], grid))
        start = getattr(cache, "next_position", None) if past else None
        start = counted if start is None else start.repeat_interleave(batch // len(start))
        return grid_positions(types, valid, grids) + start[:, None]

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        """Override: the first step of ``GenerationMixin`` asks here, and knows no grid; later steps count from its last."""
        if not self.config.uses_grid_positions:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        types, mask, cache = (
            *(model_kwargs.get(n) for n in ("mm_token_type_ids", "attention_mask")),
            cache_of(model_kwargs),
        )
        has_all = mask is None or mask.shape[1] == inputs_tensor.shape[1]
        return self._grid_positions(inputs_tensor, types, mask, None if has_all else cache)

    def _continue_prompt(self, input_ids: torch.Tensor, prompt_embeds: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return embeddings of the tokens of one generation step: those of the prompt, then those of the decoded ids."""
        start = int(cache.get_seq_length()) if cache is not None else 0
        if start >= prompt_embeds.shape[1]:
            return self.get_input_embeddings()(input_ids).to(prompt_embeds.dtype)
        prompt = prompt_embeds[:, start : start + input_ids.shape[1]]
        decoded = input_ids[:, prompt.shape[1] :]
        return torch.cat([prompt, self.get_input_embeddings()(decoded).to(prompt.dtype)], dim=1)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ):
        """Generate as ``GenerationMixin.generate`` does, also from the media inputs of ``forward``.

        Media are encoded once; beams, chunked prefill and caches share the result.
        """
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        kwargs.pop("labels", None)  # of a batch of the processor; there is no loss here
        if input_ids is None:
            raise MokaError("generate: pass input_ids, as MokaProcessor makes them.")
        embeds = self.merge_embeddings(input_ids, mm_token_type_ids, **media)
        types = mm_token_type_ids if mm_token_type_ids is not None else self.derive_type_ids(input_ids)
        types = types.to(input_ids.device)
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        if cache is not None and mask is not None and mask.shape[1] > input_ids.shape[1]:
            # These are only the tokens of a new turn; positions count from the start of the chat.
            embeds = nn.functional.pad(embeds, (0, 0, int(cache.get_seq_length()), 0))
        return super().generate(
            input_ids=input_ids.masked_fill(types > 0, self.config.fill_token_id),
            prompt_embeds=embeds,
            mm_token_type_ids=types,
            **kwargs,
        )

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Estimate the floating point operations of a training step, as transformers does.

        The parameters are counted once: a trainer asks at every step.
        """
        if self._counted is None:
            self._counted = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * input_dict["input_ids"].numel() * self._counted

    def backbone_fingerprint(self) -> str:
        """Return a short hash of the language model's shape and a sample of its weights, to recognise it again.

        Of partitioned weights (ZeRO-3, FSDP) every process has to ask first; later a single one may. ``quantization`` does not
        change it: it is that of the weights before.
        """
        if self.quantization is None and not is_sharded(self.language_model):
            return fingerprint(self.language_model)
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.language_model)
        return self._fingerprint


def fingerprint(model: nn.Module) -> str:
    """Return sha256 (16 hex digits) over parameter names, shapes, and a few values of each, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".moka_" in name or ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        flat = full_tensor(tensor).detach().flatten()
        # Rounded, so that a backbone trained in bfloat16 and loaded in float32 is the same.
        values = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{list(full_shape(tensor))}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.compiler.disable  # the results depend on the data: found outside of any graph
def _read_back(
    types: torch.Tensor | None, labels: torch.Tensor | None, position_ids: torch.Tensor | None, mask: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Read from the device all values that a forward depends on, before it queues work there: the host waits for each.

    Args:
        types, labels: [batch, seq]; None: not asked for.
        position_ids: [batch, seq], or of another shape, in which rows are not packed.
        mask: [batch, seq], 0 at padding, or another kind of mask.
    Returns:
        types in host memory; `supervised_places` of the labels, on their device; `samples_begin` in host memory. Each may
        be None.
    """
    types = None if types is None else types.cpu()
    places = None if labels is None else supervised_places(labels.cpu()).to(labels.device, non_blocking=True)
    if position_ids is None or position_ids.dim() != 2:
        return types, places, None
    is_padding = isinstance(mask, torch.Tensor) and mask.shape == position_ids.shape
    return types, places, samples_begin(position_ids.cpu(), mask.cpu() if is_padding else mask)


def _is_mask(mask: Any, embeds: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == embeds.shape[1]


AutoConfig.register("moka", MokaModelConfig)
AutoModel.register(MokaModelConfig, MokaForConditionalGeneration)
