"""Records that are not of their format are reported with file, place, field and value, when they are read."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from moka.data.formats import FORMATS, open_format
from moka.errors import MokaError

FIXTURES = Path(__file__).parent / "fixtures"
# Format -> its file in the fixtures, the key of the list of records (if any), and how it is opened.
FILES = {
    "a-okvqa": ("aokvqa_v1p0_train.json", None, {}),
    "music-avqa": ("avqa-val.json", None, {"split": "validation"}),
    "music-avqa-reasoning": ("train_samples_with_reasoning_avqa.json", None, {}),
    "seed-bench": ("SEED-Bench.json", "questions", {}),
    "mmau": ("mmau-test-mini.json", None, {}),
    "air-bench": ("Foundation/Foundation_meta.json", None, {}),
    "salmonn": ("salmonn_stage2_data.json", "annotation", {"corpus": "all"}),
}


def failing(root, name, index, words, place, **options):
    with pytest.raises(MokaError, match=re.escape(words)) as error:
        open_format(name, root, **options)[index]
    assert str(error.value).startswith(f"{place}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "index", "fields", "words"),
    [
        ("a-okvqa", 0, {"correct_choice_idx": 4}, "field 'correct_choice_idx' is 4; a number from 0 to 3"),
        ("a-okvqa", 0, {"correct_choice_idx": "D"}, "field 'correct_choice_idx' is 'D'"),
        ("a-okvqa", 0, {"choices": ["one"]}, "field 'choices' is"),
        ("a-okvqa", 0, {"image_id": "x"}, "is not a record of format a-okvqa"),
        ("music-avqa", 0, {"anser": "trombone"}, "field 'answer' is 'trombone'; allowed are one of 42"),
        ("music-avqa", 0, {"anser": None}, "field 'anser' or 'answer' is missing"),
        ("music-avqa", 0, {"question_content": "Is the <Object> there?"}, "templ_values has 0 values for the 1 slot"),
        ("music-avqa", 0, {"templ_values": "[oh"}, "field 'templ_values' is '[oh'"),
        ("music-avqa", 0, {"video_id": True}, "field 'video_id' is True"),
        ("music-avqa-reasoning", 1, {"rationale": None}, "field 'reasoning' or 'rationale'"),
        ("seed-bench", 1, {"answer": "E"}, "field 'answer' is 'E'; allowed are A, B, C, D"),
        ("seed-bench", 1, {"question_type_id": 99}, "field 'question_type_id' is '99'; allowed are 1, 2"),
        ("seed-bench", 1, {"choice_b": None}, "field 'choice_b' is missing"),
        ("seed-bench", 1, {"data_type": None}, "field 'data_type' is missing"),
        ("mmau", 0, {"answer": "Phoebe"}, "field 'answer' is 'Phoebe'; allowed are Monica"),
        ("mmau", 0, {"choices": "a, b"}, "field 'choices' is 'a, b'"),
        ("mmau", 0, {"task": None}, "field 'task' is missing"),
        ("air-bench", 1, {"answer_gt": "never"}, "field 'answer_gt' is 'never'; allowed are"),
        ("salmonn", 2, {"task": "sing"}, "field 'task' is 'sing'; allowed are asr"),
        ("salmonn", 2, {"path": None}, "field 'path' is missing"),
    ],
)
def test_a_bad_record_of_a_json_file(tmp_path, name, index, fields, words):
    file, key, options = FILES[name]
    path = Path(shutil.copytree(FIXTURES / name, tmp_path / name)) / file
    full = json.loads(path.read_text("utf-8"))
    (full[key] if key else full)[index].update(fields)
    path.write_text(json.dumps(full), "utf-8")
    failing(tmp_path / name, name, index, words, f"{path}: record {index + 1}", **options)


CAPTIONS = "audiocap_id,youtube_id,start_time,caption\n"
POPE = '{"question_id": 1, "image": "a.jpg", "text": "?", "label": "no"}\n'


@pytest.mark.parametrize(
    ("name", "file", "text", "index", "line", "words"),
    [
        ("ave", "trainSet.txt", "Bark&a&good&1&9\nBark&x&good&1\n", 1, 2, "has 4 fields"),
        ("ave", "trainSet.txt", "Bark&a&good&1&9\nBark\n", 1, 2, "has 1 field;"),
        ("ave", "trainSet.txt", "Bark&x&good&one&9\n", 0, 1, "'one&9'"),
        ("ave", "trainSet.txt", "Bark&x&good&9&1\n", 0, 1, "'9&1'"),
        ("ave", "trainSet.txt", "Barc&x&good&1&9\n", 0, 1, "field 'Category' is 'Barc'; allowed are one of 28"),
        (
            "pope",
            "coco_pope_random.json",
            POPE + POPE.replace("no", "maybe"),
            1,
            2,
            "'label' is 'maybe'; allowed are yes",
        ),
        ("pope", "coco_pope_random.json", POPE + POPE.replace("text", "txt"), 1, 2, "field 'text' is missing"),
        ("pope", "coco_pope_random.json", POPE + '{"question_id": 1,', 1, 2, "not valid JSON"),
        ("mme", "count/a.txt", "How many? Please answer yes or no.\n", 0, 1, "a tab"),
        ("librispeech", "dev-clean/84/1/84-1.trans.txt", "84-1-0000\n", 0, 1, "is '84-1-0000'"),
        ("audiocaps", "train.csv", CAPTIONS + '1,x,0,"two\nlines"\n2,y,0,\n', 1, 4, "field 'caption' is empty"),
    ],
)
def test_a_bad_line_of_a_text_file(tmp_path, name, file, text, index, line, words):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    options = {"librispeech": {"split": "dev-clean"}, "pope": {"splits": "random"}}.get(name, {})
    if name == "mme":
        for task in ["existence", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]:
            (tmp_path / task).mkdir()
            (tmp_path / task / "b.txt").write_text("?\tYes\n?\tNo\n")
        index = [entry.place for entry in open_format("mme", tmp_path).rows.items].index(f"{path}:1")
    failing(tmp_path, name, index, words, f"{path}:{line}", **options)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("answer", "D", "field 'answer' is 'D'; allowed are A, B, C"),
        ("image", "999", "image is '999'"),
        pytest.param("image", "é" * 80, "image is not base64", id="not ASCII"),
        pytest.param("image", "=a" * 40, "image is not base64", id="not base64"),
        ("index", "x", "field 'index' is 'x'"),
    ],
)
def test_a_bad_row_of_mmbench(tmp_path, column, value, words):
    path = Path(shutil.copytree(FIXTURES / "mmbench", tmp_path / "x")) / "mmbench_dev_20230712.tsv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows[0][column] = value
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    for circular in (False, True):
        failing(path.parent, "mmbench", 0, words, f"{path}: row 1", circular=circular)


@pytest.mark.parametrize(
    ("name", "file", "text", "words"),
    [
        ("audiocaps", "train.csv", "audiocap_id,youtube_id,start_time\n1,x,0\n", "no column caption"),
        ("audiocaps", "train.csv", CAPTIONS, "has no records"),
        ("mmbench", "MMBench_DEV_EN.tsv", "index\tquestion\tA\tB\n1\t?\tx\ty\n", "no column image"),
        ("seed-bench", "SEED-Bench.json", '{"questions": []}', "question_type"),
        ("mmau", "mmau-test-mini.json", '{"a": 1}', "a list of records"),
        ("gigaspeech", "GigaSpeech.json", '{"audios": [{"aid": "x"}]}', "record 1: has no list 'segments'"),
        ("gigaspeech", "GigaSpeech.json", '{"audios": [{"segments": [{"sid": "x"}]}]}', "segment 1: field 'subsets'"),
        (
            "gigaspeech",
            "GigaSpeech.json",
            '{"audios": [{"segments": [{"sid": "x", "subsets": ["{M}"]}]}]}',
            "record 1, segment 1: field 'text_tn' or 'text_tts' is missing",
        ),
    ],
)
def test_a_file_of_another_content(tmp_path, name, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(MokaError, match=re.escape(words)):
        open_format(name, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_layout_names_the_files_looked_for_and_what_is_expected(name, tmp_path):
    with pytest.raises(MokaError, match="Expected under the root" if name != "librispeech" else "Unpack") as error:
        open_format(name, tmp_path, FORMATS[name].splits[-1])
    assert f"format {name}: looked for {tmp_path}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("mme", {"tasks": "perceptio"}, "option tasks is 'perceptio'; allowed are perception, .*'perception'"),
        ("pope", {"splits": ["randon"]}, "option splits is 'randon'.*'random'"),
        ("seed-bench", {"tasks": "images"}, "option tasks is 'images'.*'image'"),
        ("mmau", {"task": "speach"}, "option task is 'speach'.*'speech'"),
        ("air-bench", {"tasks": "musik"}, "option tasks is 'musik'.*'music'"),
        ("music-avqa", {"answer": "tag"}, "option answer is 'tag'; allowed are tagged, word"),
        ("librispeech", {"case": "upper"}, "option case is 'upper'; allowed are lower, as-is"),
        ("gigaspeech", {"subset": "XXL"}, "option subset is 'XXL'; allowed are XS, S, M, L, XL"),
        ("a-okvqa", {"answer": "leter"}, "option answer is 'leter'; allowed are letter, text.*'letter'"),
        ("mmbench", {"circular": "yes"}, "option circular is 'yes'; true or false"),
    ],
)
def test_an_unknown_value_of_an_option(name, option, words):
    with pytest.raises(MokaError, match=f"format {name}: {words}"):
        open_format(name, FIXTURES / name, **option)
