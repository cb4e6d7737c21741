"""The model card of an export: how to use it, what it lost, what was measured."""

from __future__ import annotations

import yaml

import moka

from .formats import HF_BACKBONE, LORA, TEXT_MERGED, Source
from .verify import Checks


def make_card(source: Source, name: str, origin: str, checks: Checks, base_model: str) -> str:
    """README.md of an export called ``name``, made from ``origin``."""
    library = {TEXT_MERGED: "moka", HF_BACKBONE: "transformers", LORA: "peft"}[source.format]
    header = {"library_name": library, "tags": ["moka", source.format], "base_model": base_model}
    lost = source.lost()
    losses = "".join(f"- {item}\n" for item in lost) or "Nothing: outputs equal those of the run, for text and media.\n"
    path = f"The {source.modality} path of a MokA adapter" if source.is_moka else "The LoRA of a run"
    dtype = str(source.dtype).removeprefix("torch.")
    rows = {f"difference, {name}": value for name, value in checks.differences.items()}
    rows |= {f"difference to the live model, {name} (lost)": value for name, value in checks.losses.items()}
    table = "".join(f"| {name} | {value:.2g} |\n" for name, value in rows.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {name}

{_SUMMARIES[source.format].format(base=base_model, path=path)} Made from `{origin}` with moka {moka.__version__}.

## Use

```python
{_USES[source.format].format(name=name, place=source.backbone_place)}
```

## What it lost

{losses}
## Checks

The folder was read back from disk and compared with the live model (weights in {dtype}, compared in float32).

| check | result |
|---|---|
| modules changed / expected | {checks.changed} / {checks.expected} |
{table}
Differences are those of the logits, as a part of the largest logit; {checks.tolerance:g} is allowed where they should be zero.
"""


_SUMMARIES = {
    TEXT_MERGED: "`{base}` with the text path of a MokA adapter merged in (`backbone/`), and the residual adapter for media "
    "(`adapter/`). Steps of text only do no adapter work. The two folders belong together.",
    HF_BACKBONE: "`{base}` with the text path of an adapter merged into its weights: an ordinary language model, for text.",
    LORA: "{path} as a plain LoRA for the bare `{base}`.",
}
_USES = {
    TEXT_MERGED: 'import moka\n\nmodel = moka.load("{name}")\nprint(model.generate("Your question?"))',
    HF_BACKBONE: 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")',
    LORA: "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
    'backbone = AutoModelForCausalLM.from_pretrained("{place}")\nmodel = PeftModel.from_pretrained(backbone, "{name}")',
}
