"""Mixtures by weight, and streams: every batch is read once, whoever reads it, and a run resumes where it stopped."""

import io
import itertools
import json
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moka.data import open_samples
from moka.data import streaming as streaming_module
from moka.data.sources import is_streamed, mixture_of
from moka.data.streaming import EncodedStream, JsonlLines, SampleStream, TarShards, expand_shards
from moka.errors import MokaError
from moka.modeling.processing import TooLongError


def sample(name, text="yes"):
    content = [{"type": "text", "text": f"question {name}"}]
    return {"id": str(name), "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": text}]}


def write_jsonl(path, names):
    path.write_text("".join(json.dumps(sample(name)) + "\n" for name in names))
    return path


class Words:
    """A processor whose model inputs name the sample."""

    def encode(self, messages, max_length=None, truncate=False):
        words = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if "long" in words[0]:
            raise TooLongError("too long")
        return {"input_ids": words, "labels": [-100, 1]}


def names_of(dataset, number):
    return [one["sample_id"] for one in itertools.islice(dataset, number)]


@pytest.fixture
def stream(tmp_path):
    first = JsonlLines(write_jsonl(tmp_path / "a.jsonl", [f"a{n}" for n in range(30)]))
    second = JsonlLines(write_jsonl(tmp_path / "b.jsonl", [f"b{n}" for n in range(50)]))
    return SampleStream([first, second], [3, 1], seed=1, buffer=10)


def read(stream, rank, world, worker=0, workers=1, start=0, batches=6, batch_size=4):
    """The batches that one worker of one process yields."""
    dataset = EncodedStream(stream, Words(), None, batch_size)
    dataset.share, dataset.start = (rank, world), start
    patched = None if workers == 1 else SimpleNamespace(id=worker, num_workers=workers)
    original = streaming_module.get_worker_info
    streaming_module.get_worker_info = lambda: patched
    try:
        names = names_of(dataset, batches * batch_size)
    finally:
        streaming_module.get_worker_info = original
    return [names[k : k + batch_size] for k in range(0, len(names), batch_size)]


def test_processes_and_workers_share_the_stream_evenly_and_read_nothing_twice(stream):
    single = [name for batch in read(stream, 0, 1, batches=12) for name in batch]
    by_rank = [read(stream, rank, 2, batches=6) for rank in range(2)]
    assert [name for step in zip(*by_rank, strict=True) for batch in step for name in batch] == single
    workers = [read(stream, 1, 2, worker, 3, batches=2) for worker in range(3)]
    assert [batch for turn in zip(*workers, strict=True) for batch in turn] == by_rank[1]


def test_a_stream_resumes_at_its_batch_also_on_other_processes(stream):
    full = [read(stream, rank, 2, batches=6) for rank in range(2)]
    assert [read(stream, rank, 2, start=4, batches=2) for rank in range(2)] == [batches[4:] for batches in full]
    single = [name for batch in read(stream, 0, 1, start=4, batches=4, batch_size=8) for name in batch]
    assert single[:16] == [name for step in range(4, 6) for batches in full for name in batches[step]]


def test_every_pass_has_every_sample_once_in_an_order_of_its_own(tmp_path):
    source = JsonlLines(write_jsonl(tmp_path / "a.jsonl", range(40)))
    stream = SampleStream([source], [1], seed=3, buffer=15)
    names = [source.read(reference)["id"] for _, reference in itertools.islice(stream, 80)]
    assert sorted(map(int, names[:40])) == sorted(map(int, names[40:])) == list(range(40))
    assert names[:40] != names[40:]
    assert names == [source.read(reference)["id"] for _, reference in itertools.islice(stream, 80)]
    other = SampleStream([source], [1], seed=4, buffer=15)
    assert names[:40] != [source.read(reference)["id"] for _, reference in itertools.islice(other, 40)]


def test_weights_are_the_shares_of_the_stream(stream):
    names = [one["sample_id"] for one in itertools.islice(EncodedStream(stream, Words(), None, 1), 2000)]
    assert sum(name.startswith("a") for name in names) / 2000 == pytest.approx(0.75, abs=0.03)


def test_weights_of_data_sets_are_the_shares_of_the_samples(tmp_path):
    sources = [
        {"source": str(write_jsonl(tmp_path / "a.jsonl", [f"a{n}" for n in range(100)])), "weight": 1},
        {"source": str(write_jsonl(tmp_path / "b.jsonl", [f"b{n}" for n in range(20)])), "weight": 3},
    ]
    mixed = open_samples(sources, "train", seed=5)
    names = [mixed[i]["id"] for i in range(len(mixed))]
    assert len(names) == 120
    from_b = [name for name in names if name.startswith("b")]
    assert len(from_b) == 90
    assert {from_b.count(f"b{n}") for n in range(20)} <= {4, 5}
    assert len({name for name in names if name.startswith("a")}) == 30
    assert names == [one["id"] for one in open_samples(sources, "train", seed=5)]
    assert names != [one["id"] for one in open_samples(sources, "train", seed=6)]
    assert len(open_samples(sources, "train", size=7)) == 7


@pytest.fixture
def shards(tmp_path):
    """Two tar shards of three samples, with a picture each."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:03d}.tar", "w") as file:
            for number in range(3):
                key = f"{shard}{number}"
                picture = io.BytesIO()
                Image.new("L", (4, 4), 10 * int(key)).save(picture, "PNG")
                content = [{"type": "image", "image": "png"}, {"type": "text", "text": f"question {key}"}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
                for name, data in (
                    (f"{key}.json", json.dumps({"messages": messages}).encode()),
                    (f"{key}.png", picture.getvalue()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return tmp_path


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000..001}.tar"])
def test_tar_shards_give_their_samples_with_their_media(shards, pattern):
    source = TarShards(str(shards / pattern))
    found = [source.read(reference) for reference in source.references(np.random.default_rng(0))]
    assert sorted(one["id"] for one in found) == ["00", "01", "02", "10", "11", "12"]
    for one in found:
        picture = Image.open(io.BytesIO(one["messages"][0]["content"][0]["image"]))
        assert picture.getpixel((0, 0)) == 10 * int(one["id"])


def test_sources_of_a_configuration_become_one_stream(shards):
    lines = write_jsonl(shards / "chat.jsonl", [f"line{n}" for n in range(9)])
    source = [
        {"source": str(shards / "train-*.tar"), "weight": 0.5},
        {"source": str(lines), "streaming": True, "weight": 0.25},
        {"source": str(lines), "weight": 0.25},
    ]
    assert is_streamed(source)
    stream = open_samples(source, "train", seed=2)
    names = {one["id"] for one in stream.first(80)}
    assert {"00", "12", "line0"} <= names
    assert is_streamed(str(shards / "train-*.tar"))
    assert mixture_of(str(lines)) is None


def test_rows_of_tables_are_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": str(n), "messages": sample(n)["messages"]} for n in range(6)]
    for row in rows:
        row["messages"][0]["content"] = row["messages"][0]["content"][0]["text"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train-0.parquet")
    source = {"source": {"format": "messages", "hub": str(tmp_path)}, "streaming": True}
    assert sorted(one["id"] for one in open_samples(source, "train").first(6)) == list("012345")


def test_samples_that_cannot_be_used_are_replaced_and_reported(tmp_path):
    source = JsonlLines(write_jsonl(tmp_path / "a.jsonl", [*range(10), "long", *range(11, 20)]))
    report = tmp_path / "dropped.jsonl"
    dataset = EncodedStream(SampleStream([source], [1], buffer=1), Words(), None, 4, report_path=report)
    names = names_of(dataset, 20)
    assert "long" not in names
    assert len(names) == 20
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert ["long" in record["reason"] for record in records] == [True]


def test_media_that_cannot_be_used_end_a_stream_or_count_against_the_budget(tmp_path):
    bad = sample("bad")
    bad["messages"][0]["content"].insert(0, {"type": "image", "image": "absent.png"})
    lines = [*[sample(n) for n in range(300)], bad]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    stream = SampleStream([JsonlLines(path)], [1], buffer=1)
    with pytest.raises(MokaError, match=r"'bad'.*absent\.png"):
        names_of(EncodedStream(stream, Words(), None, 1), 301)
    assert len(names_of(EncodedStream(stream, Words(), None, 1, on_bad_media="skip"), 301)) == 301
    with pytest.raises(MokaError, match=r"bad_media_budget=0\.001"):
        names_of(EncodedStream(stream, Words(), None, 1, on_bad_media="skip", budget=0.001), 301)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([{"source": "a.jsonl", "wieght": 1}], ["'wieght'", "weight"]),
        ([{"source": "a.jsonl", "weight": 0}], ["weight", "0"]),
        ([{"source": "a.jsonl", "weight": True}], ["weight", "True"]),
        ([{"source": None}], ["source", "None"]),
        ([{"source": "a.jsonl", "buffer": 0}], ["buffer", "0"]),
        ("absent-*.tar", ["absent-*.tar"]),
        ([{"source": "embedded:audio-visual-text", "streaming": True}], ["streaming", "embedded:audio-visual-text"]),
        ([{"source": {"format": "ave", "hub": "x"}, "streaming": True}], ["'ave'", "messages"]),
    ],
)
def test_bad_sources_are_refused_by_key(source, words):
    with pytest.raises(MokaError) as error:
        open_samples(source, "train")
    assert all(word in str(error.value) for word in words)


def test_damaged_shards_and_wrong_members_are_named(shards):
    (shards / "train-001.tar").write_bytes(b"no tar" * 300)
    source = TarShards(str(shards / "train-001.tar"))
    with pytest.raises(MokaError, match=r"train-001\.tar"):
        list(source.references(np.random.default_rng(0)))
    with pytest.raises(MokaError, match="002"):
        expand_shards(str(shards / "train-{000..002}.tar"))
    good = TarShards(str(shards / "train-000.tar"))
    reference = next(good.references(np.random.default_rng(0)))
    lost = streaming_module.TarSample(
        reference.shard, reference.key, {f"{reference.key}.json": next(iter(reference.members.values()))}
    )
    with pytest.raises(MokaError, match="png"):
        good.read(lost)


FLAT = """
import json, resource, sys
from moka.data.streaming import JsonlLines, SampleStream
path = sys.argv[1]
text = "x" * 2000
with open(path, "w") as file:
    for n in range(100_000):
        file.write(json.dumps({"id": str(n), "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "y"}]}) + "\\n")
stream = iter(SampleStream([JsonlLines(path)], [1]))
peaks = []
for n in range(100_000):
    source, reference = next(stream)
    source.read(reference)
    if n in (2_000, 99_999):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_rows(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 20  # MiB; the file has 200
