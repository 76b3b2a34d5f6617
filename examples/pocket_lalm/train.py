"""Make the pocket LALM: speech, data splits and checkpoint, with one command.

    python examples/pocket_lalm/train.py [--output DIR]

About fifteen minutes on one CPU core; needs espeak-ng, and no network, GPU or pretrained weights.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from architecture import build_model, build_processor
from audio_pretraining import Recipe, pretrain_audio_tower
from batches import Row, RowEncoder, check_fast_path, log_mel
from clips import Split, plan_clips, synthesise_all, write_split
from speech import require_espeak
from topics import NEUTRAL_PROMPT, REFUSAL, split_topics
from training import Mixture, RowSampler, train

if TYPE_CHECKING:
    from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

TOPIC_SEED = 1
CLIP_SEED = 2
MODEL_SEED = 3

AUDIO_TOWER_RECIPE = Recipe(steps=800, batch_size=32, learning_rate=2e-3, warmup_steps=50)
MODEL_RECIPE = Recipe(steps=550, batch_size=32, learning_rate=2e-3, warmup_steps=80)


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent,
    show_default="the folder of this script",
    help="Where model/, data/ and audio/ are written.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads to train with. More are faster and round differently: the same seeds give other weights.",
)
def main(output: Path, threads: int) -> None:
    """Synthesise the speech, train the pocket LALM on it, and write model/, data/ and audio/."""
    require_espeak()
    torch.set_num_threads(threads)
    torch.manual_seed(MODEL_SEED)
    speakers = os.cpu_count() or 1
    report = _Clock()

    topics = split_topics(TOPIC_SEED)
    plan = plan_clips(topics, CLIP_SEED)
    training_samples = synthesise_all(plan.training, workers=speakers)
    report(f"{len(training_samples)} training clips spoken")
    for split in Split:
        write_split(output, split, plan.shipped[split], synthesise_all(plan.shipped[split], workers=speakers))
    report("train, validation and test splits written")

    processor = build_processor(topics.seen)
    model = build_model(processor)
    encoder = RowEncoder(processor)
    features = log_mel(processor, training_samples)
    clip_topics = tuple(clip.topic for clip in plan.training)
    sampler = RowSampler(topics.seen, clip_topics, Mixture(), random.Random(MODEL_SEED))
    row = Row(user=NEUTRAL_PROMPT + REFUSAL, clip=0, reply=REFUSAL)
    check_fast_path(encoder, features, row, training_samples[0])
    report("features ready")

    questions = [topic.question for topic in clip_topics]
    head = pretrain_audio_tower(model.model.audio_tower, features, questions, AUDIO_TOWER_RECIPE, report)
    train(model, head, encoder, features, sampler, MODEL_RECIPE, report)

    _save(output / "model", model, processor)
    report(f"checkpoint of {model.num_parameters():,} parameters written to {output / 'model'}")


def _save(directory: Path, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor) -> None:
    """Write the checkpoint in float16, with its processor and chat template beside it."""
    model.half().save_pretrained(directory)
    processor.save_pretrained(directory)


class _Clock:
    """Prints progress with the minutes since the start."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def __call__(self, message: str) -> None:
        click.echo(f"[{(time.monotonic() - self._start_s) / 60:5.1f} min] {message}")


if __name__ == "__main__":
    main()
