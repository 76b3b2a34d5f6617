"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from calibration.errors import InputError
from calibration.overlap import AllowedOverlap
from calibration.records import OnError, ReadSettings
from engines.backends import BACKENDS, CPU_BACKEND
from sarsteer_export.cli.command import options

if TYPE_CHECKING:
    from calibration.calibrate import CalibrationSettings
    from calibration.model_options import ModelOptions
    from sarsteer_export.engine_build import EngineSettings
    from sarsteer_export.judges.settings import JudgeSettings

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

BLOCKS = re.compile(r"(-?\d+)(?:-(-?\d+))?")
"""A block, or the first and the last of a range."""

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
engine_option = click.option(
    "--engine",
    type=click.Choice(list(BACKENDS)),
    default=CPU_BACKEND.name,
    show_default=True,
    help="What runs the bundle: one of the engines it was built with, or ONNX Runtime on the CPU.",
)
force_option = click.option(
    "--force", is_flag=True, help="Accept a plan that was made for another model of the same shape."
)
overflow_option = click.option(
    "--allow-overflow",
    is_flag=True,
    help="Go on even where calibration saw values that float16 cannot hold or square.",
)
device_options = options(
    click.option("--device", default="cpu", show_default=True, help="PyTorch device of the eager model."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Precision of the model.",
    ),
)
device_map_option = click.option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
    default=None,
    help="Let accelerate spread the model over all devices, instead of --device.",
)
model_options = options(
    *(
        click.option(f"--{option}", option.replace("-", "_"), default=None, metavar="MODULE", help=meaning)
        for option, meaning in (
            ("decoder", "Where the list of decoder blocks is in the model, such as model.layers."),
            ("final-norm", "Where the norm behind the last block is, such as model.norm."),
            ("lm-head", "Where the layer is that makes logits, such as lm_head."),
            ("embed-tokens", "Where the embedding of tokens is, such as model.embed_tokens."),
            ("audio-encoder", "Where the audio encoder is."),
            ("projector", "Where the projector behind the audio encoder is."),
        )
    ),
    click.option(
        "--adapter",
        default=None,
        metavar="FILE.py:CLASS",
        help="Class of yours that drives the model; or PACKAGE.MODULE:CLASS. It is run as code.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python code that comes with the checkpoint; without it such a checkpoint is refused.",
    ),
)
parity_options = options(
    click.option("--prompts", default=4, show_default=True, help="Requests per parity batch."),
    click.option(
        "--decode-steps", default=8, show_default=True, help="Cached decode steps after the prefill."
    ),
    click.option(
        "--blocks/--no-blocks", default=True, show_default=True, help="Compare every block's output too."
    ),
)
DATA = "JSON Lines, JSON, CSV, parquet, a Hugging Face data set or a folder of audio"
"""What every option that takes requests says of them; `docs/data.md` has each by example."""
data_options = options(
    click.option("--prompt", default=None, help="Text of requests that come without one."),
    *(
        click.option(
            f"--{kind}-column",
            default=None,
            help=f"Column or JSON field that holds {what}.  [default: {kind}]",
        )
        for kind, what in (
            ("audio", "the clip"),
            ("text", "the text that goes with it"),
            ("transcript", "what is said in it"),
        )
    ),
    click.option(
        "--on-error",
        type=click.Choice([choice.value for choice in OnError]),
        default=OnError.STOP.value,
        show_default=True,
        help="Bad records and clips: name them and stop, or count them and go on without.",
    ),
)
overlap_option = click.option(
    "--allow-overlap",
    type=click.Choice([choice.value for choice in AllowedOverlap]),
    default=AllowedOverlap.NONE.value,
    show_default=True,
    help="What test requests may share with calibration: the same words in other clips, or all.",
)
judge_options = options(
    click.option("--answer-pattern", default=None, help="Regular expression that every real answer matches."),
    click.option(
        "--refusal-phrases",
        type=FILE,
        default=None,
        help="Phrases of refusal, one a line, instead of the shipped ones.",
    ),
    click.option(
        "--judge-model",
        type=FOLDER,
        default=None,
        help="Judge by a text-classification model in this directory instead of phrases.",
    ),
    click.option("--judge-refusal-label", default=None, help="The label that model gives refusals."),
    click.option(
        "--judge-url",
        default=None,
        metavar="http://host/v1",
        help="Judge by a model behind an OpenAI-compatible endpoint; its key, if it needs one, is read from the "
        "environment variable SARSTEER_JUDGE_API_KEY.",
    ),
    click.option("--judge-model-name", default=None, help="The name of the model at that endpoint."),
    click.option(
        "--judge-prompt",
        type=FILE,
        default=None,
        help="What a judging model reads, with {request} and {output} where they go.",
    ),
    click.option(
        "--judge-timeout",
        default=60.0,
        show_default=True,
        help="Seconds one reply of an endpoint may take as a whole.",
    ),
    click.option(
        "--judge-attempts",
        default=5,
        show_default=True,
        help="How often an endpoint is asked for one verdict.",
    ),
    click.option(
        "--judge-concurrency", default=4, show_default=True, help="Verdicts asked of an endpoint at once."
    ),
)
resume_option = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on from where an interrupted calibration of the same inputs stopped.",
)
calibration_options = options(
    click.option("--alpha", default=0.1, show_default=True, help="Strength of the steering vectors."),
    click.option(
        "--lambda",
        "ablation",
        default=1.0,
        show_default=True,
        help="Share of the safe subspace that is removed.",
    ),
    click.option(
        "--rank", default=10, show_default=True, help="Rank k of the safe subspace; 0 ablates nothing."
    ),
    click.option("--refusal-prompt", default=None, help="Refusal text that is added to the prompt."),
    click.option("--layers", default=None, help="Blocks to steer, such as 0,4-11,-1; all when left out."),
    click.option(
        "--limit", default=100, show_default=True, help="Most requests of each kind to calibrate on."
    ),
    click.option("--seed", default=0, show_default=True, help="Seed of the subset when there are more."),
    click.option(
        "--batch-size",
        type=int,
        default=None,
        help="Requests per forward pass.  [default: 16; up to 32 for a small model on the CPU]",
    ),
)


engine_options = options(
    click.option(
        "--engine",
        "engines",
        type=click.Choice([name for name in BACKENDS if name != CPU_BACKEND.name]),
        multiple=True,
        help="Engine to build, or provider to prove; may be given several times.",
    ),
    click.option("--max-batch", default=4, show_default=True, help="Most rows a derived profile admits."),
    click.option(
        "--max-prompt",
        type=int,
        default=None,
        help="Longest sequence of one pass it admits.  [default: 1024]",
    ),
    click.option(
        "--max-total",
        type=int,
        default=None,
        help="Longest cache, this pass included, it admits.  [default: 2048, or what the model knows]",
    ),
    *(
        click.option(
            f"--{kind}-shapes",
            multiple=True,
            metavar="NAME:1x2x3,...",
            help=f"{meaning} shapes of the decoder's inputs, as trtexec takes them; once per profile.",
        )
        for kind, meaning in (("min", "Smallest"), ("opt", "Typical"), ("max", "Largest"))
    ),
    click.option(
        "--profile",
        "profiles",
        multiple=True,
        help="Name of the profile of the n-th shapes; once per profile.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        metavar="8.9",
        help="CUDA compute capability to build for (TensorRT-RTX); may be given several times.",
    ),
)


def chosen_model_options(given: dict[str, Any]) -> ModelOptions:
    """Take the values of `model_options` out of `given`."""
    from calibration.decoder_parts import PartNames
    from calibration.model_options import ModelOptions

    parts = PartNames(**{part.name: given.pop(part.name) for part in dataclasses.fields(PartNames)})
    return ModelOptions(given.pop("adapter"), parts, given.pop("trust_remote_code"))


def engine_settings(given: dict[str, Any]) -> EngineSettings:
    """Take the values of `engine_options` out of `given`."""
    from sarsteer_export.engine_build import EngineSettings

    repeated = ("engines", "min_shapes", "opt_shapes", "max_shapes", "profiles", "compute_capabilities")
    values: dict[str, Any] = {name: tuple(given.pop(name)) for name in repeated}
    limits = ("max_batch", "max_prompt", "max_total")
    values |= {name: given.pop(name) for name in limits}
    context = click.get_current_context()
    needless = [name for name in repeated[1:] if values[name]]
    needless += [name for name in limits if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if needless and not values["engines"]:
        raise InputError(
            "shapes, their limits, profiles and compute capabilities are an engine's; name one with --engine"
        )
    return EngineSettings(**values)


def judge_settings(given: dict[str, Any]) -> JudgeSettings:
    """Take the values of `judge_options` out of `given`."""
    from sarsteer_export.judges.settings import JudgeSettings

    return JudgeSettings(
        answer_pattern=given.pop("answer_pattern"),
        refusal_phrases=given.pop("refusal_phrases"),
        model=given.pop("judge_model"),
        refusal_label=given.pop("judge_refusal_label"),
        url=given.pop("judge_url"),
        model_name=given.pop("judge_model_name"),
        prompt=given.pop("judge_prompt"),
        timeout_seconds=given.pop("judge_timeout"),
        attempts=given.pop("judge_attempts"),
        concurrency=given.pop("judge_concurrency"),
    )


def read_settings(given: dict[str, Any]) -> ReadSettings:
    """Take the values of `data_options` out of `given`."""
    names = ("prompt", "audio_column", "text_column", "transcript_column")
    for name in names:
        if given[name] == "":
            raise InputError(f"--{name.replace('_', '-')} is empty; expected a text")
    return ReadSettings(on_error=OnError(given.pop("on_error")), **{name: given.pop(name) for name in names})


def calibration_settings(
    model: Path, given: dict[str, Any], *, trust_remote_code: bool = False
) -> CalibrationSettings:
    """Take the values of `calibration_options` and `data_options` out of `given`.

    Negative layers are resolved here and only here.
    """
    from calibration.calibrate import REFUSAL_PROMPT, CalibrationSettings
    from calibration.directions import SteeringSettings

    for name in ("limit", "batch_size"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; expected at least 1")
    layers, refusal_prompt = given.pop("layers"), given.pop("refusal_prompt")
    return CalibrationSettings(
        steering=SteeringSettings(
            alpha=given.pop("alpha"),
            ablation=given.pop("ablation"),
            rank=given.pop("rank"),
            layers=None if layers is None else parse_layers(layers, _num_layers(model, trust_remote_code)),
        ),
        refusal_prompt=REFUSAL_PROMPT if refusal_prompt is None else refusal_prompt,
        limit=given.pop("limit"),
        seed=given.pop("seed"),
        batch_size=given.pop("batch_size"),
        data=read_settings(given),
    )


def parse_layers(text: str, num_layers: int, option: str = "--layers") -> tuple[int, ...]:
    """Block numbers from `0,4-11,-8--1`: single blocks, ranges with both ends, negatives from the end."""
    layers: list[int] = []
    for part in text.split(","):
        written = BLOCKS.fullmatch(part.strip())
        ends = [int(end) for end in written.groups() if end is not None] if written else []
        resolved = [end + num_layers if end < 0 else end for end in ends]
        if not resolved or resolved[-1] < resolved[0]:
            raise InputError(f"{option}: {part!r} is no block or range of blocks; write e.g. 0,4-11,-1")
        for end, number in zip(ends, resolved, strict=True):
            if not 0 <= number < num_layers:
                raise InputError(f"{option}: block {end} does not exist; the model has {num_layers} blocks")
        layers += range(resolved[0], resolved[-1] + 1)
    if len(set(layers)) != len(layers):
        raise InputError(f"{option}: {text!r} names no block, or one twice")
    return tuple(layers)


def parse_layer_sets(
    text: str, model: Path, *, trust_remote_code: bool = False
) -> tuple[tuple[int, ...] | None, ...]:
    """Sets of blocks parted by semicolons, `all` being every block, which is None."""
    parts = [part.strip() for part in text.split(";")]
    if parts == ["all"]:
        return (None,)
    blocks = _num_layers(model, trust_remote_code)
    return tuple(
        dict.fromkeys(None if part == "all" else parse_layers(part, blocks, "--layer-sets") for part in parts)
    )


def _num_layers(model: Path, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    from calibration.checkpoint import read_config

    written = read_config(model)
    try:  # not from the file itself: what equals a class's default need not be written there
        config: Any = AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=trust_remote_code
        )
        return int(config.get_text_config().num_hidden_layers)
    except Exception as error:  # a damaged configuration surfaces as almost any exception
        if isinstance(depth := written.get("num_hidden_layers"), int) and "model_type" in written:
            return depth  # a kind that transformers does not know
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model {model}: config.json does not say how many blocks it has ({reason})"
        ) from error
