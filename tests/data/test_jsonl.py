"""A JSONL file as a dataset: places in messages, media paths that stay inside, and the check before training."""

from __future__ import annotations

import json
import pickle

import pytest

from moka.data.jsonl import JsonlDataset
from moka.data.schema import media_parts
from moka.errors import MokaError


def sample(name, image=None):
    content = [{"type": "text", "text": f"Question {name} ?"}]
    if image is not None:
        content.insert(0, {"type": "image", "image": str(image)})
    return {
        "id": name,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"Ä {name}"}],
    }


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def image_path(checked):
    return next(medium for _, medium in media_parts(checked))


def test_each_line_is_found_by_its_index_past_blank_lines_and_wide_characters(tmp_path):
    rows = [sample(f"é{i}" * (i + 1)) for i in range(5)]
    text = "\ufeff" + "\r\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode("utf-8"))
    dataset = JsonlDataset(path)
    assert len(dataset) == 5
    assert [dataset[i]["id"] for i in (3, 0, 4, 1, 2, -1)] == [rows[i]["id"] for i in (3, 0, 4, 1, 2, -1)]
    assert [checked["id"] for checked in dataset] == [row["id"] for row in rows]  # ends by IndexError
    assert pickle.loads(pickle.dumps(dataset))[2] == dataset[2]  # loader workers that are spawned


def test_mistakes_are_reported_with_the_line_number_of_the_file(tmp_path):
    rows = [sample("a"), "", '{"messages": [', {"messages": []}, {"messages": [{"role": "bot", "content": "x"}]}]
    path = write(tmp_path / "train.jsonl", *rows)
    dataset = JsonlDataset(path)
    for index, line, words in [(1, 3, "not valid JSON"), (2, 4, "messages is empty"), (3, 5, "messages[0].role")]:
        with pytest.raises(MokaError) as error:
            dataset[index]
        assert str(error.value).startswith(f"{path}:{line}: ")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_indented_json_is_recognised(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps([sample("a")], indent=2))
    with pytest.raises(MokaError, match=r"train\.jsonl:1: .*JSON array"):
        JsonlDataset(path)[0]


def test_bytes_that_are_not_utf8_are_reported(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(MokaError, match=r"train\.jsonl:1: .*utf-8"):
        JsonlDataset(path)[0]


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ("", "empty"), ("\n \n", "blank lines only")])
def test_a_file_without_samples_is_an_error_at_once(tmp_path, content, words):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MokaError, match=words) as error:
        JsonlDataset(path)
    assert str(path) in str(error.value)


def test_require_answer_is_passed_on(tmp_path):
    path = write(tmp_path / "ask.jsonl", {"messages": [{"role": "user", "content": "?"}]})
    assert JsonlDataset(path, require_answer=False)[0]["id"] == "ask.jsonl:1"
    with pytest.raises(MokaError, match="no assistant message"):
        JsonlDataset(path)[0]


def test_paths_start_from_the_file_or_from_the_media_root(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    inside = media.resolve() / "x.png"
    path = write(tmp_path / "train.jsonl", sample("a", "x.png"), sample("b", "sub/../x.png"), sample("c", inside))
    assert image_path(JsonlDataset(path)[0]) == str(tmp_path.resolve() / "x.png")
    assert [image_path(checked) for checked in JsonlDataset(path, media_root=media)] == [str(inside)] * 3
    with pytest.raises(MokaError, match=r"media_root .* is not a folder"):
        JsonlDataset(path, media_root=tmp_path / "nowhere")


def test_paths_that_leave_the_media_root_are_refused(tmp_path):
    media, outside = tmp_path / "media", tmp_path / "media-private"  # a prefix of its name is not inside it
    media.mkdir()
    outside.mkdir()
    (outside / "x.png").write_bytes(b"x")
    (media / "link.png").symlink_to(outside / "x.png")
    (media / "folder").symlink_to(outside)
    (media / "within.png").symlink_to(media / "real.png")
    leaving = ["../media-private/x.png", str(outside / "x.png"), "link.png", "folder/x.png", "a/../../x.png"]
    path = write(media / "train.jsonl", *(sample(p, p) for p in leaving), sample("ok", "within.png"))
    dataset = JsonlDataset(path)
    for index, given in enumerate(leaving):
        with pytest.raises(MokaError, match="outside the media root") as error:
            dataset[index]
        assert str(error.value).startswith(f"{path}:{index + 1}: image path {given!r}")
    assert image_path(dataset[len(leaving)]) == str(media.resolve() / "real.png")


def test_missing_media_lists_each_file_once_with_its_place_and_the_total(tmp_path):
    (tmp_path / "good.png").write_bytes(b"x")
    (tmp_path / "zero.png").touch()
    (tmp_path / "folder").mkdir()
    names = ["good.png", "gone.png", "zero.png", "gone.png", "folder", "gone2.png", "gone3.png"]
    path = write(tmp_path / "train.jsonl", *(sample(str(i), name) for i, name in enumerate(names)))
    dataset = JsonlDataset(path)
    found = dataset.missing_media()
    assert len(found) == 5
    for line, name, number, problem in zip(
        found,
        ["gone.png", "zero.png", "folder", "gone2.png", "gone3.png"],
        [2, 3, 5, 6, 7],
        ["does not exist", "0 bytes", "folder", "does not exist", "does not exist"],
        strict=True,
    ):
        assert line.startswith(f"{path}:{number}: image {tmp_path.resolve() / name}: ")
        assert problem in line
    assert dataset.missing_media(limit=2) == [*found[:2], "... and 3 more: 5 media files are missing in all"]
    assert JsonlDataset(write(tmp_path / "ok.jsonl", sample("a", "good.png"), sample("b"))).missing_media() == []


def test_a_short_check_shows_no_progress_bar(tmp_path, capfd):
    JsonlDataset(write(tmp_path / "train.jsonl", sample("a"))).missing_media()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content", ['{"id": ' + "9" * 5000 + "}", "[" * 100_000, '{"id": "\\ud8"}'], ids=["digits", "depth", "escape"]
)
def test_json_that_the_parser_refuses_is_reported_with_its_line(tmp_path, content):
    path = write(tmp_path / "train.jsonl", sample("a"))
    path.write_text(path.read_text() + content + "\n")
    with pytest.raises(MokaError, match=r"train\.jsonl:2: "):
        JsonlDataset(path)[1]
