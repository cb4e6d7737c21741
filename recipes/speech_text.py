"""Speech-text: from public checkpoints to scored answers, top to bottom.

    accelerate launch recipes/speech_text.py --config STAGE.yaml [STAGE.yaml ...] [--set key=value ...]

    stage 1     GigaSpeech M, transcribed                 Whisper's encoder -> Q-Former -> the language model writes
    stage 2     LibriSpeech with SALMONN's instructions   the same, and a MokA adapter in the language model
    evaluate    LibriSpeech (WER), MMAU-mini speech, AIR-Bench speech foundation

Each configuration is one stage, just as `moka train STAGE.yaml` and `moka eval RUN --benchmark NAME` run it; later ones name
the connectors of earlier ones (`model.connectors`). Data, hardware, time and the paper's numbers are in speech_text.md.
"""

import sys

import moka
from moka.cli.main import guarded
from moka.cli.recipe import recipe_arguments
from moka.distributed import is_main
from moka.evaluation import evaluate_benchmark
from moka.evaluation.benchmarks.table import score_table
from moka.training import RunConfig, finish, open_run, train_adapter, train_connectors


def main() -> None:
    configs, resume = recipe_arguments(__doc__, modalities={"audio"})
    for config in configs:
        train(config, resume)
        if 2 in config.stages and is_main():
            model = moka.load(config.output.dir)
            for benchmark in config.evaluation.benchmarks:
                results = evaluate_benchmark(config.output.dir, benchmark, loaded=model)  # keeps every raw answer
                for result in results.values():  # strictly, and as the authors' scripts parse
                    score_table(result).show()


def train(config: RunConfig, resume: bool) -> None:
    # Backbone, frozen encoders, fresh or handed-over projectors; the data, opened and tried; the run folder.
    with open_run(config, resume) as run:
        if run is None:
            return  # it was complete
        if 1 in config.stages:
            train_connectors(run)  # the language model is frozen and has no adapter
        adapted = train_adapter(run) if 2 in config.stages else None  # MokA, and the projectors with it
        finish(run, adapted)  # plots, sample answers, model card


if __name__ == "__main__":
    sys.exit(guarded(main))
