"""The MokA layer.

        x_t [in] ──────────────── W0 (frozen) ───────────────────────────┐
         │                                                               (+)── y_t [out]
         │      A_text   ┐                                                │
         └─ ──  A_visual ├─ z_t [r] ──(+)── z~_t [r] ── B (shared) ── s ──┘
                A_audio  ┘             │
              by the token's      lambda * softmax(z_t . z_j / sqrt(r)) z_j
                modality          over the question's text tokens j; for non-text tokens only

    y_t = W0 x_t + b + s B z~_t,     s = alpha / r

Source: Wei, Miao, Zhou, Hu, "MokA: Multimodal Low-Rank Adaptation for MLLMs", NeurIPS 2025, section 3,
https://arxiv.org/abs/2506.05191.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .config import TEXT, MokaConfig
from .context import active_only, running_call
from .decoding import text_update
from .input_groups import partners
from .ops import add_update, compute_dtype, interact, project
from .quantization import quantization_extra_repr, resolve_quantization_backend
from .routing import Routing, View, uniform_view


class StackedWeight(nn.Module):
    """One adapter's A [M, r, in] or B [out, r]. Calling it returns the weight, complete and on the device.

    A module that is called: accelerate's offloading, ZeRO-3 and FSDP load and gather weights around a module's call.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> torch.Tensor:
        return self.weight

    def local(self) -> nn.Parameter:
        """Return the parameter as it is on this process, perhaps a part of it, for its dtype, device and marks.

        Not by its name: DeepSpeed takes a read outside of this module's call for a use, and then gathers it there only.
        """
        return next(self.parameters())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # torch's own place for older layouts: in format 1 the tensor had the name of this module.
        if prefix[:-1] in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MokaLayer(BaseTunerLayer):
    """Adapter state of one linear map. ``moka_A``: name -> [M, r, in]; ``moka_B``: name -> [out, r], or [M, out, r]
    without sharing. All modalities are stacked in one tensor, so each gets a gradient at every step on every rank."""

    adapter_layer_names = ("moka_A", "moka_B")
    other_param_names = ("moka_r", "moka_alpha", "moka_scaling", "moka_config", "moka_tower")

    def __init__(self, base_layer: nn.Module, model, **kwargs) -> None:
        self.base_layer = base_layer
        self.moka_model = model  # the `RoutedModel` that it is a part of
        # Outside of the decoder: by adapter, the one modality of all of its tokens.
        self.moka_tower: dict[str, str] = {}
        self.moka_group: tuple[MokaLinear, ...] = ()  # layers that read the same input
        self.moka_A = nn.ModuleDict({})
        self.moka_B = nn.ModuleDict({})
        self.moka_r: dict[str, int] = {}
        self.moka_alpha: dict[str, float] = {}
        self.moka_scaling: dict[str, float] = {}
        self.moka_config: dict[str, MokaConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Quantised and tied weights as they were before an adapter was merged.
        self.moka_unmerged: dict[str, tuple[nn.Parameter, dict]] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.kwargs = kwargs
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, alpha: float, config: MokaConfig, tower: str | None = None
    ) -> None:
        """Add an adapter to this layer, with its own rank and alpha; ``tower``: see ``moka_tower``."""
        modalities = len(config.modalities)
        self.moka_r[adapter_name] = r
        self.moka_alpha[adapter_name] = alpha
        self.moka_scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.moka_config[adapter_name] = config
        if tower is not None:
            self.moka_tower[adapter_name] = tower
        shape = (self.out_features, r) if config.share_b else (modalities, self.out_features, r)
        self.moka_A[adapter_name] = StackedWeight(modalities, r, self.in_features)
        self.moka_B[adapter_name] = StackedWeight(*shape)
        self.reset_moka_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.moka_A[adapter_name].train(self.base_layer.training)
        self.moka_B[adapter_name].train(self.base_layer.training)
        self.set_adapter(self.active_adapters)

    def reset_moka_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set A to Kaiming-uniform (a = sqrt(5)) for each modality, and B to zeros, so that the update starts at zero."""
        for modality in self.moka_A[adapter_name].weight:
            nn.init.kaiming_uniform_(modality, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.moka_B[adapter_name].weight)
        else:
            nn.init.normal_(self.moka_B[adapter_name].weight, std=0.02)


class MokaLinear(nn.Module, MokaLayer):
    """A linear map (``nn.Linear``, ``Conv1D``, or a quantised linear) with MokA adapters."""

    def __init__(
        self,
        base_layer,
        adapter_name: str,
        model,
        r: int,
        alpha: float,
        config: MokaConfig,
        tower: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        MokaLayer.__init__(self, base_layer, model, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config, tower=tower)
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [batch, seq, in] (or [batch * seq, in]) -> [..., out], in the dtype of the base layer's result."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        call = running_call(self.moka_model)
        routing = None if call is None else call.routing
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if routing is not None and routing.text_steps is not None and not self.moka_tower:
            return text_update(self, result, x, routing)
        names = self.adapters_in_use()
        if routing is None and names and not self.moka_tower:
            routing = self.moka_model.routing_outside(self, call)
        for name in names:
            view = self.view(name, x, routing)
            z = self._rank_space(name, x, view, call)
            if z is not None:
                result = add_update(result, z, *self._up(name, z, view))
        return result

    def adapters_in_use(self) -> list[str]:
        """Return the adapters of this layer that are active, or, if some are merged, those."""
        return [name for name in (self.merged_adapters or self.active_adapters) if name in self.moka_A]

    def is_merged(self, name: str) -> bool:
        """Return whether the base weight contains this adapter's text path."""
        config = self.moka_config[name]
        return TEXT in config.adapted and (config.text_merged or name in self.merged_adapters)

    def dropout_rate(self, name: str) -> float:
        """Return the probability with which an element of the input is dropped in this call."""
        config = self.moka_config[name]
        return config.dropout if self.training and not self.merged and not config.text_merged else 0.0

    def view(self, name: str, x: torch.Tensor, routing: Routing | None) -> View:
        """Return the tokens of ``x`` as the adapter ``name`` sees them.

        Raises:
            MokaError: ``x`` has other tokens than the routing.
        """
        config = self.moka_config[name]
        if self.moka_tower or routing is None:
            return uniform_view(config, self.moka_tower.get(name, TEXT), active_only(self.moka_model))
        view = routing.view(name, x.device)
        if view.uniform:
            return view
        batch, seq = routing.shape
        if x.dim() == 3 and x.shape[0] == batch and x.shape[1] < seq:
            # The output head, or layers whose keys and values others share, see only the last tokens, or those named.
            n = x.shape[1]
            kept = routing.kept
            positions = torch.arange(seq - n, seq, device=x.device) if kept is None or len(kept) != n else kept
            return view.at(positions.to(x.device), len(config.modalities))
        if math.prod(x.shape[:-1]) != batch * seq:
            raise MokaError(
                f"A MokA layer got {list(x.shape[:-1])} tokens, but the routing of this forward is for [{batch}, {seq}]. "
                "Either a layer outside the language model is adapted (name it in MokaConfig.exclude_modules), or "
                "the model expands media inside (pass the ids of the expanded tokens with moka.routing)."
            )
        return view

    def _rank_space(self, name: str, x: torch.Tensor, view: View, call) -> torch.Tensor | None:
        """Return z~ [tokens, width] of one adapter, less what the base weight contains of it; None: nothing to add."""
        merged = self.is_merged(name)
        text_only = view.rows is None and view.row == self.moka_config[name].text_row
        if view.disabled and not merged:
            return self._zero(name, x)
        if merged and text_only and not view.disabled:
            return None
        together = call is not None and not torch.compiler.is_compiling()
        z = call.shared.pop(self, name, x, view) if together else None
        if z is None:
            layers = partners(self, name) if together else [self]
            z, *others = rank_space(layers, name, x, view)
            if others:
                call.shared.put(layers[1:], name, x, view, others)
        return z

    def _zero(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return zeros that depend on A and B: they get a gradient in every training step on every process."""
        A = self.moka_A[name]() if torch.is_grad_enabled() else None
        if A is None or not A.requires_grad:
            return None
        width = self.moka_r[name] * (1 if self.moka_config[name].share_b else len(A))
        zero = (A.sum() * 0).to(compute_dtype(x))
        return zero.expand(x.shape[:-1].numel(), width)

    def _up(self, name: str, z: torch.Tensor, view: View) -> tuple[torch.Tensor, float]:
        """Return B [out, width] in the dtype of ``z``, and the scale."""
        config, B = self.moka_config[name], self.moka_B[name]()
        if not config.share_b:
            # That of the one modality, or side by side for the slots of z: [out, M * r].
            B = B[view.row] if z.shape[-1] == B.shape[-1] and len(B) > 1 else B.transpose(0, 1).flatten(1)
        return B.to(z.dtype), self.moka_scaling[name] if config.scale_position == "output" else 1.0

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the text path s B A_text as a weight update, float32, in the layout of the base weight."""
        config = self.moka_config[adapter]
        text = config.text_row
        A, B = self.moka_A[adapter].weight, self.moka_B[adapter].weight
        B = B if config.share_b else B[text]  # [out, r]
        delta = (B.float() @ A[text].float()) * self.moka_scaling[adapter]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
        tied: bool = False,
    ) -> list[tuple[float, float]]:
        """Merge the text path into the base weight. Media tokens keep their residual, so no output changes.

        Args:
            safe_merge: refuse an adapter that is not finite.
            adapter_names: default: the active ones.
            requantize: merge into a quantised weight, which rounds it again; the original is kept for ``unmerge``.
            tied: other modules share the base weight, so that this layer gets one of its own.
        Returns:
            For each merge into a quantised weight the error, relative to the weight and to the update.
        Raises:
            MokaError: a quantised base layer without ``requantize``; with ``safe_merge``, an adapter not finite.
        """
        errors = []
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.moka_A:
                continue
            self.check_merge(name, safe_merge, requantize)
            if self._changes_weight(name):
                errors += self._merge_weight(name, tied)
            self.merged_adapters.append(name)
        return errors

    def check_merge(self, name: str, safe_merge: bool, requantize: bool) -> None:
        """Refuse a merge of this adapter before anything changes. Raises: see ``merge``."""
        backend = self.quantization_backend
        if self._changes_weight(name) and backend is not None and not (requantize and backend.supports_merge):
            raise MokaError(_merge_refused(backend))
        if self._changes_weight(name) and safe_merge:
            delta = self.get_delta_weight(name)
            if not torch.isfinite(delta).all():
                raise MokaError(f"Adapter {name!r} has values that are not finite; it was not merged.")
            weight = self._base_weight()
            if backend is None and not torch.isfinite((weight + delta.to(weight.device)).to(weight.dtype)).all():
                raise MokaError(f"With adapter {name!r} a {weight.dtype} weight is not finite; it was not merged.")

    def _changes_weight(self, name: str) -> bool:
        """Return whether merging this adapter changes the base weight."""
        config = self.moka_config[name]
        return TEXT in config.adapted and not config.text_merged

    def _base_weight(self) -> torch.Tensor:
        """Return the base weight, dequantised."""
        base, backend = self.get_base_layer(), self.quantization_backend
        return base.weight.data if backend is None else backend.get_base_weight(base)

    def _merge_weight(self, name: str, tied: bool) -> list[tuple[float, float]]:
        base, delta = self.get_base_layer(), self.get_delta_weight(name).detach()
        if self.quantization_backend is None:
            weight = base.weight.data
            merged = (weight + delta.to(weight.device)).to(weight.dtype)
            if tied:
                self.moka_unmerged[name] = base.weight, {}
                base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
            else:
                base.weight.data = merged
            return []
        base.state_dict()  # bitsandbytes' inference on a CPU packs 4-bit weights in another order; this restores it
        wanted = self._base_weight().float() + delta.to(base.weight.device)
        state = getattr(base, "state", None)  # bitsandbytes keeps the 8-bit scales beside the weight
        self.moka_unmerged[name] = base.weight, {} if state is None else {"state": copy.copy(state)}
        dtype = getattr(base, "compute_dtype", None) or torch.float32
        self.quantization_backend.set_base_weight(self, wanted.to(dtype))
        error = self._base_weight().float() - wanted
        return [((error.norm() / wanted.norm()).item(), (error.norm() / delta.norm()).item())]

    def unmerge(self) -> None:
        """Take the merged text paths out of the base weight; a quantised or tied weight is restored as it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.moka_unmerged:
                base.weight, state = self.moka_unmerged.pop(name)
                base.__dict__.update(state)
            elif name in self.moka_A and self._changes_weight(name):
                weight = base.weight.data
                base.weight.data = (weight - self.get_delta_weight(name).to(weight.device)).to(weight.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Every loader passes here. The weight contains the old text path: unmerging with new tensors would corrupt it
        # (peft#3581).
        for name in self.merged_adapters:
            if any(key.startswith(f"{prefix}moka_") and f".{name}." in key[len(prefix) :] for key in state_dict):
                raise MokaError(
                    f"load_adapter: adapter {name!r} is merged into the weights. Call unmerge_adapter() first, or load "
                    "under another adapter name."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return "moka." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def rank_space(layers: list[MokaLinear], name: str, x: torch.Tensor, view: View) -> list[torch.Tensor]:
    """Return z~ [tokens, r] of one adapter for each of ``layers``, which read the same ``x`` [..., in].

    With ``share_b=False`` each token's z~ is in its modality's slot, [tokens, M * r]. If the text path is merged, z~ lacks
    what the base weight contains: A_text x.
    """
    layer = layers[0]
    config, r, n = layer.moka_config[name], layer.moka_r[name], len(layers)
    x = x.to(compute_dtype(x))
    text = config.text_row
    merged = layer.is_merged(name)
    rows = slice(None) if view.rows is not None or merged else slice(view.row, view.row + 1)
    A = [own.moka_A[name]()[rows] for own in layers]  # [M, r, in] each, or [1, r, in]
    A = (A[0] if n == 1 else torch.cat(A, dim=1)).to(x.dtype)  # [M, n * r, in]
    z_all = project(x, A.flatten(0, 1), layer.dropout_rate(name))  # [tokens, M * n * r]
    tokens = len(z_all)
    z = z_all
    if view.rows is not None:
        z = z_all.view(-1, n * r).index_select(0, view.index)  # [tokens, n * r]
    elif merged:
        z = z_all.view(tokens, -1, n * r)[:, view.row]
    factor = layer.moka_scaling[name] if config.scale_position == "input" else 1.0
    z = z if factor == 1 else z * factor
    if view.disabled:
        z = torch.zeros_like(z)
    elif view.adapter_mask is not None:
        z = z * view.adapter_mask
    if view.attention is not None:
        z = interact(z, view.attention, n, config.interaction == "mean")
    z_text = z_all.view(tokens, -1, n * r)[:, text] * factor if merged else None
    if not config.share_b and (view.rows is not None or merged):
        return [_slots(own, view, config, None if part is None else part) for own, part in _split(z, z_text, n, r)]
    z = z if z_text is None else z - z_text
    return [z] if n == 1 else list(z.view(tokens, n, r).unbind(1))


def _split(z: torch.Tensor, z_text: torch.Tensor | None, n: int, r: int):
    """[tokens, n * r] each -> n pairs of [tokens, r]."""
    own = z.view(-1, n, r).unbind(1)
    text = [None] * n if z_text is None else z_text.reshape(-1, n, r).unbind(1)
    return zip(own, text, strict=True)


def _slots(z: torch.Tensor, view: View, config: MokaConfig, z_text: torch.Tensor | None) -> torch.Tensor:
    """[tokens, r] -> [tokens, M * r]: each token's z in its modality's slot, and minus ``z_text`` in that of text."""
    modalities, r = len(config.modalities), z.shape[1]
    if view.rows is None:
        index = torch.arange(len(z), device=z.device) * modalities + view.row
    else:
        index = view.index
    slots = z.new_zeros(len(z) * modalities, r).index_copy(0, index, z).view(len(z), modalities, r)
    if z_text is not None:
        text = torch.zeros(modalities, 1, dtype=z.dtype, device=z.device)
        text[config.text_row] = 1
        slots = slots - text * z_text[:, None]
    return slots.flatten(1)


def _merge_refused(backend) -> str:
    """Return why a merge into a quantised weight is refused."""
    if not backend.supports_merge:
        return f"A {backend.backend_name} weight cannot be merged into. Load the backbone unquantised, then merge."
    return (
        f"Merging into a {backend.backend_name} weight would round it again. Dequantise the backbone first "
        "(model.dequantize()), then load the adapter and merge; or ask for it by name with requantize=True, which prints "
        "how large the error is."
    )
