"""The MokA layer.

        x_t [in] ──────────────── W0 (frozen) ───────────────────────────┐
         │                                                               (+)── y_t [out]
         │      A_text   ┐                                                │
         └─ ──  A_visual ├─ z_t [r] ──(+)── z~_t [r] ── B (shared) ── s ──┘
                A_audio  ┘             │
              by the token's      lambda * softmax(z_t . z_j / sqrt(r)) z_j
                modality          over the question's text tokens j; for non-text tokens only

    y_t = W0 x_t + b + s B z~_t,     s = alpha / r        (padding: y_t = W0 x_t + b)

Source: Wei, Miao, Zhou, Hu, "MokA: Multimodal Low-Rank Adaptation for MLLMs", NeurIPS 2025, section 3,
https://arxiv.org/abs/2506.05191.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka.errors import MokaError

from .config import TEXT, MokaConfig
from .interaction import interact
from .kernels import compute_dtype, fused, has_hooks, up
from .routing import View
from .selection import select
from .shared import rank_space

# z~ [tokens, width], B [out, width] and the scale of one adapter's update.
Update = tuple[torch.Tensor, torch.Tensor, float]


class MokaLayer(BaseTunerLayer):
    """Adapter state of one linear map. ``moka_A``: name -> [M, r, in]; ``moka_B``: name -> [out, r], or [M, out, r]
    without sharing. All modalities are stacked in one tensor, so each gets a gradient at every step on every rank."""

    adapter_layer_names = ("moka_A", "moka_B")
    other_param_names = ("moka_r", "moka_alpha", "moka_scaling", "moka_dropout", "moka_config")

    def __init__(self, base_layer: nn.Module, router, **kwargs) -> None:
        self.base_layer = base_layer
        self.moka_router = router
        self.moka_A = nn.ParameterDict({})
        self.moka_B = nn.ParameterDict({})
        self.moka_dropout = nn.ModuleDict({})
        self.moka_r: dict[str, int] = {}
        self.moka_alpha: dict[str, float] = {}
        self.moka_scaling: dict[str, float] = {}
        self.moka_config: dict[str, MokaConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Quantised and tied weights as they were before an adapter was merged.
        self.moka_unfolded: dict[str, tuple[nn.Parameter, dict]] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.kwargs = kwargs
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, alpha: float, config: MokaConfig, inference_mode: bool = False, **kwargs
    ) -> None:
        """Add the adapter called ``adapter_name`` to this layer, with its own rank and alpha."""
        if r <= 0:
            raise MokaError(f"r: the rank must be a positive integer, got {r!r}.")
        modalities = len(config.modalities)
        self.moka_r[adapter_name] = r
        self.moka_alpha[adapter_name] = alpha
        self.moka_scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.moka_config[adapter_name] = config
        self.moka_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        b_shape = (self.out_features, r) if config.share_b else (modalities, self.out_features, r)
        self.moka_A[adapter_name] = nn.Parameter(torch.empty(modalities, r, self.in_features))
        self.moka_B[adapter_name] = nn.Parameter(torch.empty(b_shape))
        self.reset_moka_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_moka_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """A: Kaiming-uniform (a = sqrt(5)) for each modality; B: zeros, so that the update starts at zero."""
        for modality in self.moka_A[adapter_name]:
            nn.init.kaiming_uniform_(modality, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.moka_B[adapter_name])
        else:
            nn.init.normal_(self.moka_B[adapter_name], std=0.02)


class MokaLinear(nn.Module, MokaLayer):
    """A linear map (``nn.Linear``, ``Conv1D``, or a quantised linear) with MokA adapters."""

    def __init__(
        self, base_layer, adapter_name: str, router, r: int, alpha: float, config: MokaConfig, **kwargs
    ) -> None:
        super().__init__()
        MokaLayer.__init__(self, base_layer, router, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [batch, seq, in] (or [batch * seq, in]) -> [..., out], in the dtype of the base layer's result."""
        if self.moka_router.idle:
            return self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        updates, given = [], x
        for name in self.adapters_in_use():
            read, update = self._update(name, x)
            updates += [] if update is None else [update]
            given = given if read is x else read
        result = self.base_layer(given, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for update in updates:
            result = self._add(result, *update)
        return result

    def adapters_in_use(self) -> list[str]:
        """The adapters of this layer that are active, or, where some are merged, those."""
        return [name for name in (self.merged_adapters or self.active_adapters) if name in self.moka_A]

    def text_factor(self, name: str, view: View) -> float:
        """How much of B A_text x is due for a text token beyond what the base weight holds: s, 0, or -s."""
        return ((not view.silent) - self._folded(name)) * self.moka_scaling[name]

    def _update(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, Update | None]:
        """What the base layer is to read in the place of ``x``, and one adapter's update as z~, B and the scale s.

        Of a merged adapter z~ lacks what the base weight holds; None: nothing is to be added.
        """
        config, router = self.moka_config[name], self.moka_router
        self._gather(self.moka_A[name], self.moka_B[name])
        view, routed = router.view(name)
        if routed is not None and (not view.uniform or router.recorder is not None):
            self._check_shape(x, routed)
        if view.silent and not self._folded(name) and router.recorder is None:
            return x, self._nothing(name, x)
        if fused() and not self._folded(name) and router.recorder is None:
            x, z = rank_space(self, name, x, view)  # [tokens, r]
            z = z if config.share_b else self._slots(z, view, config)
        else:
            z = self._plain_rank_space(name, x, view, routed)
            if z is None:
                return x, None
        B = self.moka_B[name]
        if not config.share_b:
            # A text token's alone, or side by side for the slots of z: [out, M * r].
            B = B[config.text_row] if z.shape[-1] == B.shape[-1] else B.transpose(0, 1).flatten(1)
        scale = self.moka_scaling[name] if config.scale_position == "output" else 1.0
        return x, (z, B.to(z.dtype), scale)

    def _add(self, result: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
        """result + s B z~."""
        if fused() and z.dtype == result.dtype and result.is_contiguous():
            return up(result, z.reshape(-1, z.shape[-1]), B, scale, self._may_write_to(result))
        update = F.linear(z, B).reshape(result.shape)
        return result + (update * scale).to(result.dtype)

    def _nothing(self, name: str, x: torch.Tensor) -> Update | None:
        """An update of zeros where no token is adapted: A and B get a gradient in every training step on every process."""
        A, B = self.moka_A[name], self.moka_B[name]
        if not (torch.is_grad_enabled() and A.requires_grad):
            return None
        dtype, tokens = compute_dtype(x), x.shape[:-1].numel()
        z = (A.sum() * 0).to(dtype).expand(tokens, self.moka_r[name])
        return z, (B if B.dim() == 2 else B.sum(0)).to(dtype), 1.0

    def makes_its_result(self) -> bool:
        """Whether the base layer's result, and its gradient, are nobody else's: a plain linear layer makes them anew and
        keeps nothing of them, but whoever watches the layer may."""
        base = self.base_layer
        return type(base) is nn.Linear and not has_hooks(base)

    def _may_write_to(self, result: torch.Tensor) -> bool:
        if not self.makes_its_result():
            return False
        # Of a view (a linear layer with a bias makes one) autograd would make copies.
        return not torch.is_grad_enabled() or not (result._is_view() or (result.requires_grad and result.is_leaf))

    def _slots(self, z: torch.Tensor, view: View, config: MokaConfig) -> torch.Tensor:
        """Each token's z [tokens, r] in its modality's slot, for a B each: [tokens, M * r]."""
        index = select(view, config, z).index
        if index is None:
            return z
        slots = z.new_zeros(len(z) * len(config.modalities), z.shape[1]).index_copy(0, index, z)
        return slots.view(len(z), -1)

    def _check_shape(self, x: torch.Tensor, routed: tuple[int, int]) -> None:
        batch, seq = routed
        if math.prod(x.shape[:-1]) != batch * seq:
            raise MokaError(
                f"A MokA layer got {list(x.shape[:-1])} tokens, but the routing of this forward is for [{batch}, {seq}]. "
                "Either a layer outside the language model is adapted (name it in MokaConfig.exclude_modules), or "
                "the model expands media inside (pass the ids of the expanded tokens with moka.routing)."
            )

    def _plain_rank_space(
        self, name: str, x: torch.Tensor, view: View, routed: tuple[int, int] | None
    ) -> torch.Tensor | None:
        """z~ by plain operators: for the compiler, for diagnostics, and for the residual of a merged adapter.

        [..., r] where all tokens are text, or else [batch, seq, r] ([batch, seq, M * r] without a shared B).
        """
        config, recorder = self.moka_config[name], self.moka_router.recorder
        folded = self._folded(name)
        if view.uniform and (recorder is None or routed is None):
            sign = (not view.silent) - folded  # what is due, less what the base weight holds
            if sign == 0:
                return None
            z = self._project(name, x, self.moka_A[name][config.text_row])  # [..., r]
            return z if sign > 0 else -z
        A = self.moka_A[name]  # [M, r, in]
        z_all = self._project(name, x.reshape(*routed, -1), A.flatten(0, 1))  # [batch, seq, M * r]
        z_all = z_all.unflatten(-1, A.shape[:2])
        if recorder is not None:
            recorder(self, name, z_all, view)
        return _mix(z_all, view, config, folded)

    def _gather(self, *parameters: nn.Parameter) -> None:
        """Under DeepSpeed's ZeRO-3: have parameters whole in this layer's passes.

        DeepSpeed gathers what a module itself owns; A and B lie in dictionaries, whose forward nobody calls.
        """
        for parameter in parameters:
            status = getattr(parameter, "ds_status", None)
            if status is not None and status.name != "AVAILABLE":  # at the first forward
                from deepspeed.zero import register_external_parameter

                register_external_parameter(self, parameter)
                parameter.all_gather()  # type: ignore[operator]

    def dropout_rate(self, name: str) -> float:
        """The probability with which an element of the input is dropped in this call."""
        dropout = self.moka_dropout[name]
        drops = dropout.training and not self.merged and not self.moka_config[name].text_merged
        return getattr(dropout, "p", 0.0) if drops else 0.0

    def _project(self, name: str, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        rate = self.dropout_rate(name)
        z = F.linear(F.dropout(x, rate) if rate else x, A.to(x.dtype))
        return z * self.moka_scaling[name] if self.moka_config[name].scale_position == "input" else z

    def _folded(self, name: str) -> bool:
        """Whether the base weight holds this adapter's text path."""
        config = self.moka_config[name]
        return TEXT in config.adapted and (config.text_merged or name in self.merged_adapters)

    def _folds(self, name: str) -> bool:
        """Whether merging this adapter changes the base weight."""
        config = self.moka_config[name]
        return TEXT in config.adapted and not config.text_merged

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The text path s B A_text as a weight update, float32, in the layout of the base weight."""
        config = self.moka_config[adapter]
        text = config.text_row
        A = self.moka_A[adapter][text].float()  # [r, in]
        B = (self.moka_B[adapter] if config.share_b else self.moka_B[adapter][text]).float()  # [out, r]
        delta = (B @ A) * self.moka_scaling[adapter]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False) -> None:
        """Fold the text path into the base weight. Media tokens keep their residual, so no output changes.

        Args:
            safe_merge: refuse an adapter that is not finite.
            adapter_names: default: the active ones.
            requantize: fold into a quantised weight, which rounds it again; the original is kept for ``unmerge``.
        Raises:
            MokaError: a quantised base layer without ``requantize``; with ``safe_merge``, an adapter not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.moka_A:
                continue
            self.check_merge(name, safe_merge, requantize or self.moka_router.requantize)
            if self._folds(name):
                self._fold(name)
            self.merged_adapters.append(name)
            self.moka_router.changed()

    def check_merge(self, name: str, safe_merge: bool, requantize: bool) -> None:
        """Refuse a merge of this adapter before anything changes. Raises: see ``merge``."""
        backend = self.quantization_backend
        if self._folds(name) and backend is not None and not (requantize and backend.supports_merge):
            raise MokaError(_merge_refused(backend))
        if self._folds(name) and safe_merge:
            weight, delta = self.get_base_weight(), self.get_delta_weight(name)
            if not torch.isfinite(delta).all():
                raise MokaError(f"Adapter {name!r} holds values that are not finite; it was not merged.")
            if backend is None and not torch.isfinite((weight + delta.to(weight.device)).to(weight.dtype)).all():
                raise MokaError(f"With adapter {name!r} a {weight.dtype} weight is not finite; it was not merged.")

    def _fold(self, name: str) -> None:
        backend, base = self.quantization_backend, self.get_base_layer()
        delta = self.get_delta_weight(name).detach()
        if backend is None:
            weight = self.get_base_weight()
            folded = (weight + delta.to(weight.device)).to(weight.dtype)
            if id(base.weight) in self.moka_router.tied:
                self.moka_unfolded[name] = base.weight, {}
                base.weight = nn.Parameter(folded, requires_grad=base.weight.requires_grad)
            else:
                self.set_base_weight(folded)
            return
        base.state_dict()  # bitsandbytes' inference on a CPU packs 4-bit weights anew; this puts them back in order
        weight = self.get_base_weight().float()
        wanted = weight + delta.to(weight.device)
        self.moka_unfolded[name] = _quantized_state(base)
        self.set_base_weight(wanted.to(getattr(base, "compute_dtype", None) or torch.float32))
        error = self.get_base_weight().float() - wanted
        share = (error.norm() / wanted.norm()).item(), (error.norm() / delta.norm()).item()
        self.moka_router.fold_errors.append(share)

    def unmerge(self) -> None:
        """Take the folded text paths out of the base weight again; a quantised or tied weight comes back as it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.moka_A and self._folds(name):
                if name in self.moka_unfolded:
                    base = self.get_base_layer()
                    base.weight, state = self.moka_unfolded.pop(name)
                    base.__dict__.update(state)
                    continue
                weight = self.get_base_weight()
                self.set_base_weight((weight - self.get_delta_weight(name).to(weight.device)).to(weight.dtype))
        self.moka_router.changed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.moka_router.changed()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.moka_router.changed()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.moka_router.changed()

    def __repr__(self) -> str:
        return "moka." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _merge_refused(backend) -> str:
    """Why a merge into a quantised weight is refused."""
    if not backend.supports_merge:
        return f"A {backend.backend_name} weight cannot be merged into. Load the backbone unquantised, then merge."
    return (
        f"Folding into a {backend.backend_name} weight would round it again. Dequantise the backbone first "
        "(model.dequantize()), then load the adapter and merge; or ask for it by name with requantize=True, which says "
        "how large the error is."
    )


def _quantized_state(base: nn.Module) -> tuple[nn.Parameter, dict]:
    """A quantised layer's weight, and what bitsandbytes keeps beside it (the 8-bit scales)."""
    state = getattr(base, "state", None)
    return base.weight, {} if state is None else {"state": copy.copy(state)}


def _mix(z_all: torch.Tensor, view: View, config: MokaConfig, folded: bool) -> torch.Tensor:
    """From every modality's projection to what B takes.

    z_all: [batch, seq, M, r] -> z~ [batch, seq, r] with a shared B, or each token's z~ in its modality's slot,
    [batch, seq, M * r], without. With ``folded`` the text path of every token is subtracted: the base weight has it.
    """
    text, rank = config.text_row, z_all.shape[-1]
    z_text = z_all[:, :, text]  # [batch, seq, r]
    if view.row is None:
        row, z = None, z_text
    else:
        row = view.row[..., None, None]  # [batch, seq, 1, 1]
        z = z_all.gather(2, row.expand(-1, -1, 1, rank)).squeeze(2)  # [batch, seq, r]
    if view.pairs is not None:
        z = interact(z, view.pairs, config.interaction)
    if view.adapted is not None or view.silent:
        z = z * (0 if view.silent else view.adapted)
    if config.share_b:
        return z - z_text if folded else z
    slots = torch.zeros_like(z_all)
    if row is None:
        slots[:, :, text] = z
    else:
        slots = slots.scatter(2, row.expand(-1, -1, 1, rank), z.unsqueeze(2))
    if folded:
        slots = slots - F.one_hot(torch.tensor(text), z_all.shape[2]).to(z_all)[:, None] * z_text.unsqueeze(2)
    return slots.flatten(2)
