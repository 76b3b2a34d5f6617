"""`sarsteer-export convert`."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, overwrite_option, parse_layers

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


@click.command("convert", cls=Command)
@click.argument("source", metavar="INPUT", type=FILE)
@click.option("--output", "-o", type=FILE, required=True, help="File to write; its suffix says the format.")
@click.option(
    "--to",
    type=click.Choice(["plan", "gguf", "steering-vectors", "svec"]),
    default=None,
    help="Format to write.  [default: by suffix: .safetensors, .gguf, .pt or .pth, .svec]",
)
@click.option(
    "--num-layers",
    type=click.IntRange(min=1),
    help="Decoder blocks of the model; files of vectors do not say.",
)
@click.option("--layers", default=None, help="Blocks to keep, such as 0,4-11,-1; all when left out.")
@click.option("--strength", type=float, help="Strength of the vectors that are read.  [default: 1]")
@click.option("--positions", help="Where the vectors that are read act, as plans write it.  [default: all]")
@click.option("--alpha", type=float, help="Of activations: strength of the vectors.  [default: 0.1]")
@click.option(
    "--lambda",
    "ablation",
    type=float,
    help="Of activations: share of the safe subspace removed.  [default: 1]",
)
@click.option("--rank", type=int, help="Of activations: rank k of the safe subspace.  [default: 10]")
@click.option("--model-type", help="Type of the model, such as qwen2; for GGUF and .svec files alone.")
@click.option(
    "--allow-all-positions",
    is_flag=True,
    help="Write edits of chosen positions to a format that adds at every one.",
)
@click.option("--drop-block-0", is_flag=True, help="Leave out the edits of block 0, which GGUF cannot hold.")
@click.option(
    "--drop-last-block",
    is_flag=True,
    help="Leave out edits behind the last block, which .svec cannot hold.",
)
@overwrite_option
def command(
    source: Path,
    output: Path,
    to: str | None,
    layers: str | None,
    allow_all_positions: bool,
    drop_block_0: bool,
    drop_last_block: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Convert INPUT between plans and the files of other tools.

    Read, and told by content: plans; control vectors of llama.cpp and repeng (GGUF); SteeringVector objects of
    steering-vectors, saved with torch.save; .svec files of IBM's activation-steering; the activation checkpoint of
    SARSteer's reference repository, from which the plan is computed. Nothing in a pickle is ever run. Written: all but
    the last. What a format cannot hold is refused, and left out only where an option says so.

    \b
    Examples:
      sarsteer-export convert happy.gguf -o plan.safetensors --num-layers 32 --strength 0.5
      sarsteer-export convert activations.pth -o plan.safetensors --alpha 0.1 --lambda 1 --rank 10
      sarsteer-export convert plan.safetensors -o vector.gguf --drop-block-0 --allow-all-positions
    """
    from sarsteer_export.interchange.convert import ConversionSettings, convert
    from sarsteer_export.interchange.fitting import AllowedLosses

    settings = ConversionSettings(
        layers=None if layers is None else partial(parse_layers, layers),
        losses=AllowedLosses(allow_all_positions, drop_block_0, drop_last_block),
        **given,
    )
    result = convert(source, output, settings, to=to, overwrite=overwrite)
    for note in result.notes:
        logger.warning(note)
    edits = [
        {
            "layer": edit.layer,
            "site": edit.site.value,
            "positions": edit.positions.value,
            "strength": edit.strength,
            "norms": {name: float(np.linalg.norm(tensor)) for name, tensor in edit.tensors().items()},
        }
        for edit in result.plan.edits
    ]
    content = {
        "output": str(output),
        "format": result.target.value,
        "plan_sha256": result.plan.digest(),
        "edits": edits,
        "notes": list(result.notes),
        "provenance": dict(result.plan.provenance),
    }
    emit(content, f"{len(edits)} edits read -> {output} ({result.target.value})", as_json=as_json)
