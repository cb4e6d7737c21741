"""List the shipped configurations, copy one to edit, write the JSON Schema that editors check them with.

moka recipes                                       name, scenario, stages, language model, where it runs
moka recipes copy llama2_7b/visual_text/stage2     stage2.yaml with all its values, and moka.schema.json beside it
moka recipes schema > moka.schema.json             the schema of every key
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from moka.errors import MokaError
from moka.yaml_files import config_names, find_config, read_config

SCHEMA = "moka.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "copy", "schema"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", help="of copy: the configuration, as `moka recipes` lists it")
    parser.add_argument("target", nargs="?", type=Path, help="of copy: the file (default: the name's last part, here)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "copy":
        if arguments.name is None:
            raise MokaError("moka recipes copy: name a configuration; `moka recipes` lists them.")
        copy(arguments.name, arguments.target, arguments.overwrite)
    elif arguments.action == "schema":
        print(_schema(), end="")
    else:
        show()


def show() -> None:
    """Print a table of the shipped configurations."""
    rows = [("name", "scenario", "stages", "model", "runs on"), *map(_row, config_names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nTrain one: moka train NAME; with tiny random parts: moka train NAME --tiny; edit one: moka recipes copy NAME"
    )


def _row(name: str) -> tuple[str, ...]:
    raw = read_config(find_config(name))
    model = raw.get("model", {})
    backbone = str(model.get("name") or model.get("backbone"))
    # Of a Hugging Face model, which brings its own encoders, the folder says the scenario.
    scenario = (
        name.split("/")[1].replace("_", "-") if model.get("kind") == "hf" else "-".join([*model["modalities"], "text"])
    )
    stages = "+".join(map(str, raw.get("stages", [2])))
    return name, scenario, stages, backbone, "2 CPU cores" if backbone.startswith("embedded:") else "a GPU"


def copy(name: str, target: Path | None, overwrite: bool) -> None:
    """Write a shipped configuration with the values of its bases, its first comments, and the schema beside it.

    Raises:
        MokaError: there is no such configuration, or the file is there.
    """
    from moka.io import write_output

    source = find_config(name)
    target = target or Path(f"{Path(name).stem}.yaml")
    if target.exists() and not overwrite:
        raise MokaError(f"{target} is there. Choose another file, or give --overwrite.")
    comments = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            comments.append(line)
    values: dict[str, Any] = read_config(source)
    text = "\n".join([f"# yaml-language-server: $schema={SCHEMA}", *comments, ""])
    write_output(target, text + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120))
    write_output(target.with_name(SCHEMA), _schema())
    print(f"{target}, {target.with_name(SCHEMA)}  (next: moka train {target})")


def _schema() -> str:
    from moka.config import json_schema

    return json.dumps(json_schema(), indent=1) + "\n"
