"""``MokaConfig``: the settings of one MokA adapter, a ``peft.PeftConfig`` that survives a JSON round trip."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from moka.errors import MokaError, nearest
from moka.type_checks import check_types

from .rivals import RIVALS, Rival

# Raised by one when older code can no longer read a saved adapter. 2: names end in `.weight`, `moka_A.<adapter>.weight`.
FORMAT_VERSION = 2

TEXT = "text"
MARKERS = ("user", "assistant", "end")  # and longer forms, such as "user_first"
# transformers' convention for `mm_token_type_ids`: 0 text, 1 image, 2 video, 3 audio.
DEFAULT_MODALITIES = {TEXT: [0], "visual": [1, 2], "audio": [3]}
# The linear projections of a decoder block that the paper adapts (arXiv 2506.05191, appendix I).
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"scale_position": "output", "interaction_weight": 1.0, "modalities": DEFAULT_MODALITIES},
    "official-avt": {"scale_position": "input", "interaction_weight": 1.0, "modalities": DEFAULT_MODALITIES},
    "official-vt": {
        "scale_position": "output",
        "interaction_weight": 0.05,
        "modalities": {TEXT: [0], "visual": [1, 2]},
    },
    # The paper's baselines that are settings of MokA (tables 1, 4 and 5); Phi-4-multimodal's mixture of LoRAs is the first.
    "uni_modal_lora": {"share_b": False, "interaction": "none"},
    "moka_no_interaction": {"interaction": "none"},
    "moka_reversed": {"interaction": "reversed"},
    "moka_mean": {"interaction": "mean"},
}
# Fields that are MokA's own: another method has no use for them.
OF_MOKA = ("interaction", "interaction_weight", "scale_position", "share_b")


@dataclass
class MokaConfig(PeftConfig):
    """Configuration of a MokA adapter (Wei et al., NeurIPS 2025, https://arxiv.org/abs/2506.05191).

    Baselines of the paper are one changed field away: ``interaction="none"`` (MokA without cross-attention),
    ``share_b=False, interaction="none"`` (uni-modal LoRA: A and B for each modality), ``adapt=["visual"]`` (only that
    modality's tokens), ``interaction="reversed"`` (text queries the media), ``interaction="mean"`` (naive interaction).
    ``method="loramoe"`` and the like are other methods on the same layers (`moka.adapter.rivals`).

    Raises:
        MokaError: a field is out of its range; the message names the field, the value and what is allowed.
    """

    method: Literal["moka", "multiple_lora", "loramoe", "hydralora", "uni_mm_lora", "uni_mm_lora_gate", "imod"] = field(
        default="moka", metadata={"help": "MokA, or a method to compare it with."}
    )
    method_options: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Settings of a method other than MokA by name, see docs/comparison.md."}
    )
    r: int = field(default=4, metadata={"help": "Rank: width of the low-rank space, shared by all modalities."})
    alpha: float = field(default=16, metadata={"help": "Scale numerator: the update is multiplied by alpha / r."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of A, as in LoRA (0 <= p < 1)."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt, or 'all-linear'. They mean layers of the language model's "
            "decoder; a path or a regex reaches any layer. Default: the linear projections of each decoder block."
        },
    )
    adapt_towers: bool = field(
        default=False, metadata={"help": "Let names in target_modules mean layers of encoders and projectors too."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regex) of layers to leave out."}
    )
    modalities: dict[str, list[int]] = field(
        default_factory=lambda: {name: list(ids) for name, ids in DEFAULT_MODALITIES.items()},
        metadata={
            "help": "Modality name -> its values in mm_token_type_ids. Must contain 'text'. Rows of moka_A are in the "
            "order of each name's smallest id."
        },
    )
    modality_token_ids: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Modality name -> placeholder token ids, to derive the routing from input_ids when no "
            "mm_token_type_ids are given. Default: the model's own image / video / audio token ids."
        },
    )
    structure_token_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "Ids of text tokens around and inside media (begin and end marks, row breaks), which are never part "
            "of a question, in addition to those that the model's configuration names."
        },
    )
    turn_markers: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Token ids that open a user's turn ('user') and an assistant's turn ('assistant'), and close a turn "
            "('end'): moka.turn_markers(processor). With them the question is found without labels."
        },
    )
    interaction: Literal["question", "none", "reversed", "mean"] = field(
        default="question",
        metadata={"help": "What non-text tokens add in the low-rank space: attention over the question's text tokens."},
    )
    interaction_weight: float | dict[str, float] = field(
        default=1.0, metadata={"help": "lambda, the weight of the interaction: one number, or modality -> number."}
    )
    scale_position: Literal["output", "input"] = field(
        default="output",
        metadata={"help": "Where alpha / r sits: after B ('output'), or on z before the interaction ('input')."},
    )
    share_b: bool = field(default=True, metadata={"help": "One B for all modalities (MokA), or one for each (False)."})
    adapt: list[str] | None = field(
        default=None, metadata={"help": "Modalities whose tokens go through the adapter. Default: all of them."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead of alpha / r."})
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: A Kaiming-uniform, B zero (the update starts at zero). False: B random too (tests)."},
    )
    bias: Literal["none", "all", "moka_only"] = field(default="none", metadata={"help": "Which biases are trained."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as projectors."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder blocks to adapt. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, where it is none of the usual ones."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Layer name or regex -> a rank other than r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Layer name or regex -> an alpha other than alpha."}
    )
    text_merged: bool = field(
        default=False,
        metadata={
            "help": "The backbone that this adapter belongs to has the text path merged into its weights already (written by "
            "`moka merge`): the layers add what media tokens have beyond it. For inference."
        },
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved layout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["MOKA"]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        _check(self)
        self.format_version = FORMAT_VERSION  # tensors are always written in today's format
        # JSON files sort their keys, so the rows of moka_A must follow something that survives: the ids.
        self.modalities = dict(sorted(self.modalities.items(), key=lambda item: min(item[1])))

    @classmethod
    def preset(cls, name: str, **overrides) -> MokaConfig:
        """Return a published variant (``paper``, ``official-avt``, ``official-vt``) or baseline by name; ``overrides`` win."""
        if name not in PRESETS:
            raise MokaError(f"Unknown preset {name!r}; known: {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
        values: dict[str, Any] = {
            "r": 4,
            "alpha": 16,
            "dropout": 0.05,
            "modalities": DEFAULT_MODALITIES,
            **PRESETS[name],
        }
        values["modalities"] = {key: list(ids) for key, ids in values["modalities"].items()}
        return cls(**{**values, **overrides})

    @classmethod
    def from_processor(cls, processor: Any, **fields: Any) -> MokaConfig:
        """Return a configuration that knows a processor's turn markers and structure tokens.

        Args:
            processor: a transformers processor or tokenizer with a chat template.
            fields: other fields; they win.
        Raises:
            MokaError: no chat template; a template whose turns cannot be distinguished.
        """
        from .targets import structure_ids
        from .turns import turn_markers

        config = cls(**fields)
        if config.turn_markers is None:
            config.turn_markers = turn_markers(processor)
        if config.structure_token_ids is None:
            config.structure_token_ids = structure_ids(processor)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs) -> MokaConfig:
        """Read the configuration as in peft; a damaged local adapter folder is refused before any model is touched."""
        from .checks import check_adapter_config, check_adapter_folder

        # The configuration first: a newer format may also store its tensors in another way.
        check_adapter_config(pretrained_model_name_or_path, subfolder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # No field: an adapter made from it is compared with the file before the model is changed.
        config.pending = check_adapter_folder(pretrained_model_name_or_path, subfolder)
        return config

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write the configuration as in peft, and into the folder's README how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        _write_usage(Path(save_directory))

    @property
    def adapted(self) -> list[str]:
        """Return the names of the modalities whose tokens go through the adapter, in the order of ``modalities``."""
        return [name for name in self.modalities if self.adapt is None or name in self.adapt]

    @property
    def interacts(self) -> bool:
        """Return whether any token can attend to another: that needs adapted text and another adapted modality."""
        return self.rival is None and self.interaction != "none" and TEXT in self.adapted and len(self.adapted) > 1

    @property
    def rival(self) -> Rival | None:
        """Return the method if it is another than MokA."""
        return RIVALS.get(self.method)

    def require_moka(self, caller: str) -> None:
        """Refuse, in the name of ``caller``, an adapter of another method."""
        if self.rival is not None:
            raise MokaError(
                f"{caller}: it reads MokA's matrices by modality, and this adapter's method is {self.method}."
            )

    def method_option(self, name: str) -> float:
        """Return a setting of the method."""
        rival = RIVALS[self.method]
        return self.method_options.get(name, rival.options[name])

    def tensor_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an adapter's tensors in one layer, by the names of the layer's attributes."""
        modalities = len(self.modalities)
        if self.rival is None:
            up = (out_features, r) if self.share_b else (modalities, out_features, r)
            return {"moka_A": (modalities, r, in_features), "moka_B": up}
        a, b, gates = self.rival.counts(modalities)
        shapes: dict[str, tuple[int, ...]] = {"moka_A": (a, r, in_features), "moka_B": (b, out_features, r)}
        return {**shapes, "moka_gate": (gates, in_features)} if gates else shapes

    @property
    def text_row(self) -> int:
        """Return the index of the text modality in the stacked ``moka_A`` [M, r, in]."""
        return list(self.modalities).index(TEXT)

    def weight_of(self, modality: str) -> float:
        """Return lambda of one modality's queries."""
        if isinstance(self.interaction_weight, dict):
            return float(self.interaction_weight.get(modality, 1.0))
        return float(self.interaction_weight)


_USAGE = """
## How to load this adapter

It is a [MokA](https://arxiv.org/abs/2506.05191) adapter. `import moka` (`pip install moka-peft`) makes the method known to
peft; without it peft raises `KeyError: 'MOKA'`.

```python
import moka
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "path/to/this/folder")
```
"""


def _write_usage(folder: Path) -> None:
    """Add to the README that peft wrote next to the configuration how to load the adapter, once."""
    readme = folder / "README.md"
    if readme.is_file() and "import moka" not in (text := readme.read_text(encoding="utf-8")):
        readme.write_text(text.rstrip() + "\n" + _USAGE, encoding="utf-8")


def _check(config: MokaConfig) -> None:
    check_types(MokaConfig, {"format_version": config.format_version}, "MokaConfig")
    if config.format_version > FORMAT_VERSION:
        raise MokaError(
            f"format_version: this adapter was saved in format {config.format_version}, and this moka reads up to "
            f"{FORMAT_VERSION}. Upgrade with `pip install -U moka-peft`."
        )
    check_types(MokaConfig, vars(config), "MokaConfig")
    for name, rank in [("r", config.r), *((f"rank_pattern[{key!r}]", r) for key, r in config.rank_pattern.items())]:
        if rank <= 0:
            raise MokaError(f"{name}: the rank must be a positive integer, got {rank!r}.")
    if not 0 <= config.dropout < 1:
        raise MokaError(f"dropout: must be in [0, 1), got {config.dropout!r}.")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise MokaError("layers_to_transform cannot be used when target_modules is a regex; put the indices into it.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise MokaError("layers_pattern: needs layers_to_transform, the indices of the blocks in that list.")
    if config.target_modules is not None and not config.target_modules:
        raise MokaError("target_modules: the list is empty; name linear layers, or leave it out for the defaults.")
    _check_modalities(config)
    _check_method(config)


def _check_method(config: MokaConfig) -> None:
    rival = config.rival
    options = {} if rival is None else rival.options
    for name, value in config.method_options.items():
        if name not in options:
            raise MokaError(
                f"method_options: method {config.method} has no {name!r}; allowed: {', '.join(options) or 'none'}."
                f"{nearest(name, options)}"
            )
        if value < 0:
            raise MokaError(f"method_options[{name!r}]: must be at least 0, got {value!r}.")
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in OF_MOKA if rival is not None else ():
        if getattr(config, name) != defaults[name] and (name, config.interaction) != ("interaction", "none"):
            raise MokaError(
                f"{name}: {getattr(config, name)!r} has no meaning for method {config.method}; leave it out, or set method to "
                "'moka'."
            )
    if rival is not None and config.text_merged:
        raise MokaError(f"text_merged: only for method 'moka', and method is {config.method!r}.")


def _check_modalities(config: MokaConfig) -> None:
    names = list(config.modalities)
    if TEXT not in config.modalities:
        raise MokaError(f"modalities: 'text' is missing; given: {names}. Add \"text\": [0].")
    owner: dict[int, str] = {}
    for name, ids in config.modalities.items():
        if not ids or any(i < 0 for i in ids):
            raise MokaError(f"modalities[{name!r}]: needs at least one id, each an integer >= 0; got {ids!r}.")
        for i in ids:
            if i in owner:
                raise MokaError(f"modalities: id {i} is claimed by both {owner[i]!r} and {name!r}; give each its own.")
            owner[i] = name
    named = {
        "adapt": config.adapt or [],
        "interaction_weight": config.interaction_weight if isinstance(config.interaction_weight, dict) else [],
        "modality_token_ids": config.modality_token_ids or {},
    }
    for field_name, used in named.items():
        for name in used:
            if name not in config.modalities:
                raise MokaError(f"{field_name}: unknown modality {name!r}; known: {names}.{nearest(name, names)}")
    for name in config.turn_markers or {}:
        if name.partition("_")[0] not in MARKERS:
            raise MokaError(f"turn_markers: {name!r} begins with none of {', '.join(MARKERS)}.{nearest(name, MARKERS)}")
    if config.adapt is not None and not config.adapt:
        raise MokaError(f"adapt: the list is empty; name at least one of {names}, or leave it out for all.")
