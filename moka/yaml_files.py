"""YAML files of runs: found by path or name, read on top of their ``base``, with overrides from the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moka.errors import MokaError, nearest

QUICKSTART = {"quickstart": "quickstart/audio_visual_text"}  # its short name
_MAX_NODES = 100_000  # an alias of an alias of an alias may mean more than fits into memory


def configs_folder() -> Path:
    """Return the folder of the shipped configurations: in the package of a wheel, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Return the names of the shipped runs, such as "quickstart/audio_visual_text"."""
    folder = configs_folder()
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in found if name.split("/")[0] not in ("accelerate", "shared"))


def find_config(path: str | Path) -> Path:
    """Return the file of a configuration: a path, or the name of a shipped one.

    Raises:
        MokaError: there is no such file, and no such name.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        raise MokaError(
            f"{path} is a JSONL file; give the YAML file of a run, or its name, and the data as data.train={path}."
        )
    if path.is_file() or (path.exists() and str(path) not in QUICKSTART):
        return path
    named = configs_folder() / f"{QUICKSTART.get(str(path), path)}.yaml"
    if path.suffix not in (".yaml", ".yml") and named.is_file():
        return named
    names = config_names()
    raise MokaError(
        f"No configuration file {path}, and none of the {len(names)} shipped ones has that name, such as "
        f"quickstart/audio_visual_text.{nearest(str(path), names)}"
    )


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain values of a YAML file, over those of the files that its ``base`` names, with overrides.

    Args:
        overrides: "section.key=value".
    Raises:
        MokaError: a file that cannot be read, or an override of another form.
    """
    raw = _read(path, ())
    for override in overrides:
        _apply(raw, override)
    return raw


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """``base`` is one file or a list, relative to ``path``, later ones on top; ``above`` are those that lead here."""
    if path.resolve() in above:
        raise MokaError(f"{path}: base: it is, by way of others, its own base ({', '.join(map(str, above))}).")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8")) or {}
        if not isinstance(raw, dict):
            raise yaml.YAMLError("the top level must be a mapping of sections")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        named = f"{above[-1]}: base: " if above else ""
        raise MokaError(f"{named}{path} cannot be read as YAML: {_reason(error)}. Correct the file.") from error
    bases = raw.pop("base", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise MokaError(
                f"{path}: base: {base!r} is no path; give a YAML file, relative to this one, or a list of them."
            )
        merged = _merge(merged, _read(path.parent / base, (*above, path.resolve())))
    return _merge(merged, raw)


def _merge(below: Any, above: Any) -> Any:
    """Return ``above`` over ``below``, mappings key by key. One that names another ``type`` or ``format`` replaces the whole
    mapping: the fields of an encoder mean nothing to another.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if any(key in above and above[key] != below.get(key) for key in ("type", "format")):
        return above
    return below | {key: _merge(below[key], value) if key in below else value for key, value in above.items()}


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MokaError(
            f"Override {override!r} is not of the form section.key=value, such as training.learning_rate=1e-4."
        )
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise MokaError(f"Override {override!r}: the value is no YAML ({_reason(error)}). Quote it.") from error
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # absent, or a heading with nothing under it
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            kind = "a list; give all of it, as [{...}, {...}]" if isinstance(node, list) else "a value, not a section"
            raise MokaError(f"Override {override!r}: {parent!r} is {kind}.")
    node[leaf] = value


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number, without dates (they are text), and without keys that occur twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping; a key that occurs twice is an error (the first value would be lost silently)."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1 and key != "<<"), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")  # YAML 1.1 wants a point and a sign
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """Return plain values from YAML text; aliases become copies.

    Raises:
        yaml.YAMLError: the text is not YAML, or is nested or repeated beyond any configuration.
    """
    nodes = 0

    def copied(value: Any) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > _MAX_NODES:
            raise yaml.YAMLError(f"it expands to more than {_MAX_NODES:,} values")
        if isinstance(value, dict):
            return {key: copied(one) for key, one in value.items()}
        return [copied(one) for one in value] if isinstance(value, list) else value

    try:
        return copied(yaml.load(text, _Loader))
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply, or contains itself") from error
    except (ValueError, TypeError) as error:  # a number of thousands of digits, a list as a key
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _reason(error: Exception) -> str:
    """Return on one line what is wrong with a YAML text, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'syntax error'}"
