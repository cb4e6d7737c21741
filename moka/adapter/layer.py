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
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .config import TEXT, MokaConfig
from .context import active_only, current, running_call
from .decoding import text_update
from .input_groups import partners
from .ops import add_update, compute_dtype, interact, project
from .quantization import quantization_extra_repr, resolve_quantization_backend
from .rivals.imod import relative_depth
from .routing import Routing, View, uniform_view

if TYPE_CHECKING:
    from .context import Call
    from .wrapping import RoutedModel


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
        return next(iter(self._parameters.values()))  # type: ignore[return-value]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # torch's own place for older layouts: in format 1 the tensor had the name of this module.
        if prefix[:-1] in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MokaLinear(nn.Module, BaseTunerLayer):
    """A linear map (``nn.Linear``, ``Conv1D``, or a quantised linear) with MokA adapters.

    ``moka_A``: name -> [M, r, in]; ``moka_B``: name -> [out, r], or [M, out, r] without sharing. All modalities are stacked in
    one tensor, so each gets a gradient at every step on every rank. Methods other than MokA stack their own numbers of matrices,
    and may have ``moka_gate``: name -> [rows, in].

    Args:
        base_layer: the frozen layer, or a layer of another adapter around it.
        model: the `RoutedModel` that it becomes a part of.
        path: its name in the model.
        kwargs: settings of peft's quantisation backend.
    """

    adapter_layer_names = ("moka_A", "moka_B", "moka_gate")
    # Each is called with (layer, adapter name, x, z~ [tokens, width], view, result) in forwards that keep a graph.
    moka_observers: tuple[Any, ...] = ()
    other_param_names = (
        *("moka_r", "moka_alpha", "moka_scaling", "moka_dropout", "moka_config", "moka_tower", "moka_masks"),
    )

    def __init__(self, base_layer: nn.Module, model: RoutedModel, path: str = "", **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moka_model = model
        self.moka_group: tuple[MokaLinear, ...] = ()  # layers that read the same input
        self.moka_A: Any = nn.ModuleDict({})  # name -> StackedWeight
        self.moka_B: Any = nn.ModuleDict({})
        self.moka_gate: Any = nn.ModuleDict({})
        self.moka_dropout: Any = nn.ModuleDict({})  # trainers look for modules to set their rate to 0
        self.moka_r: dict[str, int] = {}
        self.moka_alpha: dict[str, float] = {}
        self.moka_scaling: dict[str, float] = {}
        self.moka_config: dict[str, MokaConfig] = {}
        # Outside of the decoder: by adapter, the one modality of all of its tokens.
        self.moka_tower: dict[str, str] = {}
        self.moka_path, self.moka_depth = path, relative_depth(model.root, path)
        self.moka_masks: dict[str, torch.Tensor] = {}  # IMoD's
        self.moka_constant = True  # the text path of every adapter is a constant matrix
        # Quantised and tied weights as they were before an adapter was merged.
        self.moka_unmerged: dict[str, tuple[Any, dict]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        base: Any = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.kwargs = kwargs
        sizes: Any = _get_in_out_features(base)
        self.in_features, self.out_features = sizes
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, r: int, alpha: float, config: MokaConfig, tower: str | None = None
    ) -> None:
        """Add an adapter to this layer, with its own rank and alpha; ``tower``: see ``moka_tower``."""
        self.moka_r[adapter_name] = r
        self.moka_alpha[adapter_name] = alpha
        self.moka_scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.moka_config[adapter_name] = config
        if tower is not None:
            self.moka_tower[adapter_name] = tower
        self.moka_constant = self.moka_constant and (config.rival is None or config.rival.mergeable)
        shapes = config.tensor_shapes(r, self.in_features, self.out_features)
        self.moka_A[adapter_name] = A = StackedWeight(*shapes["moka_A"])
        self.moka_B[adapter_name] = B = StackedWeight(*shapes["moka_B"])
        if "moka_gate" in shapes:
            self.moka_gate[adapter_name] = gate = StackedWeight(*shapes["moka_gate"])
            nn.init.kaiming_uniform_(gate.weight, a=math.sqrt(5))
        self.moka_dropout[adapter_name] = nn.Dropout(config.dropout)
        for matrix in A.weight:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(B.weight)
        else:
            nn.init.normal_(B.weight, std=0.02)
        self.train(self.base_layer.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [batch, seq, in] (or [batch * seq, in]) -> [..., out], in the dtype of the base layer's result."""
        call = current.call
        if call is not None and call.model is not self.moka_model:
            call = running_call(self.moka_model)
        routing = None if call is None else call.routing
        if routing is not None and routing.merged:  # decoding text whose path is in the weight
            base = self._modules["base_layer"]
            # Hundreds of such calls are made for a token: nn.Module's own lookup and call cost 2 % of it on a CPU.
            if args or kwargs or base._forward_hooks or base._forward_pre_hooks:  # type: ignore[union-attr]
                return base(x, *args, **kwargs)  # type: ignore[misc]
            return base.forward(x)  # type: ignore[union-attr]
        if self._disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if routing is not None and routing.text_steps is not None and self.moka_constant and not self.moka_tower:
            return text_update(self, result, x, routing)
        names = self.adapters_in_use()
        if routing is None and names and not self.moka_tower:
            routing = self.moka_model.routing_outside(self, call)
        for name in names:
            view = self.view(name, x, routing)
            z = self._rank_space(name, x, view, call)
            if z is not None:
                result = add_update(result, z, *self._up(name, z, view))
                if self.moka_observers and result.requires_grad:
                    for observe in self.moka_observers:
                        observe(self, name, x, z, view, result)
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
        dropout = self.moka_dropout[name]
        drops = dropout.training and not self.merged and not self.moka_config[name].text_merged
        return dropout.p if drops else 0.0

    def view(self, name: str, x: torch.Tensor, routing: Routing | None) -> View:
        """Return the tokens of ``x`` as the adapter ``name`` sees them.

        Raises:
            MokaError: ``x`` has other tokens than the routing.
        """
        config = self.moka_config[name]
        if self.moka_tower or routing is None or routing.text_steps is not None:
            return uniform_view(config, self.moka_tower.get(name, TEXT), active_only(self.moka_model))
        view = routing.view(name, x.device)
        if view.uniform and view.valid is None:
            return view
        batch, seq = routing.shape
        if x.dim() == 3 and x.shape[0] == batch and x.shape[1] < seq and self.moka_model.knows_layers:
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

    def _rank_space(self, name: str, x: torch.Tensor, view: View, call: Call | None) -> torch.Tensor | None:
        """Return z~ [tokens, width] of one adapter, less what the base weight contains of it; None: nothing to add."""
        merged, config = self.is_merged(name), self.moka_config[name]
        text_only = view.rows is None and view.row == config.text_row
        if view.disabled and not merged:
            return self._zero(name, x)
        if config.rival is not None:
            same = text_only or (view.adapter_mask is None and not config.rival.by_modality)
            return None if merged and same and not view.disabled else config.rival.rank_space(self, name, x, view)
        if merged and text_only and not view.disabled:
            return None
        # A compiler finds by itself what can be computed together.
        shared = None if call is None or torch.compiler.is_compiling() else call.shared
        z = None if shared is None else shared.pop(self, name, x, view)
        if z is None:
            layers = [self] if shared is None else partners(self, name)
            z, *others = rank_space(layers, name, x, view)
            if shared is not None and others:
                shared.put(layers[1:], name, x, view, others)
        return z

    def _zero(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return zeros that depend on A and B: they get a gradient in every training step on every process."""
        A = self.moka_A[name]() if torch.is_grad_enabled() else None
        if A is None or not A.requires_grad:
            return None
        zero = A.sum() * 0
        if name in self.moka_gate:
            zero = zero + self.moka_gate[name]().sum() * 0
        config = self.moka_config[name]
        shape = config.tensor_shapes(self.moka_r[name], self.in_features, self.out_features)["moka_B"]
        width = self.moka_r[name] * (1 if len(shape) == 2 else shape[0])
        return zero.to(compute_dtype(x)).expand(x.shape[:-1].numel(), width)

    def _up(self, name: str, z: torch.Tensor, view: View) -> tuple[torch.Tensor, float]:
        """Return B [out, width] in the dtype of ``z``, and the scale."""
        config, B = self.moka_config[name], self.moka_B[name]()
        if config.rival is not None:
            B = B.transpose(0, 1).flatten(1)
        elif not config.share_b:
            # That of the one modality, or side by side for the slots of z: [out, M * r].
            B = B[view.row] if z.shape[-1] == B.shape[-1] and len(B) > 1 else B.transpose(0, 1).flatten(1)
        return B.to(z.dtype), self.moka_scaling[name] if config.scale_position == "output" else 1.0

    def text_path(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the constant path of text tokens, A [width, in] and B [out, width]."""
        config, A, B = self.moka_config[name], self.moka_A[name](), self.moka_B[name]()
        row = config.text_row
        if config.rival is not None:
            return config.rival.text_path(A, B, row)
        return A[row], B if config.share_b else B[row]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the text path s B A_text as a weight update, float32, in the layout of the base weight."""
        A, B = self.text_path(adapter)
        delta = (B.float() @ A.float()) * self.moka_scaling[adapter]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(  # type: ignore[override]
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
            MokaError: a quantised base layer without ``requantize``; with ``safe_merge``, an adapter not finite; a method with a gate.
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
        rival = self.moka_config[name].rival
        if rival is not None and not rival.mergeable:
            raise MokaError(
                f"Adapter {name!r} cannot be merged: method {rival.name} weighs its matrices by a gate at every token, so its "
                "update is no constant matrix. Keep it as an adapter, or train a method that merges, such as moka or imod."
            )
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

    def _base(self) -> Any:
        return self.get_base_layer()

    def _base_weight(self) -> torch.Tensor:
        """Return the base weight, dequantised."""
        base, backend = self._base(), self.quantization_backend
        return base.weight.data if backend is None else backend.get_base_weight(base)

    def _merge_weight(self, name: str, tied: bool) -> list[tuple[float, float]]:
        base, delta = self._base(), self.get_delta_weight(name).detach()
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
        state = getattr(base, "state", None)  # bitsandbytes keeps the 8-bit scales next to the weight
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
        base = self._base()
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
    layer, n = layers[0], len(layers)
    config, r, merged = layer.moka_config[name], layer.moka_r[name], layer.is_merged(name)
    factor = layer.moka_scaling[name] if config.scale_position == "input" else 1.0
    x = x.to(compute_dtype(x))
    several = view.rows is not None or merged  # rows of moka_A are needed
    rows = slice(None) if several else slice(view.row, view.row + 1)
    stacked = [own.moka_A[name]()[rows] for own in layers]  # [M, r, in] each
    A = stacked[0] if n == 1 else torch.cat(stacked, dim=1)
    z_all = project(x, A.flatten(0, 1).to(x.dtype), layer.dropout_rate(name))  # [tokens, M * n * r]
    z_all = (z_all * factor if factor != 1 else z_all).view(len(z_all), -1, n * r)
    z = z_all[:, view.row if several else 0]
    if view.index is not None:
        z = z_all.flatten(0, 1).index_select(0, view.index)  # [tokens, n * r]
    if view.disabled:
        z = torch.zeros_like(z)
    elif view.adapter_mask is not None:
        z = z * view.adapter_mask
    if view.attention is not None:
        z = interact(z, view.attention, n, config.interaction == "mean")
    z_text = z_all[:, config.text_row] if merged else None
    if several and not config.share_b:
        z = _slots(z, z_text, view, config, n)
    elif z_text is not None:
        z = z - z_text
    return [z] if n == 1 else list(z.view(len(z), n, -1).unbind(1))


def _slots(z: torch.Tensor, z_text: torch.Tensor | None, view: View, config: MokaConfig, n: int) -> torch.Tensor:
    """[tokens, n * r] -> [tokens, n * M * r]: each token's z in its modality's slot, and minus ``z_text`` in that of text."""
    tokens, modalities, width = len(z), len(config.modalities), z.shape[1]
    index = view.index
    if index is None:
        index = torch.arange(tokens, device=z.device) * modalities + view.row
    slots = z.new_zeros(tokens * modalities, width).index_copy(0, index, z).view(tokens, modalities, width)
    if z_text is not None:
        text = torch.zeros(modalities, 1, dtype=z.dtype, device=z.device)
        text[config.text_row] = 1
        slots = slots - text * z_text[:, None]
    return slots.view(tokens, modalities, n, -1).transpose(1, 2).flatten(1)


def _merge_refused(backend) -> str:
    """Return why a merge into a quantised weight is refused."""
    if not backend.supports_merge:
        return f"A {backend.backend_name} weight cannot be merged into. Load the backbone unquantised, then merge."
    return (
        f"Merging into a {backend.backend_name} weight would round it again. Dequantise the backbone first "
        "(model.dequantize()), then load the adapter and merge; or ask for it by name with requantize=True, which prints "
        "how large the error is."
    )
