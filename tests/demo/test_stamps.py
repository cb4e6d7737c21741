"""Photographs and spoken captions out of a Debian package: a small one made here, and the real one where it is cached."""

import hashlib
import io
import json
import pickle
import tarfile
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moka.demo.stamps as stamps_module
from moka.data.schema import check_sample
from moka.demo.debian import DebianPackage, fetch_deb, package_files
from moka.demo.knobs import Knobs
from moka.demo.stamp_tasks import CATEGORIES, DEFAULT_SIZES, NAMES, PhotographsTask
from moka.demo.stamps import KINDS, LANGUAGES, RATE, TUXPAINT_STAMPS, Stamps, resolve_encoder_file
from moka.demo.wheels import cache_dir
from moka.errors import MokaError
from moka.modeling.media import Waveform

ROOT = "./usr/share/tuxpaint/stamps/"
SPLITS = ("train", "validation", "test")
REAL_CACHE = cache_dir()  # the user's own

# Of the real package: results are only comparable over versions while these stay.
GOLDEN_CAPTIONS = ["A magpie.", "An ostrich.", "An owl.", "A pink flamingo."]
GOLDEN_QUESTIONS = [
    ("What kind of thing is shown?", "animal"),
    ("Which language is spoken?", "Spanish"),
    ("Is food shown and is Russian spoken?", "yes"),
    ("What kind of thing, and which language?", "household, Spanish"),
]


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def tar(files: dict[str, bytes], packing: str = "xz", links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{packing}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return packed.getvalue()


def deb(data: bytes, name: str = "data.tar.xz") -> bytes:
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", name: data})


def png(shade: int, mode: str = "RGBA", size: tuple[int, int] = (12, 8)) -> bytes:
    image = Image.new(mode, size, (shade, 255 - shade, shade // 2, 255)[: len(mode)])
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()


def tone(hertz: float, seconds: float = 0.1, rate: int = 8000) -> bytes:
    """A recording; FFmpeg looks at the content, not at the name, so a wav file does for an ogg one."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        times = np.arange(round(seconds * rate)) / rate
        file.writeframes((8000 * np.sin(2 * np.pi * hertz * times)).astype("<i2").tobytes())
    return made.getvalue()


def stamp_files(per_kind: int = 10) -> dict[str, bytes]:
    """Items of every kind, each with a picture and a recording of its own; some others that are not wanted."""
    files = {"./usr/share/doc/tuxpaint-stamps-default/copyright": b"GPL-2\n"}
    number = 0
    for folder in (*KINDS.values(), "space"):
        for n in range(per_kind):
            name = f"{ROOT}{folder}/thing{n}"
            files[f"{name}.png"] = png(number)
            files[f"{name}.txt"] = f"A {folder} {n}.\nde.utf8=Ding\n".encode()
            for place, code in enumerate(LANGUAGES):
                files[f"{name}_desc_{code}.ogg"] = tone(200 + 10 * number + place)
            files[f"{name}_desc_xx.ogg"] = files[f"{name}.ogg"] = tone(50)
            number += 1
    # Sharing a recording, a caption, and a picture.
    files[f"{ROOT}food/thing1_desc_fr.ogg"] = files[f"{ROOT}food/thing0_desc_fr.ogg"]
    files[f"{ROOT}plants/thing1.txt"] = files[f"{ROOT}plants/thing0.txt"]
    files[f"{ROOT}animals/thing1.png"] = files[f"{ROOT}animals/thing0.png"]
    for name in ("symbols/a", "food/cartoon/b", "vehicles/c_mirror"):
        files[f"{ROOT}{name}.png"], files[f"{ROOT}{name}.txt"] = png(9), b"Not wanted.\n"
    files[f"{ROOT}food/no_caption.png"] = png(8)
    files[f"{ROOT}food/drawn.svg"], files[f"{ROOT}food/drawn.txt"] = b"<svg/>", b"A drawing.\n"
    return files


def put_into_cache(package: bytes) -> DebianPackage:
    """The package in the cache, as a user without network would put it there; what it has to be pinned as."""
    pinned = replace(TUXPAINT_STAMPS, sha256=hashlib.sha256(package).hexdigest(), pool="file:///absent")
    target = cache_dir() / "packages" / pinned.filename
    target.parent.mkdir(parents=True)
    target.write_bytes(package)
    return pinned


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(stamps_module, "TUXPAINT_STAMPS", put_into_cache(deb(tar(stamp_files()))))
        yield Stamps.load()


@pytest.fixture
def real_stamps(monkeypatch):
    monkeypatch.setenv("MOKA_CACHE", str(REAL_CACHE))
    monkeypatch.setattr(stamps_module, "TUXPAINT_STAMPS", TUXPAINT_STAMPS)
    prepared = cache_dir() / "data" / f"stamps-{TUXPAINT_STAMPS.version}-{stamps_module._FORM}"
    if not prepared.is_dir():
        pytest.skip("the photographs (161 MB) are not in the cache; Stamps.load() fetches them")
    return Stamps.load()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOKA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path) -> DebianPackage:
    """A package on a mirror of the test's own."""
    content = deb(tar({"./usr/a": b"abc"}))
    pinned = DebianPackage("thing", "1.0-1", hashlib.sha256(content).hexdigest(), 0.001, "GPL-2", tmp_path.as_uri())
    (tmp_path / pinned.filename).write_bytes(content)
    return pinned


def everything_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def media(sample: dict) -> list:
    return [part[part["type"]] for part in sample["messages"][0]["content"] if part["type"] != "text"]


def question(sample: dict) -> str:
    return "".join(part["text"] for part in sample["messages"][0]["content"] if part["type"] == "text")


def answer(sample: dict) -> str:
    return sample["messages"][1]["content"][0]["text"]


def as_bytes(medium) -> bytes:
    return medium.samples.tobytes() if isinstance(medium, Waveform) else medium.tobytes()


def frozen(sample: dict) -> tuple:
    return sample["id"], sample["category"], question(sample), answer(sample), *map(as_bytes, media(sample))


def known(stamps: Stamps) -> dict[bytes, set[tuple[str, int]]]:
    """Every stored picture and recording, by its bytes -> {(kind or language, item)}; a few are shared."""
    found: dict[bytes, set[tuple[str, int]]] = {}
    for index, item in enumerate(stamps.items):
        found.setdefault(stamps.picture(index).tobytes(), set()).add((item.kind, index))
        for code in item.sounds:
            found.setdefault(stamps.recording(index, code).tobytes(), set()).add((LANGUAGES[code], index))
    return found


# The package file


def test_a_package_is_downloaded_checked_and_kept(cache, package, capsys):
    path = fetch_deb(package)
    assert path == cache / "packages" / "thing_1.0-1_all.deb"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    assert "fetching thing" in capsys.readouterr().err
    assert fetch_deb(replace(package, pool="file:///absent")) == path  # no network needed any more
    assert everything_in(cache) == [path]


def test_a_package_with_another_hash_is_refused_and_deleted(cache, package):
    with pytest.raises(MokaError, match=f"has sha256 {package.sha256}, but {'0' * 64} is expected"):
        fetch_deb(replace(package, sha256="0" * 64))
    assert everything_in(cache) == []


@pytest.mark.parametrize("packing", ["xz", "gz", "bz2", ""])
def test_files_are_read_out_of_a_package_however_packed(tmp_path, packing):
    path = tmp_path / "x.deb"
    files = {"./usr/a.txt": b"abc", "usr/b.txt": b"", "./usr/c.png": b"picture"}
    path.write_bytes(deb(tar(files, packing), f"data.tar.{packing}".rstrip(".")))
    found = dict(package_files(path, lambda name: name.endswith(".txt")))
    assert found == {"usr/a.txt": b"abc", "usr/b.txt": b""}


def test_links_and_names_that_lead_out_are_passed_over(tmp_path):
    path = tmp_path / "x.deb"
    files = {"./usr/a": b"a", "/etc/passwd": b"b", "./usr/../../c": b"c"}
    path.write_bytes(deb(tar(files, links={"./usr/link": "/etc/passwd"})))
    assert dict(package_files(path, lambda name: True)) == {"usr/a": b"a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not a Debian package .no ar archive"),
        (ar({"debian-binary": b"2.0\n"}), "has no data.tar"),
        (deb(b"", "data.tar.zst"), "data.tar.zst, which this Python cannot unpack"),
        (deb(tar({"a": np.random.RandomState(0).bytes(5000)}))[:-2000], "is damaged"),
        (deb(b"no archive at all" * 99), "is damaged"),
    ],
)
def test_what_is_no_full_package_is_reported(tmp_path, content, message):
    path = tmp_path / "x.deb"
    path.write_bytes(content)
    with pytest.raises(MokaError, match=message):
        list(package_files(path, lambda name: True))


# The prepared data


def test_kept_are_the_items_with_a_photograph_and_a_caption(stamps):
    names = [item.name for item in stamps.items]
    assert len(names) == len(set(names)) == 10 * (len(KINDS) + 1)
    assert not any(word in name for name in names for word in ("symbols", "cartoon", "mirror", "no_caption", "drawn"))
    assert Counter(item.kind for item in stamps.items) == dict.fromkeys((*KINDS, ""), 10)
    item = next(item for item in stamps.items if item.name == "town/roadsigns/thing3")
    assert (item.kind, item.caption, set(item.sounds)) == ("sign", "A town/roadsigns 3.", set(LANGUAGES))
    assert (stamps.folder / "copyright").read_text() == "GPL-2\n"


def test_pictures_and_recordings_are_those_of_the_item(stamps):
    names = [item.name for item in stamps.items]
    for number, name in ((0, "animals/thing0"), (25, "plants/thing5")):
        image = stamps.picture(names.index(name))
        assert (image.mode, image.size) == ("RGB", (12, 8))
        assert image.getpixel((0, 0)) == (255, 255, 255)  # transparency over white
        assert image.getpixel((5, 5)) == (number, 255 - number, number // 2)
        for place, code in enumerate(LANGUAGES):
            samples = stamps.recording(names.index(name), code)
            assert samples.dtype == np.float32
            assert abs(len(samples) - 0.1 * RATE) < 20
            peak = np.abs(np.fft.rfft(samples, 16 * RATE)).argmax() / 16
            assert abs(peak - (200 + 10 * number + place)) < 0.7
            assert 0.2 < np.abs(samples).max() < 0.3


def test_large_pictures_are_scaled_down():
    small = stamps_module.small_picture(png(7, "RGB", (1024, 512)))
    assert (small.mode, small.size) == ("RGB", (256, 128))


def test_splits_are_by_item_disjoint_complete_and_keep_what_is_shared_together(stamps):
    parts = [set(stamps.split_indices(split).tolist()) for split in SPLITS]
    assert sorted(index for part in parts for index in part) == list(range(len(stamps.items)))
    names = [item.name for item in stamps.items]
    for kind in KINDS:
        shares = [sum(stamps.items[i].kind == kind for i in part) for part in parts]
        assert 6 <= shares[0] <= 8
        assert 1 <= shares[1] <= 2
        assert 2 <= shares[2] <= 3
    for folder in ("food", "plants", "animals"):
        pair = {names.index(f"{folder}/thing0"), names.index(f"{folder}/thing1")}
        assert sum(pair <= part for part in parts) == 1
        assert len({stamps.items[i].group for i in pair}) == 1
    with pytest.raises(MokaError, match="Did you mean 'validation'"):
        stamps.split_indices("validatoin")


def test_prepared_data_need_the_package_no_more(stamps, monkeypatch):
    monkeypatch.setattr(stamps_module, "fetch_deb", lambda package: pytest.fail("the package was asked for again"))
    assert Stamps.load().items == stamps.items


def test_damaged_prepared_data_are_reported(stamps, tmp_path):
    broken = replace(stamps, folder=tmp_path)
    for read in (lambda: broken.sound, lambda: broken.picture(0)):
        with pytest.raises(MokaError, match="is damaged; delete it and run again"):
            read()


# The questions


@pytest.mark.parametrize("split", ["validation", "test"])
def test_fixed_lists_are_balanced_correct_and_of_their_split_only(stamps, split):
    samples = list(PhotographsTask(split=split))
    assert len(samples) == DEFAULT_SIZES[split]
    each = DEFAULT_SIZES[split] // len(CATEGORIES)
    counts = Counter((s["category"], answer(s)) for s in samples)
    assert {n for (category, _), n in counts.items() if category in ("kind", "language")} == {each // 6}
    assert counts["both", "yes"] == counts["both", "no"] == each // 2
    assert len({s["id"] for s in samples}) == len(samples)
    allowed, truth = set(stamps.split_indices(split).tolist()), known(stamps)
    for sample in samples:
        (kind, language) = shown = [
            next(label for label, item in truth[as_bytes(medium)] if item in allowed) for medium in media(sample)
        ]
        expected = {"kind": kind, "language": language, "pair": f"{kind}, {language}"}.get(sample["category"])
        if expected is None:
            asked = question(sample).replace("a household item", "household")
            expected = "yes" if all(word in asked for word in shown) else "no"
        assert answer(sample) == expected


def test_corrupted_media_show_another_kind_or_language(stamps):
    plain = PhotographsTask(split="test", size=120)
    some = PhotographsTask(split="test", size=120, knobs=Knobs(corrupt={"visual": 0.3, "audio": 0.3}))
    truth = {key: {label for label, _ in labels} for key, labels in known(stamps).items()}
    corrupted = Counter()
    for before, after in zip(plain, some, strict=True):
        assert (question(before), answer(before)) == (question(after), answer(after))
        for name, one, other in zip(("visual", "audio"), media(before), media(after), strict=True):
            noted = name in after["knobs"]["corrupt"]
            assert truth[as_bytes(one)].isdisjoint(truth[as_bytes(other)]) == noted
            corrupted[name] += noted
    assert min(corrupted.values()) >= 20


def test_neither_medium_only_answers_what_asks_for_both(stamps):
    """The best rule that looks at one medium and the question: yes where that medium has what is asked for."""
    truth = {key: {label for label, _ in labels} for key, labels in known(stamps).items()}
    samples = [s for s in PhotographsTask(split="test") if s["category"] == "both"]
    for place in (0, 1):
        fits = Counter()
        for sample in samples:
            asked = question(sample).replace("a household item", "household")
            has = any(label and label in asked for label in truth[as_bytes(media(sample)[place])])
            fits[has, answer(sample)] += 1
        assert fits[False, "yes"] == 0
        best = sum(max(fits[has, "yes"], fits[has, "no"]) for has in (True, False))
        assert best == 3 * len(samples) // 4


def test_a_training_item_depends_on_seed_and_index_only(stamps):
    for stage in (1, 2):
        task, again = PhotographsTask(stage=stage, seed=3), PhotographsTask(stage=stage, seed=3, size=50)
        backwards = {i: frozen(again[i]) for i in reversed(range(20))}
        assert [frozen(task[i]) for i in range(20)] == [backwards[i] for i in range(20)]
        other = PhotographsTask(stage=stage, seed=4)
        assert [frozen(task[i])[2:] for i in range(20)] != [frozen(other[i])[2:] for i in range(20)]


def test_a_smaller_fixed_list_is_the_beginning_of_the_full_one_whatever_the_seed(stamps):
    full, part = PhotographsTask(split="test"), PhotographsTask(split="test", size=12, seed=7)
    assert [frozen(full[i]) for i in range(12)] == [frozen(s) for s in part]


def test_augmentation_varies_the_media_but_not_the_questions_or_the_items(stamps):
    plain, varied = PhotographsTask(augment=False), PhotographsTask()
    train = set(stamps.split_indices("train").tolist())
    truth = known(stamps)
    changed = 0
    for i in range(40):
        (image, sound), (image2, sound2) = media(plain[i]), media(varied[i])
        assert frozen(plain[i])[:4] == frozen(varied[i])[:4]
        assert any(item in train for _, item in truth[as_bytes(image)])
        gains = sound2.samples[sound.samples != 0] / sound.samples[sound.samples != 0]
        assert 0.49 < gains.min() < gains.max() < 2.01
        assert np.ptp(gains) < 1e-3
        changed += as_bytes(image) != as_bytes(image2)
        assert image2.getpixel((5, 5)) == image.getpixel((5, 5))
    assert changed > 20


def test_stage_1_pairs_a_photograph_with_its_caption_or_kind_and_a_recording_with_its_language(stamps):
    truth = known(stamps)
    samples = list(PhotographsTask(size=200, stage=1, augment=False))
    assert [s["category"] for s in samples] == ["photograph", "recording"] * 100
    captions = 0
    for sample in samples:
        (medium,) = media(sample)
        assert question(sample) == ""
        labels = truth[as_bytes(medium)]
        if sample["category"] == "photograph" and answer(sample) not in KINDS:
            captions += 1
            assert answer(sample) in {stamps.items[item].caption for _, item in labels}
        else:
            assert answer(sample) in {label for label, _ in labels}
    assert captions == 25
    assert {answer(s) for s in samples if s["category"] == "recording"} == set(NAMES)


@pytest.mark.parametrize("stage", [1, 2])
def test_samples_are_in_the_normal_form_of_the_schema(stamps, stage):
    for sample in PhotographsTask(size=10, stage=stage):
        assert frozen(check_sample(sample, "embedded:1")) == frozen(sample)
        assert all(medium.rate == RATE for medium in media(sample) if isinstance(medium, Waveform))


def test_loader_workers_get_the_task_without_the_sound_in_it(stamps):
    task = PhotographsTask(size=5)
    assert frozen(task[-1]) == frozen(task[4])
    with pytest.raises(IndexError):
        task[5]
    sent = pickle.dumps(task)
    assert len(sent) < stamps.sound.nbytes / 4
    assert frozen(pickle.loads(sent)[2]) == frozen(task[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "photograph"}, "Did you mean 'photographs'"),
        ({"split": "valid"}, "train, validation, test"),
        ({"stage": 3}, "stage is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"size": 0}, "size is 0"),
        ({"split": "test", "size": 721}, "720 questions"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_fetched(cache, arguments, message):
    with pytest.raises(MokaError, match=message):
        PhotographsTask(**arguments)
    assert not cache.exists()


# The real package


def test_the_real_package_has_430_photographs_and_2537_recordings(real_stamps):
    assert len(real_stamps.items) == 430
    assert sum(len(item.sounds) for item in real_stamps.items) == 2537
    kinds = {"animal": 128, "food": 50, "plant": 39, "household": 31, "sign": 20, "vehicle": 17, "": 145}
    assert Counter(item.kind for item in real_stamps.items) == kinds
    assert [len(real_stamps.split_indices(split)) for split in SPLITS] == [302, 42, 86]
    tested = [real_stamps.items[i].caption for i in real_stamps.split_indices("test")[:4]]
    assert tested == GOLDEN_CAPTIONS
    assert json.loads((real_stamps.folder / "items.json").read_text())[0]["name"] == real_stamps.items[0].name


def test_the_real_questions_never_change(real_stamps):
    asked = [(question(s), answer(s)) for s in PhotographsTask(split="test", size=4)]
    assert asked == GOLDEN_QUESTIONS


def test_other_names_of_encoders_pass_through_and_unknown_ones_are_reported():
    assert resolve_encoder_file("some/file.pth") == "some/file.pth"
    with pytest.raises(MokaError, match="Did you mean 'embedded:efficientnet-lite0'"):
        resolve_encoder_file("embedded:efficientnet-lite")
