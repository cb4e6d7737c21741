"""A resumed run is the uninterrupted one, bit for bit, wherever it was killed."""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moka.errors import MokaError
from moka.training.checkpointing import CheckpointMetadata, last_checkpoint, problem

DYING = Path(__file__).with_name("dying.py")
AFTER_TRAINING = ("adapter", "summary.json", "README.md", "loss.png", "samples.jsonl")


def killed(run, folder, stage, step, half_written=None):
    """A copy of a finished run as it is when it is killed in ``stage``, ``step`` being its newest checkpoint there.

    The last two lines logged after that checkpoint are kept: a killed run has logged more than it saved.
    """
    shutil.copytree(run, folder)
    for name in AFTER_TRAINING + (("connector",) if stage == 1 else ()):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for later in range(stage, 3):
        for checkpoint in (folder / f"checkpoints/stage{later}").glob("checkpoint-*"):
            if later > stage or int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
    if half_written is not None:
        source = folder / f"checkpoints/stage{stage}/checkpoint-{step}"
        broken = source.with_name(f"checkpoint-{half_written}")
        shutil.copytree(source, broken)
        (broken / "checkpoint.json").unlink()
        next(broken.glob("*.safetensors")).write_bytes(b"\x00" * 40)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [i for i, line in enumerate(lines) if _at(line) <= (stage, step)]
    kept = lines[: (logged[-1] + 1 if logged else 0) + 2]
    # The kill came in the middle of a line.
    (folder / "metrics.jsonl").write_text("\n".join(kept) + '\n{"stage": 2, "st')
    return folder


def _at(line):
    record = json.loads(line)
    return record["stage"], record["step"]


@pytest.mark.parametrize(
    ("stage", "step", "half_written"),
    [(1, 0, None), (1, 4, None), (2, 0, None), (2, 2, None), (2, 4, 6)],
    ids=["stage 1, no checkpoint", "stage 1", "between the stages", "stage 2", "while a checkpoint was written"],
)
def test_resumed_run_equals_uninterrupted(trained_run, tmp_path, stage, step, half_written, curve, same_run, train):
    folder = killed(trained_run, tmp_path / "run", stage, step, half_written)
    assert losses_before(folder, stage) > 0 or (stage, step) == (1, 0)
    train(folder, resume=True)
    same_run(folder, trained_run)
    twice = [key for key, n in Counter(map(_at_loss, curve(folder))).items() if n > 1]
    assert twice == []


def losses_before(folder, stage):
    return sum('"loss"' in line for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1])


def _at_loss(record):
    return record[0], record[1], record[2] is None


EPOCHS = {
    **{"data__train_size": 16, "training__max_steps": 8, "training__save_steps": 4},
    **{"training__eval_strategy": "epoch", "training__logging_strategy": "epoch"},
}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [({"adapter__method": "lora", "training__eval_strategy": "no"}, 1), (EPOCHS, 2)],
    ids=["lora", "at the end of an epoch"],
)
def test_variants_resume_exactly(train, tmp_path, curve, same_adapter, changes, lines):
    """An epoch's evaluation and log come after its last step's save is expected, and draw on the same random numbers."""
    full = train(tmp_path / "full", stages=[2], **changes)
    assert [step for _, step, *_ in curve(full)].count(4) == lines  # a loss, and an evaluation
    folder = killed(full, tmp_path / "run", 2, 4)
    train(folder, stages=[2], **changes, resume=True)
    same_adapter(folder, full)
    assert curve(folder) == curve(full)


def test_resume_under_another_engine_is_refused(trained_run, tmp_path, train):
    """transformers would continue with a fresh optimizer and schedule, and are silent."""
    folder = killed(trained_run, tmp_path / "run", 2, 4)
    checkpoint = folder / "checkpoints/stage2/checkpoint-4"
    seal = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "optimizer.pt").rename(checkpoint / "global_step4")  # as DeepSpeed names its own
    seal["files"]["global_step4"] = seal["files"].pop("optimizer.pt")
    (checkpoint / "checkpoint.json").write_text(json.dumps({**seal, "zero_stage": 2}))
    with pytest.raises(
        MokaError, match=r"written under DeepSpeed, and this run is under neither .* \(ZeRO stage 2, now None\)"
    ):
        train(folder, resume=True)


def test_resume_with_other_settings_is_refused(trained_run, tmp_path, same_run, train):
    folder = killed(trained_run, tmp_path / "run", 2, 2)
    with pytest.raises(MokaError, match=r"training.learning_rate is 0.003 .* and 0.1 is given"):
        train(folder, training__learning_rate=0.1, resume=True)
    train(folder, resume=True, evaluation__size=3)  # does not reach the training
    same_run(folder, trained_run)


def test_resume_with_another_global_batch_is_refused(trained_run, tmp_path, train):
    """As when it continues with more processes: here the record of the beginning says another number."""
    folder = killed(trained_run, tmp_path / "run", 2, 2)
    text = (folder / "metrics.jsonl").read_text()
    assert text.count('{"stage": 2, "step": 0, "samples_per_step": 4}') == 1
    (folder / "metrics.jsonl").write_text(text.replace('"samples_per_step": 4}', '"samples_per_step": 8}'))
    with pytest.raises(MokaError, match="began with 8 samples a step, and would continue with 4"):
        train(folder, resume=True)


@pytest.mark.parametrize("packing", [False, True])
def test_resume_on_other_data_is_noted(train, tmp_path, capsys, packing):
    turns = [{"role": "user", "content": "which digit"}, {"role": "assistant", "content": "one"}]
    lines = [json.dumps({"id": str(number), "messages": turns}) + "\n" for number in range(8)]
    data = tmp_path / "data.jsonl"
    changes = {"stages": [2], "data__train": str(data), "data__train_size": None, "training__max_steps": 6}
    changes |= {"training__train_sampling_strategy": "sequential", "training__packing": packing}
    changes |= {"model__max_length": 96} if packing else {}
    data.write_text("".join(lines))
    full = train(tmp_path / "full", **changes)
    for name, kept, words in (("same", lines, []), ("cut", lines[:5], ["data.train", "5", "8"])):
        if packing and name == "cut":
            continue  # other rows are an error
        data.write_text("".join(kept))
        folder = killed(full, tmp_path / name, 2, 4)
        capsys.readouterr()
        train(folder, **changes, resume=True)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: data.train")]
        assert len(notes) == bool(words)
        assert all(word in note for note in notes for word in words)


def test_a_report_that_was_cut_off_in_a_line_does_not_stop_a_resume(trained_run, tmp_path, same_run, train):
    folder = killed(trained_run, tmp_path / "run", 2, 4)
    (folder / "dropped-stage2.jsonl").write_text('{"index": 1, "id": "a", "rea')
    train(folder, resume=True)
    same_run(folder, trained_run)


def test_resume_of_a_complete_run_changes_nothing(trained_run, tmp_path, capsys, train):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(folder, resume=True)
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resume_without_a_run_is_refused(tmp_path, train):
    with pytest.raises(MokaError, match="has no run"):
        train(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


# Epochs of six steps, micro-batches, workers; saving, logging and evaluation at different steps; dropout as it comes.
RAGGED = {
    "data__train_size": 24,
    "alignment__max_steps": 12,
    "alignment__save_steps": 3,
    "training__per_device_train_batch_size": 2,
    "training__gradient_accumulation_steps": 2,
    "training__num_train_epochs": 6,
    "training__max_steps": -1,
    "training__save_steps": 4,
    "training__save_total_limit": 2,
    "training__eval_steps": 5,
    "training__dataloader_num_workers": 1,
    "training__warmup_steps": 7,
}


@pytest.mark.slow
def test_runs_killed_at_random_steps_equal_an_uninterrupted_one(
    train, tiny_config, tmp_path, launch, write_yaml, curve, same_run
):
    seed = time.time_ns() % 10_000
    drawn = random.Random(seed)
    ends = [(1, drawn.randint(2, 10)), (2, drawn.randint(2, 16)), (2, drawn.randint(18, 32))]
    print(f"seed {seed}: killed at {ends}")
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **RAGGED))
    for number, end in enumerate(ends):
        run = launch("one", "train", config, *(["--resume"] if number else []), start=True, **as_many_threads())
        while run.poll() is None and last_logged(tmp_path / "run") < end:
            time.sleep(0.001)
        run.kill()
        assert run.wait() == -9, run.stderr.read()[-2000:]
        run.stdout.close(), run.stderr.close()
        print(
            f"was at {last_logged(tmp_path / 'run')}: {sorted(p.name for p in (tmp_path / 'run').rglob('checkpoint-*'))}"
        )
    done = launch("one", "train", config, "--resume", **as_many_threads())
    assert done.returncode == 0, done.stderr[-6000:]
    assert "resuming from" in done.stdout
    full = train(tmp_path / "full", **RAGGED)
    assert len(curve(full)) > 48
    same_run(tmp_path / "run", full, resumes=len(ends))


def as_many_threads():
    """Sums are the same to the last bit where as many threads share them."""
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def last_logged(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((_at(line) for line in lines if '"loss"' in line), default=(0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["_save_scaler", "_save_rng_state"])
def test_a_run_killed_while_it_writes_a_checkpoint(
    trained_run, tiny_config, tmp_path, launch, write_yaml, capsys, place, same_run, train
):
    """After the optimizer's state, and when only the trainer's is missing."""
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run"))
    done = launch("one", f"{place},2,4,0,self,SIGKILL", "train", config, program=[DYING], **as_many_threads())
    assert done.returncode == -9
    stage = tmp_path / "run/checkpoints/stage2"
    assert (stage / "checkpoint-4/optimizer.pt").exists()
    train(tmp_path / "run", resume=True)
    said = capsys.readouterr().out
    assert f"{stage / 'checkpoint-4'} was incomplete" in said
    assert f"from {stage / 'checkpoint-2'}" in said
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    same_run(tmp_path / "run", trained_run)


def test_a_run_killed_after_its_last_step_trains_no_other(trained_run, tmp_path, same_run, train):
    for stage in (1, 2):
        folder = killed(trained_run, tmp_path / f"run{stage}", stage, 6)
        train(folder, resume=True)
        same_run(folder, trained_run)
        assert last_checkpoint(folder / f"checkpoints/stage{stage}")[1] == 6


def test_a_truncated_newest_checkpoint_costs_its_steps_only(trained_run, tmp_path, capsys, same_run, train):
    folder = killed(trained_run, tmp_path / "run", 2, 4)
    broken = folder / "checkpoints/stage2/checkpoint-4/adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    train(folder, resume=True)
    said = capsys.readouterr().out
    assert f"{broken} has" in said
    assert "checkpoint-2" in said
    same_run(folder, trained_run)


# As many samples a step on one process as on two; a dropout would draw other masks. Adam's epsilon keeps gradients that
# are nothing but rounding from counting.
ELASTIC = {
    "stages": [2],
    "adapter__dropout": 0.0,
    "model__modalities__visual__encoder__dropout": 0.0,
    "model__modalities__audio__encoder__dropout": 0.0,
    "training__global_batch_size": 4,
    "training__per_device_train_batch_size": 2,
    "training__adam_epsilon": 1e-3,
    "training__max_steps": 10,
    "training__save_steps": 3,
    "training__eval_strategy": "no",
}


def assert_same_adapter(folder, reference):
    mine, other = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, reference))
    for key in other:
        torch.testing.assert_close(mine[key], other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checkpoints_resume_with_as_many_processes_with_fewer_and_with_more(
    train, tiny_config, tmp_path, launch, write_yaml, capsys, close_curve
):
    """A process of two is killed at a random step; both numbers of processes continue, and one's checkpoint with two."""
    full = train(tmp_path / "full", **ELASTIC)
    step = random.randint(3, 8)
    print(f"killed after {step} steps")
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **ELASTIC))
    done = launch("torchrun", f"training_step,2,{step},1,self,SIGKILL", "train", config, program=[DYING], timeout=400)
    assert done.returncode != 0
    _, kept = last_checkpoint(tmp_path / "run/checkpoints/stage2")
    assert kept == step // 3 * 3
    assert CheckpointMetadata.read(tmp_path / f"run/checkpoints/stage2/checkpoint-{kept}").world_size == 2
    shutil.copytree(tmp_path / "run", tmp_path / "fewer")
    capsys.readouterr()
    train(tmp_path / "fewer", **ELASTIC, resume=True)
    said = capsys.readouterr().out
    assert f"checkpoint-{kept} was written by 2 processes" in said
    assert "4 samples a step (2 x 1 process x 2 accumulated)" in said
    close_curve(tmp_path / "fewer", full)
    assert_same_adapter(tmp_path / "fewer", full)

    more = write_yaml(tmp_path / "more.yaml", tiny_config(tmp_path / "more", **ELASTIC))
    killed(full, tmp_path / "more", 2, 6)
    for folder, source in (("run", config), ("more", more)):
        done = launch("torchrun", "train", source, "--resume", timeout=400)
        assert done.returncode == 0, done.stderr[-6000:]
        assert json.loads((tmp_path / folder / "summary.json").read_text())["processes"] == 2
        assert ("was written by" in done.stdout) == (folder == "more")
        close_curve(tmp_path / folder, full)
        assert_same_adapter(tmp_path / folder, full)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "size"), [(0, 20_000), (1, 100)], ids=["of the main process", "of the other"])
def test_a_full_disk_ends_both_processes_and_keeps_the_last_good_checkpoint(
    tiny_config, tmp_path, launch, write_yaml, rank, size
):
    changes = {**ELASTIC, "training__save_steps": 2, "training__eval_strategy": "steps", "training__eval_steps": 2}
    changes |= {"training__load_best_model_at_end": True}  # where transformers has a barrier among its writing
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **changes))
    done = launch("torchrun", f"training_step,2,2,{rank},disk,{size}", "train", config, program=[DYING], timeout=400)
    assert done.returncode != 0
    printed = [line for line in done.stderr.splitlines() if "moka: " in line]
    assert len(printed) == 1, done.stderr[-3000:]
    assert "checkpoint-4 cannot be written: the disk is full" in printed[0]
    stage = tmp_path / "run/checkpoints/stage2"
    assert [path.name for path in stage.iterdir()] == ["checkpoint-2"]
    assert problem(stage / "checkpoint-2") is None


def streamed(mixed, **changes):
    source = [{"source": str(mixed), "streaming": True, "buffer": 8}]
    data = {f"data__{name}": str(mixed) for name in ("alignment", "validation", "test")}
    return {**data, "data__train_size": None, "data__train": source, "stages": [2], "training__max_steps": 6, **changes}


def test_a_streamed_run_resumes_where_it_stopped(train, tmp_path, mixed, same_adapter):
    full = train(tmp_path / "full", **streamed(mixed))
    folder = killed(full, tmp_path / "run", 2, 4)
    train(folder, **streamed(mixed), resume=True)
    same_adapter(folder, full)


@pytest.mark.slow
def test_a_streamed_run_on_two_processes_takes_the_steps_of_one(
    train, tiny_config, tmp_path, mixed, launch, write_yaml, as_one, same_weights
):
    own = {key: value for key, value in as_one.items() if not key.startswith("alignment")}
    changes = {**streamed(mixed), **own, "training__max_steps": 6}
    one = train(tmp_path / "one", **changes)
    changes["training__per_device_train_batch_size"] = 2
    two = write_yaml(tmp_path / "two.yaml", tiny_config(tmp_path / "two", **changes))
    done = launch("torchrun", "train", two)
    assert done.returncode == 0, done.stderr[-3000:]
    same_weights(tmp_path / "two", one, names=("adapter/adapter_model.safetensors",))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"training__max_steps": -1}, "training.max_steps"),
        ({"training__packing": True, "model__max_length": 200}, "training.packing"),
        ({"training__train_sampling_strategy": "group_by_length"}, "training.train_sampling_strategy"),
        ({"data__feature_cache": "features"}, "streamed"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_by_key(train, tmp_path, mixed, changes, word):
    with pytest.raises(MokaError, match=word):
        train(tmp_path / "run", **{**streamed(mixed), **changes})
