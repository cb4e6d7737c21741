"""Asking a benchmark: every answer is kept, an interrupted evaluation continues, and nothing is lost in silence."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from moka.data.media import MediaDecoding
from moka.data.media_io import BadMediaError
from moka.errors import MokaError
from moka.evaluation import ask, score
from moka.evaluation.evaluate import benchmark_source
from moka.training import config_from_dict


class Echo:
    """Is for a loaded model: it answers with the question, and counts what it was asked."""

    processor = SimpleNamespace(chat_template=None, decoding={"video_frames": 10, "audio_windows": None})
    decoding = MediaDecoding()
    quantization: str | None = None
    settings: dict[str, str] = {}

    def __init__(self, fails_after=None, weights_sha256="one"):
        self.asked, self.fails_after, self.weights_sha256 = [], fails_after, weights_sha256

    def generate_batch(self, chats, max_new_tokens, names):
        assert len(chats) == len(names) > 0
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        texts = [part["text"] for chat in chats for part in chat[-1]["content"] if part["type"] == "text"]
        self.asked += texts
        return texts


def sample(number, **more):
    content = [{"type": "text", "text": f"question {number}"}]
    answer = [{"type": "text", "text": f"answer {number}"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": f"q{number}", "messages": messages, **more}


SAMPLES = [sample(n) for n in range(7)]


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def asked(model, folder, samples=SAMPLES, **changes):
    return ask(model, samples, folder, **{"source": "test", "batch_size": 2, "progress": False, **changes})


def test_records_carry_what_scorers_read(tmp_path):
    samples = [sample(0, reference="yes", category="existence", group="a.jpg", options=["x"]), sample(1)]
    records = asked(Echo(), tmp_path, samples)
    assert records == lines(tmp_path)
    assert records[0] == {
        **{"id": "q0", "question": "question 0", "prediction": "question 0", "reference": "yes"},
        **{"category": "existence", "group": "a.jpg", "options": ["x"]},
    }
    bare = {"id": "q1", "question": "question 1", "prediction": "question 1", "reference": "answer 1"}
    assert records[1] == bare


def test_interrupted_evaluation_resumes_and_gives_the_same(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        asked(Echo(fails_after=4), tmp_path)
    with open(tmp_path / "predictions.jsonl", "ab") as file:
        file.write('{"id": "q4", "question": "é'.encode()[:-1])  # killed while it wrote
    second = Echo()
    records = asked(second, tmp_path)
    assert second.asked == ["question 4", "question 5", "question 6"]
    assert "4 of 7 answers" in capsys.readouterr().out
    assert records == lines(tmp_path) == asked(Echo(), tmp_path / "other")


@pytest.mark.parametrize("condition", ["", "as given"])
def test_no_question_is_asked_again_however_often_it_was_interrupted(tmp_path, condition):
    finished = []
    for _ in range(3):
        model = Echo(fails_after=2)
        with pytest.raises(KeyboardInterrupt):
            asked(model, tmp_path, condition=condition)
        finished += model.asked
    last = Echo()
    records = asked(last, tmp_path, condition=condition)
    assert finished + last.asked == [f"question {n}" for n in range(7)]
    assert records == lines(tmp_path)


def test_answers_of_another_condition_are_asked_again(tmp_path):
    asked(Echo(), tmp_path, condition="as given")
    again = Echo()
    asked(again, tmp_path, condition="audio blanked")
    assert len(again.asked) == 7


@pytest.mark.parametrize("other", [{"max_new_tokens": 5}, {"source": {"format": "pope", "splits": "popular"}}, {}])
def test_answers_of_another_model_or_other_settings_are_kept_aside(tmp_path, capsys, other):
    asked(Echo(), tmp_path)
    again = Echo(weights_sha256="one" if other else "two")
    asked(again, tmp_path, **other)
    assert len(again.asked) == 7
    assert len(lines(tmp_path)) == 7
    assert "predictions.previous.jsonl" in capsys.readouterr().out
    assert len((tmp_path / "predictions.previous.jsonl").read_text().splitlines()) == 7


def test_answers_by_another_decoding_are_asked_again(tmp_path):
    asked(Echo(), tmp_path)
    again = Echo()
    again.settings = {"decoding": "entropy-fusion"}
    asked(again, tmp_path)
    assert len(again.asked) == 7


def test_answers_over_a_quantised_backbone_are_those_of_another_model(tmp_path):
    asked(Echo(), tmp_path)
    again = Echo()
    again.quantization = "nf4"
    asked(again, tmp_path)
    assert len(again.asked) == 7


def test_a_few_questions_first_and_all_later_ask_none_twice(tmp_path):
    few, more, few_again = Echo(), Echo(), Echo()
    assert len(asked(few, tmp_path, size=3)) == 3
    everything = asked(more, tmp_path)
    assert more.asked == [f"question {n}" for n in range(3, 7)]
    assert asked(few_again, tmp_path, size=2) == everything[:2]
    assert not few_again.asked
    assert lines(tmp_path) == everything


def test_a_question_that_changed_is_asked_again(tmp_path):
    asked(Echo(), tmp_path)
    changed = [*SAMPLES[:6], sample(6, reference="other")]
    again = Echo()
    assert asked(again, tmp_path, changed)[6]["reference"] == "other"
    assert again.asked == ["question 6"]


@pytest.fixture
def spoilt(tmp_path):
    """Three questions about pictures, the second of which is no picture."""
    samples = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.new("L", (4, 4), number).save(path)
        one = sample(number)
        one["messages"][0]["content"].insert(0, {"type": "image", "image": str(path)})
        samples.append(one)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    return samples


def test_bad_media_end_the_evaluation_or_count_as_wrong(spoilt, tmp_path):
    with pytest.raises(BadMediaError, match=r"1\.png"):
        asked(Echo(), tmp_path / "strict", spoilt)
    model = Echo()
    records = asked(model, tmp_path / "tolerant", spoilt, tolerate_bad_media=True)
    assert [record["prediction"] for record in records] == ["question 0", "", "question 2"]
    assert "1.png" in records[1]["error"]
    assert [record["reference"] for record in records] == ["answer 0", "answer 1", "answer 2"]
    Image.new("L", (4, 4)).save(tmp_path / "1.png")  # corrected
    repaired = Echo()
    records = asked(repaired, tmp_path / "tolerant", spoilt, tolerate_bad_media=True)
    assert repaired.asked == ["question 1"]
    assert [record["prediction"] for record in records] == ["question 0", "question 1", "question 2"]


def test_a_question_that_could_not_be_asked_is_wrong_by_every_protocol():
    # By the paper's rule for MME whatever has no "yes" is "no".
    records = [
        {"id": n, "prediction": "", "reference": "no", "category": "existence", "group": "a", "error": "no such file"}
        for n in range(2)
    ]
    for protocol in ("strict", "paper"):
        result = score("mme", records, protocol)
        assert result["unparsable"] == 2
        assert result["overall"]["figures"]["perception"]["all"]["value"] == 0


def test_question_without_a_truth_is_reported_and_moves_no_answers(tmp_path):
    asked(Echo(), tmp_path)
    before = lines(tmp_path)
    silent = sample(0)
    silent["messages"].pop()
    with pytest.raises(MokaError, match=r"'q0' has no 'reference'"):
        asked(Echo(), tmp_path, [silent], source="other")
    assert lines(tmp_path) == before


def test_benchmark_is_where_the_run_or_the_root_says():
    there = {"format": "pope", "root": "data/pope"}
    config = config_from_dict({"evaluation": {"benchmarks": {"pope": there}}})
    assert benchmark_source(config, "pope") == there
    assert benchmark_source(config, "pope", root="elsewhere") == {"format": "pope", "root": "elsewhere"}
    assert benchmark_source(config, "mme", root="x") == {"format": "mme", "root": "x"}
    assert benchmark_source(config, "asr", root="x", format="librispeech", split="test-other")["split"] == "test-other"
    with pytest.raises(MokaError, match=r"--format: gigaspeech, librispeech"):
        benchmark_source(config, "asr", root="x")
    with pytest.raises(MokaError, match=r"names pope; give --root"):
        benchmark_source(config, "mme")
    with pytest.raises(MokaError, match=r"Did you mean 'pope'"):
        benchmark_source(config, "poep")
