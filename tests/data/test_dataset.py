"""Samples of a source, parts of them, and several sources as one."""

import numpy as np
import pytest

from moka.data.dataset import SampleDataset
from moka.errors import MokaError


class Numbers(SampleDataset):
    """Samples "a0", "a1", ...; each read is counted."""

    def __init__(self, name, size, root=None, media=None):
        self.name, self.size, self.media_root, self.media = name, size, root, media
        self.notes, self.reads = (f"of {name}",), []

    def __len__(self):
        return self.size

    def where(self, index):
        return f"{self.name}:{index}"

    def read(self, index):
        self.reads.append(index)
        text = [{"type": "text", "text": str(index)}]
        media = [{"type": "image", "image": self.media}] if self.media else []
        chat = [{"role": "user", "content": [*media, *text]}, {"role": "assistant", "content": "yes"}]
        return {"id": f"{self.name}{index}", "messages": chat}


def ids(dataset):
    return [sample["id"] for sample in dataset]


def test_select_and_concat_are_those_of_lists():
    a, b = Numbers("a", 5), Numbers("b", 3)
    expected = [*ids(a), *ids(b)]
    joined = SampleDataset.concat([a, b])
    assert ids(joined) == expected
    for chosen in ([0, 7, 7, 2], np.array([6, 1]), range(2, 8, 2), []):
        part = joined.select(chosen)
        assert ids(part) == [expected[i] for i in chosen]
        assert len(part) == len(chosen)
        assert [part.where(i) for i in range(len(part))] == [f"{expected[i][0]}:{expected[i][1:]}" for i in chosen]
    nested = SampleDataset.concat([joined.select([7, 0]), a.first(2), b.first(9), b.first(None)]).select([1, 3, 4])
    assert ids(nested) == ["a0", "a1", "b0"]
    assert joined[-1]["id"] == "b2"
    assert joined.notes == ("of a", "of b")
    for beyond in (8, -9):
        with pytest.raises(IndexError, match=f"sample {beyond} of 8"):
            joined[beyond]


def test_a_sample_is_read_and_checked_where_it_is_stored():
    class Broken(Numbers):
        def read(self, index):
            return {"id": "x", "messages": []}

    with pytest.raises(MokaError, match=r"^b:1: messages is empty"):
        SampleDataset.concat([Numbers("a", 2), Broken("b", 2)]).select([3])[0]


@pytest.mark.parametrize("weights", [(1, 3), (1, 1), (1, 1e-9)])
def test_a_mixture_has_the_shares_of_its_weights(weights):
    parts = [Numbers("a", 100), Numbers("b", 20)]
    mixed = SampleDataset.mix(parts, weights, seed=5)
    names = ids(mixed)
    assert len(names) == 120
    of_b = [name for name in names if name.startswith("b")]
    assert len(of_b) == round(120 * weights[1] / sum(weights))
    counts = {of_b.count(f"b{n}") for n in range(20)}
    assert max(counts) - min(counts) <= 1
    assert names == ids(SampleDataset.mix(parts, weights, seed=5)) != ids(SampleDataset.mix(parts, weights, seed=6))


def test_missing_media_are_looked_for_once_and_in_sources_of_files_only(tmp_path):
    files, memory = Numbers("a", 4, tmp_path, "gone.png"), Numbers("b", 4)
    joined = SampleDataset.concat([memory, files]).select([5, 5, 1, 7])
    assert joined.missing_media() == [f"a:1: image {tmp_path / 'gone.png'}: does not exist"]
    assert files.reads == [1, 3]
    assert memory.reads == []
    assert memory.missing_media() == []
    assert joined.media_root == tmp_path


def test_paths_of_several_sources_start_from_the_folder_of_all(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    joined = SampleDataset.concat([Numbers(name, 1, tmp_path / name, "a.png") for name in ("x", "y")])
    assert joined.media_root == tmp_path
    assert [sample["messages"][0]["content"][0]["image"] for sample in joined] == [
        str(tmp_path / name / "a.png") for name in ("x", "y")
    ]
