"""A run that is reported to end saves, says so, ends with its own exit code, and continues as if nothing had been."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from moka.errors import EX_TEMPFAIL, Interrupted
from moka.training import config_from_dict, run_training
from moka.training.checkpointing import CheckpointMetadata, problem
from moka.training.preemption import Interruption
from moka.training.trainer import MokaTrainer

DYING = Path(__file__).with_name("dying.py")
# Neither saving nor logging comes at every step, and neither at the same; micro-batches; epochs of four steps.
RAGGED = {
    "data__train_size": 32,
    "alignment__max_steps": 4,
    "alignment__save_steps": 3,
    "alignment__logging_steps": 3,
    "training__per_device_train_batch_size": 4,
    "training__gradient_accumulation_steps": 2,
    "training__max_steps": 10,
    "training__save_steps": 5,
    "training__logging_steps": 4,
    "training__eval_steps": 3,
    "training__per_device_eval_batch_size": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("full") / "run", **RAGGED)


@pytest.fixture
def signalled(monkeypatch):
    """``signalled("training_step", 2, 3)``: this process gets a signal after that method, 3 steps of stage 2 being done."""

    def plan(place, stage, step, number=signal.SIGTERM):
        full, done = getattr(MokaTrainer, place), []

        def patched(self, *args, **kwargs):
            result = full(self, *args, **kwargs)
            if not done and f"stage{stage}" in self.args.output_dir and self.state.global_step == step:
                done.append(True)
                os.kill(os.getpid(), number)
            return result

        monkeypatch.setattr(MokaTrainer, place, patched)

    return plan


@pytest.mark.parametrize(
    ("place", "stage", "step", "number", "saved"),
    [
        ("training_step", 1, 1, signal.SIGTERM, 2),
        ("training_step", 2, 3, signal.SIGTERM, 4),  # the end of an epoch
        ("training_step", 2, 6, signal.SIGUSR1, 7),  # between two logging steps
    ],
)
def test_an_interrupted_run_resumes_as_if_nothing_had_been(
    uninterrupted, tiny_config, tmp_path, signalled, place, stage, step, number, saved, same_run
):
    config = config_from_dict(tiny_config(tmp_path / "run", **RAGGED))
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    signalled(place, stage, step, number)
    with pytest.raises(Interrupted) as caught:
        run_training(config)
    checkpoint = tmp_path / f"run/checkpoints/stage{stage}/checkpoint-{saved}"
    assert (caught.value.step, caught.value.checkpoint) == (saved, checkpoint)
    assert problem(checkpoint) is None
    assert before == {name: signal.getsignal(name) for name in before}
    assert not (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/.lock").exists()
    run_training(config, resume=True)
    same_run(tmp_path / "run", uninterrupted, resumes=1)


def test_a_signal_in_an_evaluation_loses_only_the_evaluation(
    uninterrupted, tiny_config, tmp_path, signalled, curve, same_adapter
):
    config = config_from_dict(tiny_config(tmp_path / "run", **RAGGED))
    signalled("prediction_step", 2, 6)
    with pytest.raises(Interrupted) as caught:
        run_training(config)
    checkpoint = tmp_path / "run/checkpoints/stage2/checkpoint-6"
    assert (caught.value.step, caught.value.checkpoint) == (6, checkpoint)
    assert problem(checkpoint) is None
    run_training(config, resume=True)
    lost = [record for record in curve(uninterrupted) if record[:2] == (2, 6) and record[3] is not None]
    assert len(lost) == 1
    kept = [record for record in curve(uninterrupted) if record not in lost]
    assert [(*r[:2], *r[3:]) for r in curve(tmp_path / "run")] == [(*r[:2], *r[3:]) for r in kept]
    same_adapter(tmp_path / "run", uninterrupted)


def test_a_signal_outside_of_training_ends_the_run_at_once(tiny_config, tmp_path, monkeypatch):
    from moka.training import setup as opening

    config = config_from_dict(tiny_config(tmp_path / "run", **RAGGED))
    full = opening.build_for_stage_two

    def signalled(config):
        os.kill(os.getpid(), signal.SIGTERM)
        return full(config)

    monkeypatch.setattr(opening, "build_for_stage_two", signalled)
    with pytest.raises(Interrupted, match="outside of training"):
        run_training(config)
    assert not (tmp_path / "run").exists()


def test_a_signal_before_the_first_step_saves_nothing(tiny_config, tmp_path, signalled):
    signalled("get_batch_samples", 1, 0)
    config = config_from_dict(tiny_config(tmp_path / "run", **RAGGED))
    with pytest.raises(Interrupted, match=r"at step 0.*--resume"):
        run_training(config)
    assert not list((tmp_path / "run").glob("checkpoints/*/*"))


def test_a_run_outside_of_the_main_thread_has_no_handlers(tmp_path):
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with Interruption():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends_the_process(monkeypatch):
    """A cluster signals launcher and processes, and the launcher sends its own on."""
    sent = []
    with Interruption() as interruption:
        interruption.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.agreed()
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number, signal.getsignal(number))))
        monkeypatch.setattr("moka.training.preemption._SAME_WITHIN_S", -1.0)
        signal.raise_signal(signal.SIGTERM)
        # Seen with the system's own handler in place: nothing of ours can hold the process back.
        assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


@pytest.mark.slow
def test_workers_of_the_loader_live_on_when_all_are_signalled(
    tiny_config, tmp_path, launch, write_yaml, uninterrupted, close_curve
):
    """As a cluster does it: every process of the job. And from the command line: one line, exit code 75."""
    config = write_yaml(
        tmp_path / "run.yaml", tiny_config(tmp_path / "run", **RAGGED, training__dataloader_num_workers=2)
    )
    done = launch("one", "training_step,2,6,0,group,SIGTERM", "train", config, program=[DYING])
    assert done.returncode == EX_TEMPFAIL, done.stderr[-2000:]
    checkpoint = tmp_path / "run/checkpoints/stage2/checkpoint-7"
    printed = [line for line in done.stderr.splitlines() if line.startswith("moka: ")]
    assert len(printed) == 1
    assert "step 7" in printed[0]
    assert str(checkpoint) in printed[0]
    assert "--resume" in printed[0]
    assert launch("one", "train", config, "--resume").returncode == 0
    close_curve(tmp_path / "run", uninterrupted, resumes=1)


@pytest.mark.slow
def test_two_processes_signalled_at_the_launcher_save_once_and_resume(
    tiny_config, tmp_path, launch, write_yaml, close_curve
):
    changes = {**RAGGED, "training__per_device_train_batch_size": 2, "alignment__max_steps": 2}
    full = write_yaml(tmp_path / "full.yaml", tiny_config(tmp_path / "full", **changes))
    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "run", **changes))
    done = launch("torchrun", "training_step,2,6,0,launcher,SIGTERM", "train", config, program=[DYING])
    checkpoint = tmp_path / "run/checkpoints/stage2/checkpoint-7"
    printed = [line for line in done.stderr.splitlines() if "moka: " in line]
    assert len(printed) == 1
    assert "step 7" in printed[0]
    assert str(checkpoint) in printed[0]
    assert "--resume" in printed[0]
    assert done.returncode != 0
    assert problem(checkpoint) is None
    assert CheckpointMetadata.read(checkpoint).world_size == 2
    for folder, how in ((config, ["--resume"]), (full, [])):
        done = launch("torchrun", "train", folder, *how)
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["processes"] == 2
    close_curve(tmp_path / "run", tmp_path / "full", resumes=1)
