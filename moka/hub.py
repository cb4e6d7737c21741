"""The Hugging Face Hub: publish a trained run, and fetch one by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from moka.errors import MokaError
from moka.io import read_json
from moka.modeling.artifacts import ADAPTER, AdapterDescription

CARD = "README.md"
# What an adapter folder has; nothing else of a repository is fetched.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_EMBEDDED = {"embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, as somebody who may write there."


@dataclass
class Upload:
    """What goes into a repository. ``files``: name there -> the file here, or its bytes."""

    repo: str
    files: dict[str, Path | bytes]
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """Return bytes by name."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }

    def send(self, private: bool = False) -> str:
        """Create the repository if it is not there, and commit the files; return the address of the commit.

        Raises:
            MokaError: the Hub refuses, or cannot be reached.
        """
        api = HfApi()
        adds = [CommitOperationAdd(name, file) for name, file in self.files.items()]
        try:
            api.create_repo(self.repo, private=private, exist_ok=True)
            return str(api.create_commit(self.repo, adds, commit_message="A MokA adapter").commit_url)
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            remedy = _LOG_IN if status in (401, 403) else "Try again later."
            raise MokaError(f"moka push: the Hub refused {self.repo} ({status}). {remedy}") from error
        except OSError as error:
            raise MokaError(
                f"moka push: the Hub cannot be reached ({type(error).__name__}). Try again later."
            ) from error


def prepare(run: str | Path, repo: str) -> Upload:
    """Return what `moka push` sends: the adapter folder of a run, its configuration, and the model card for the Hub.

    Raises:
        MokaError: no adapter there, or a name that no repository can have.
    """
    from moka.inference import find_adapter

    _check_name(repo)
    adapter = find_adapter(run)
    folder = adapter.parent if adapter.name == ADAPTER else adapter
    files: dict[str, Path | bytes] = {
        path.name: path for pattern in _FILES for path in sorted(adapter.glob(pattern)) if path.is_file()
    }
    files |= {name: folder / name for name in ("config.yaml", "metrics.jsonl") if (folder / name).is_file()}
    saved = AdapterDescription.read(adapter)
    base: str | None = _EMBEDDED.get(saved.backbone, saved.backbone)
    notes = []
    if base is not None and base.startswith(("embedded:", "tiny:")):  # moka makes them anywhere
        base = None
    elif not _is_name(str(base)) or Path(str(base)).exists():
        base = None
        notes.append(
            f"the backbone {saved.backbone!r} is not on the Hub: others must name theirs, as moka.load(..., backbone=FOLDER)."
        )
    text = (adapter / CARD).read_text(encoding="utf-8") if (adapter / CARD).is_file() else ""
    result = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else None
    if result is None:
        notes.append("the run was not evaluated, so the card has no figures; run `moka eval` first.")
    kinds = {one for spec in saved.modalities.values() for one in spec.get("type_ids") or []}
    files[CARD] = card(text, repo, base, kinds, result).encode()
    return Upload(repo, files, notes)


def card(text: str, repo: str, base: str | None, kinds: set[int], result: dict[str, Any] | None) -> str:
    """Return a run's model card as the Hub's: its name instead of the folder's, task, backbone and figures in the header.

    Args:
        base: the backbone's name on the Hub, if it has one.
        kinds: the ``mm_token_type_ids`` of the modalities.
        result: what ``moka eval`` wrote.
    """
    head: dict[str, Any] = {}
    body = text
    if found := re.match(r"---\n(.*?)\n---\n", text, re.S):
        head, body = yaml.safe_load(found[1]) or {}, text[found.end() :]
    head.pop("base_model", None)
    if base is not None:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    sees, hears = bool(kinds & {1, 2}), 3 in kinds
    tasks = {(True, True): "any-to-any", (True, False): "image-text-to-text", (False, True): "audio-text-to-text"}
    if (sees, hears) in tasks:
        head["pipeline_tag"] = tasks[sees, hears]
    if result is not None:
        overall = result["conditions"]["as given"]["overall"]
        metric = {
            "type": "accuracy",
            "value": round(100 * overall["accuracy"], 2),
            "name": f"exact match, N = {overall['n']}",
        }
        task = {"type": head.get("pipeline_tag", "question-answering")}
        entry = {"task": task, "dataset": {"type": "moka", "name": "test questions of the run"}, "metrics": [metric]}
        head["model-index"] = [{"name": repo.split("/")[-1], "results": [entry]}]
    if used := re.search(r'moka\.load\("([^"]+)"\)', body):
        body = body.replace(f'"{used[1]}/{ADAPTER}"', f'"{repo}"').replace(f'"{used[1]}"', f'"{repo}"')
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def fetch(repo: str) -> Path:
    """Return the folder of a repository's adapter in the Hub's cache, fetched if it is not there.

    Raises:
        MokaError: there is no such repository, it is not for you, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=_FILES))
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise MokaError(
            f"{repo} is neither a folder here nor a repository on the Hub that you may read ({status}). Give a run folder of "
            "`moka train`, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise MokaError(
            f"{repo} is not a folder here, and the Hub cannot be reached ({type(error).__name__}). Give a run folder of "
            "`moka train`."
        ) from error


def names_repository(path: str | Path) -> bool:
    """Return whether a path that does not exist can mean a repository: USER/NAME, where there is no folder USER."""
    return _is_name(str(path)) and not Path(path).exists() and not Path(path).parent.exists()


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and ".." not in text and not text.startswith((".", "~"))


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MokaError(f"{repo!r} is no name of a repository; give USER/NAME.") from error
    if not _is_name(repo):
        raise MokaError(f"{repo!r} is no name of a repository; give USER/NAME.")
