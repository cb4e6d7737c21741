"""``moka cache``, and training from what it leaves: equal to training from media, or an error that says what changed."""

import json
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from moka.features.cache import FeatureSet
from moka.modeling.encoders import CachedEncoder, tiny_encoder
from moka.training import config_from_dict, finish, open_run, train_adapter, train_connectors

CLIP = {"type": "clip", "model_config": {}}
QFORMER = {"type": "qformer", "queries": 3, "hidden_size": 32, "heads": 2, "intermediate_size": 64}
WINDOWS = {"count": 3, "seconds": 0.2, "every": 0.1}


@pytest.fixture
def raw(tiny_config, media, tmp_path):
    """Makes the configuration of a run on real files with frozen CLIP and BEATs; stage 1 is cut short."""

    def make(**changes):
        data = uneven(media, tmp_path)
        defaults = {
            "model__modalities": {
                "visual": {"encoder": tiny_encoder(CLIP), "projector": QFORMER},
                "audio": {
                    "encoder": tiny_encoder({"type": "beats", "model_config": {}, "seconds": 0.25}),
                    "projector": {"type": "mlp", "tokens": 2},
                },
            },
            "data": {
                **dict.fromkeys(("alignment", "train", "validation", "test"), str(data)),
                "audio_windows": WINDOWS,
            },
            "alignment__max_steps": 3,
            **dict.fromkeys(("alignment__save_strategy", "training__save_strategy"), "no"),
            # Features of other batches are rounded otherwise, and Adam makes full steps of gradients near zero.
            **dict.fromkeys(("alignment__optim", "training__optim"), "sgd"),
            **dict.fromkeys(("alignment__learning_rate", "training__learning_rate"), 0.1),
        }
        return tiny_config(tmp_path / "run", **{**defaults, **changes})

    return make


def uneven(media, tmp_path):
    """A copy of the media whose samples lack the picture, the sound, both or neither."""
    folder = tmp_path / "media"
    if not folder.exists():
        shutil.copytree(media, folder)
        samples = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        for number, sample in enumerate(samples):
            content = sample["messages"][0]["content"]
            content[:] = [part for part in content if part["type"] not in [(), ("image",), ("audio",)][number % 3]]
        (folder / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder / "data.jsonl"


@pytest.fixture
def write(write_yaml, tmp_path):
    return partial(write_yaml, tmp_path / "config.yaml")


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"], r.get("loss"), r.get("eval_loss")) for r in records if {"loss", "eval_loss"} & {*r}]


def assert_same_run(ours, theirs):
    """Losses, tensors and sample answers of two runs."""
    assert len(losses(theirs)) > 3
    for one, other in zip(losses(ours), losses(theirs), strict=True):
        assert one[:2] == other[:2]
        assert [x or 0 for x in one[2:]] == pytest.approx([x or 0 for x in other[2:]], rel=1e-6)
    for name in ("adapter/adapter_model.safetensors", "connector/connector.safetensors"):
        if (theirs / name).exists():
            a, b = load_file(ours / name), load_file(theirs / name)
            assert a.keys() == b.keys()
            for key in b:
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-7)
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()


WHISPER = {"encoder": tiny_encoder({"type": "whisper", "model_config": {}}), "projector": {"type": "mlp", "tokens": 2}}


@pytest.mark.parametrize("objective", ["language_modeling", pytest.param("embedding", marks=pytest.mark.slow)])
def test_training_from_cache_equals_training_from_media(moka, raw, write, tmp_path, objective):
    values = raw(alignment__objective=objective)
    if objective == "embedding":  # and full sounds
        values["model"]["modalities"]["audio"] = WHISPER
        values["data"]["audio_windows"] = None
    path, cache = write(values), tmp_path / "cache"
    done = moka("cache", path, f"data.feature_cache={cache}", "--batch-size", "3")
    assert done.code == 0, done.err
    windows = 3 if objective == "language_modeling" else 1
    assert "visual: 5 media: 5 computed (5 items, 20 tokens" in done.out
    assert f"audio: 6 media: 6 computed ({6 * windows} items" in done.out
    assert moka("train", path, f"output.dir={tmp_path / 'live'}").code == 0
    done = moka("train", path, f"output.dir={tmp_path / 'cached'}", f"data.feature_cache={cache}")
    assert done.code == 0, done.err
    assert f"features of audio come from {cache}" in done.out
    assert_same_run(tmp_path / "cached", tmp_path / "live")
    # What is saved does not know of the cache.
    names = [sorted(p.name for p in (tmp_path / run / "adapter").iterdir()) for run in ("cached", "live")]
    assert names[0] == names[1]
    for name in ("moka_model.json", "moka_processor.json", "adapter_config.json"):
        assert (tmp_path / "cached/adapter" / name).read_text() == (tmp_path / "live/adapter" / name).read_text()
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("cached", "live")]
    assert summaries[0]["all parameters"] == summaries[1]["all parameters"]
    if objective == "embedding":
        return
    shutil.rmtree(cache)  # evaluation reads media
    scores = [moka("eval", tmp_path / run, "--no-blank") for run in ("cached", "live")]
    assert [done.code for done in scores] == [0, 0]
    answers = [(tmp_path / run / "predictions.jsonl").read_text() for run in ("cached", "live")]
    assert answers[0] == answers[1]


def test_encoders_do_not_take_part_in_training(raw, moka, write, tmp_path):
    values = raw(data__feature_cache=str(tmp_path / "cache"), stages=[2], training__max_steps=2)
    assert moka("cache", write(values)).code == 0
    with open_run(config_from_dict(values)) as run:
        aside = [run.model.encoders[name] for name in ("visual", "audio")]
        assert all(isinstance(encoder, CachedEncoder) for encoder in aside)
        assert not [name for name, _ in run.model.named_parameters() if name.startswith("encoders.")]
        for encoder in aside:  # were they run, the loss would not be finite
            torch.nn.init.constant_(next(encoder.encoder.parameters()), float("nan"))
        finish(run, train_adapter(run))
        assert [run.model.encoders[name] for name in ("visual", "audio")] == [one.encoder for one in aside]
    found = [loss or eval_loss for *_, loss, eval_loss in losses(tmp_path / "run")]
    assert len(found) == 3
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_one_encoder_cached_and_one_trained(moka, raw, write, tmp_path):
    values = raw()
    values["model"]["modalities"]["audio"]["encoder"]["trainable"] = True
    path, cache = write(values), tmp_path / "cache"
    done = moka("cache", path, f"data.feature_cache={cache}")
    assert done.code == 0, done.err
    assert "note: audio: the encoder is trained" in done.out
    assert [folder.name.split("-")[0] for folder in cache.iterdir()] == ["clip"]
    assert moka("train", path, f"output.dir={tmp_path / 'live'}").code == 0
    assert moka("train", path, f"output.dir={tmp_path / 'cached'}", f"data.feature_cache={cache}").code == 0
    assert_same_run(tmp_path / "cached", tmp_path / "live")
    with open_run(config_from_dict({**values, "data": {**values["data"], "feature_cache": str(cache)}})) as run:
        train_connectors(run)
        assert any(p.requires_grad for p in run.model.encoders["audio"].parameters())


def test_embedded_tasks_are_cached_by_their_values(moka, raw, write, tmp_path):
    modalities = {"visual": raw()["model"]["modalities"]["visual"]}
    data = {**dict.fromkeys(("alignment", "train", "validation"), "embedded:visual-text"), "train_size": 16}
    values = raw(model__modalities=modalities, data={**data, "validation_size": 4}, stages=[2])
    path, cache = write(values), tmp_path / "cache"
    done = moka("cache", path, f"data.feature_cache={cache}")
    assert done.code == 0, done.err
    assert moka("train", path, f"output.dir={tmp_path / 'live'}").code == 0
    done = moka("train", path, f"output.dir={tmp_path / 'cached'}", f"data.feature_cache={cache}")
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "cached", tmp_path / "live")
    # Questions that were not among those cached.
    more = moka("train", path, f"output.dir={tmp_path / 'more'}", f"data.feature_cache={cache}", "data.train_size=40")
    assert more.code == 2
    assert "sample 'visual-text-2-train" in more.last
    assert "moka cache" in more.last
    assert not (tmp_path / "more").exists()


def test_what_changed_is_reported(moka, refused, raw, write, tmp_path):
    weights = tmp_path / "clip"
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}

    def save(seed):
        torch.manual_seed(seed)
        CLIPVisionModel(CLIPVisionConfig(**small, intermediate_size=64)).save_pretrained(weights)

    save(0)
    values = raw(stages=[2])
    values["model"]["modalities"]["visual"]["encoder"] = {"type": "clip", "name_or_path": str(weights)}
    path, cache = write(values), f"data.feature_cache={tmp_path / 'cache'}"
    assert moka("cache", path, cache).code == 0
    assert moka("train", path, cache, "training.max_steps=1").code == 0
    shutil.rmtree(tmp_path / "run")

    save(1)
    assert "weights_sha256 is" in refused("train", path, cache)
    save(0)
    processor = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}, "image_mean": [0.1, 0.2, 0.3]}
    (weights / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **processor})
    )
    assert "front_end.settings.image_mean" in refused("train", path, cache)
    (weights / "preprocessor_config.json").unlink()
    assert "encoder.layer is -1 there and -2" in refused(
        "train", path, cache, "model.modalities.visual.encoder.layer=-2"
    )
    assert "audio_windows.count is 3 there and 2" in refused("train", path, cache, "data.audio_windows.count=2")
    assert "video_frames is 10 there and 4" in refused("train", path, cache, "data.video_frames=4")
    assert "no features of encoder 'dinov2'" in refused(
        "train", path, cache, f"model.modalities.visual.encoder={json.dumps(tiny_encoder({**CLIP, 'type': 'dinov2'}))}"
    )
    picture = tmp_path / "media/0.png"
    full = picture.read_bytes()
    Image.new("RGB", (30, 30), "red").save(picture)
    line = refused("train", path, cache)
    assert "sample 's0'" in line
    assert "0.png" in line
    assert "are not in" in line
    picture.write_bytes(full)
    assert "1 computed" in moka("cache", path, cache).out  # at another time
    assert moka("train", path, cache, "training.max_steps=1").code == 0
    shutil.rmtree(tmp_path / "run")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "media/new.png")
    text = (tmp_path / "media/data.jsonl").read_text().replace("3.png", "new.png")
    (tmp_path / "media/data.jsonl").write_text(text)
    line = refused("train", path, cache)
    assert "sample 's3'" in line
    assert "new.png" in line
    assert "are not in" in line
    assert not (tmp_path / "run").exists()
    done = moka("cache", path, cache)
    assert "visual: 5 media: 1 computed (1 items, 4 tokens, 0.00 MiB float32), 4 were there" in done.out
    (shard,) = (tmp_path / "cache").glob("beats-*/shard-*")
    full = shard.read_bytes()
    shard.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
    line = refused("train", path, cache)
    assert f"{shard} is damaged" in line
    assert "moka cache" in line
    done = moka("cache", path, cache)
    assert f"note: {shard} is damaged" in done.out
    assert moka("train", path, cache, "training.max_steps=1").code == 0


def test_bad_input_is_one_line(refused, moka, raw, write, tmp_path):
    values = raw()
    path = write(values)
    (tmp_path / "file").write_text("")
    assert "data.feature_cache is not set" in refused("cache", path)
    assert "cannot be written" in refused("cache", path, f"data.feature_cache={tmp_path / 'file'}")
    assert "no alignment data" in refused("cache", path, "stages=[2]", "--split", "alignment", "data.feature_cache=x")
    assert "--batch-size" in refused("cache", path, "data.feature_cache=x", "--batch-size", "0")
    assert "does not exist" in refused("train", path, f"data.feature_cache={tmp_path / 'none'}")
    for name in ("visual", "audio"):
        values["model"]["modalities"][name]["encoder"]["trainable"] = True
    path, cache = write(values), f"data.feature_cache={tmp_path / 'cache'}"
    for verb in ("cache", "train"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        line = refused(verb, path, cache)
        assert "nothing to cache" in line
        assert "visual, audio" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["error", pytest.param("skip", marks=pytest.mark.slow), "substitute"])
def test_bad_media_are_treated_as_in_training_from_media(moka, raw, write, tmp_path, policy):
    values = raw(stages=[2])
    values["data"] |= {"on_bad_media": policy, "bad_media_budget": 0.3}
    picture = tmp_path / "media/3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    path, cache = write(values), f"data.feature_cache={tmp_path / 'cache'}"
    done = moka("cache", path, cache)
    if policy == "error":
        assert done.code == 2
        assert "sample 's3'" in done.last
        assert "3.png" in done.last
        return
    assert done.code == 0, done.err
    assert "1 of 8 samples have media that cannot be used (the first: sample 's3'" in done.out
    assert "1 left out as bad" in done.out
    assert moka("train", path, f"output.dir={tmp_path / 'live'}").code == 0
    done = moka("train", path, f"output.dir={tmp_path / 'cached'}", cache)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "cached", tmp_path / "live")
    reports = [(tmp_path / run / "bad-media-train.jsonl").read_text() for run in ("cached", "live")]
    assert [json.loads(line).get("index") for line in reports[0].splitlines()] == [
        json.loads(line).get("index") for line in reports[1].splitlines()
    ]
    few = moka("cache", path, cache, "data.bad_media_budget=0")
    assert few.code == 2
    assert "the budget allows 0" in few.last


@pytest.mark.slow
def test_half_the_space_is_said_and_close(moka, raw, write, tmp_path):
    values = raw(stages=[2])
    path, cache = write(values), f"data.feature_cache={tmp_path / 'cache'}"
    assert moka("cache", path, cache, "--dtype", "bfloat16").code == 0
    assert moka("train", path, f"output.dir={tmp_path / 'live'}").code == 0
    done = moka("train", path, cache)
    assert "rounded to bfloat16" in done.out
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "live")
    assert ours != theirs
    for one, other in zip(ours, theirs, strict=True):
        assert (one[2] or one[3]) == pytest.approx(other[2] or other[3], abs=0.02)
    assert "bfloat16 features, and float32 is asked for" in moka("cache", path, cache).last


BIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def many(raw, tmp_path):
    """80 pictures, each 64 KiB of features: five shards of a MiB."""
    folder = tmp_path / "many"
    folder.mkdir()
    lines = []
    for i in range(80):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "Which?"}]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}]})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = {"type": "clip", "model_config": {**BIG, "image_size": 224, "patch_size": 14}}
    modalities = {"visual": {"encoder": encoder, "projector": {"type": "mlp", "tokens": 2}}}
    return raw(model__modalities=modalities, stages=[2], data={"train": str(folder / "data.jsonl")})


def features_in(cache):
    """id -> features, of the only set of a cache; each is in one shard only."""
    (folder,) = cache.glob("clip-*")
    found = FeatureSet(folder)
    ids = [name for shard in found.shards for name in load_file(shard)]
    assert len(set(ids)) == len(ids)
    return {identity: found.read(identity) for identity in ids}


def command(path, cache):
    return ["cache", str(path), f"data.feature_cache={cache}", "--shard-mib", "1", "--batch-size", "4"]


@pytest.mark.slow
def test_killed_and_started_again_it_resumes(moka, many, write, launch, tmp_path):
    path, cache = write(many), tmp_path / "cache"
    killed = launch("one", *command(path, cache), start=True)
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*/shard-*"))) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGSTOP)
    # Meanwhile no other may fill the folder.
    other = moka(*command(path, cache))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    killed.communicate()
    assert other.code == 2
    assert f"is being filled by process {killed.pid}" in other.last
    # What a process leaves that is killed while it writes.
    (folder,) = cache.glob("clip-*")
    complete = sum(len(load_file(shard)) for shard in folder.glob("shard-*"))
    assert 32 <= complete < 80
    (folder / ".shard-00077-000.safetensors.x1.tmp").write_bytes(b"half")
    again = moka(*command(path, cache))
    assert again.code == 0, again.err
    assert f"80 media: {80 - complete} computed" in again.out
    assert f"{complete} were there" in again.out
    assert not list(cache.rglob(".*.tmp"))
    full = tmp_path / "full"
    assert moka(*command(path, full)).code == 0
    ours, theirs = features_in(cache), features_in(full)
    assert ours.keys() == theirs.keys()
    for identity in theirs:
        np.testing.assert_allclose(ours[identity], theirs[identity], rtol=1e-5, atol=1e-5)
    assert "0 computed" in moka(*command(path, cache)).out


@pytest.mark.slow
def test_partitioned_model_trains_from_cache_with_uneven_batches(moka, raw, write, write_zero, launch, tmp_path):
    """ZeRO-3 compares the modules that its processes run; one of them has no picture or no sound in most steps."""
    # Stage 1 through the language model: its loss counts tokens, whatever process they are on.
    values = raw(adapter__dropout=0, training__eval_strategy="no", alignment__objective="language_modeling")
    values["model"]["modalities"]["visual"]["projector"] = {**QFORMER, "dropout": 0}
    path, cache = write(values), f"data.feature_cache={tmp_path / 'cache'}"
    assert moka("cache", path, cache).code == 0
    sizes = [f"{section}.per_device_train_batch_size" for section in ("alignment", "training")]
    assert moka("train", path, f"output.dir={tmp_path / 'one'}", *(f"{size}=2" for size in sizes)).code == 0
    zero = f"training.deepspeed={write_zero(tmp_path, 'zero3', zero_allow_untested_optimizer=True)}"
    overrides = [cache, f"output.dir={tmp_path / 'two'}", *(f"{size}=1" for size in sizes), zero]
    done = launch("torchrun", "train", path, *overrides, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    engines = json.loads((tmp_path / "two/summary.json").read_text())["engines"]
    assert engines.keys() == {"1", "2"}
    for engine in engines.values():
        assert (engine["processes"], engine["distributed_type"], engine["zero_stage"]) == (2, "DEEPSPEED", 3)
        assert engine["wrapper"] == "DeepSpeedEngine"
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-4)
    for name in ("connector/connector.safetensors", "adapter/adapter_model.safetensors"):
        two, one = (load_file(tmp_path / run / name) for run in ("two", "one"))
        assert two.keys() == one.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.slow
def test_a_bad_file_on_one_process_stops_the_others(many, write, launch, tmp_path):
    """Processes that tell each other every ten samples; the bad file is among the first ten of 80."""
    (tmp_path / "many/9.png").write_bytes(b"no picture")
    program = tmp_path / "often.py"
    program.write_text(
        "from moka.cli.main import main\nfrom moka.features import extract\nextract._TOGETHER = 10\nraise SystemExit(main())\n"
    )
    path, cache = write(many), tmp_path / "cache"
    done = launch("torchrun", *command(path, cache), program=[program])
    assert done.returncode != 0
    assert done.stderr.count("moka: error: sample ") == 1, done.stderr[-3000:]
    assert "9.png" in done.stderr
    assert 0 < sum(len(load_file(shard)) for shard in cache.glob("clip-*/shard-*")) <= 9  # before they stopped


@pytest.mark.slow
def test_processes_share_the_work(moka, many, raw, write, launch, tmp_path):
    path, two, one = write(many), tmp_path / "two", tmp_path / "one"
    done = launch("torchrun", *command(path, two))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "80 media: 80 computed" in done.stdout
    assert "2 processes" in done.stdout
    assert done.stdout.count("visual: ") == 1
    shares = [len(list(two.glob(f"*/shard-*-00{rank}.safetensors"))) for rank in range(2)]
    assert min(shares) >= 1
    assert moka(*command(path, one)).code == 0
    ours, theirs = features_in(two), features_in(one)
    assert ours.keys() == theirs.keys()
    for identity in theirs:
        np.testing.assert_allclose(ours[identity], theirs[identity], rtol=1e-5, atol=1e-5)

    # Two processes train from the cache as from media, also where one of them has no picture or no sound.
    path, cache = write(raw(stages=[2], training__per_device_train_batch_size=1)), tmp_path / "cache"
    assert moka("cache", path, f"data.feature_cache={cache}").code == 0
    for name, overrides in (("live", []), ("cached", [f"data.feature_cache={cache}"])):
        run = tmp_path / name
        done = launch("torchrun", "train", path, f"output.dir={run}", *overrides)
        assert done.returncode == 0, done.stderr[-2000:]
        engine = json.loads((run / "summary.json").read_text())["engines"]["2"]
        assert (engine["processes"], engine["distributed_type"]) == (2, "MULTI_CPU")
        assert engine["wrapper"] == "DistributedDataParallel"
    assert_same_run(tmp_path / "cached", tmp_path / "live")
