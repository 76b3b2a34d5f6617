"""What the pocket LALM does before any steering, measured with the saved checkpoint.

python examples/pocket_lalm/behaviour.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from calibration.lalm import load_lalm
from clips import Split
from replies import Request, ask, read_split, tally
from topics import Harm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from calibration.lalm import Lalm

HERE = Path(__file__).parent
_COLUMNS = (
    *("request", "refusal text in prompt", "topic", "n"),
    *("refused", "answered", "exactly as asked", "degenerate"),
)


@click.command()
@click.option(
    "--pocket",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=HERE,
    show_default="the folder of this script",
    help="The folder that holds model/, data/ and audio/.",
)
@click.option(
    "--split",
    type=click.Choice([split.value for split in Split]),
    default=Split.TEST.value,
    show_default=True,
    help="Which clips to measure on.",
)
def main(pocket: Path, split: str) -> None:
    """Print the behaviour of the checkpoint, undefended, as a Markdown table."""
    lalm = load_lalm(pocket / "model")
    click.echo(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
    for harm in Harm:
        spoken = read_split(pocket / "data" / f"{split}_{harm.value}.jsonl")
        # Several clips may ask the same thing; as text that is one request.
        typed = list(dict.fromkeys(request.typed() for request in spoken))
        for kind, requests in (("text", typed), ("speech", spoken)):
            for row in _rows(lalm, requests):
                click.echo(f"| {harm.value} {kind} | {row} |")


def _rows(lalm: Lalm, requests: Sequence[Request]) -> Iterator[str]:
    """Table cells after the first: without and with the refusal text, for seen and for held-out topics."""
    for prompted in (False, True):
        asked = [request.with_refusal() if prompted else request for request in requests]
        replied = list(zip(asked, ask(lalm, asked), strict=True))
        for topic_seen in (True, False):
            chosen = [pair for pair in replied if pair[0].topic_seen is topic_seen]
            if chosen:
                counts = tally(*zip(*chosen, strict=True))
                shares = (counts.refused, counts.answered, counts.on_topic / counts.total, counts.degenerate)
                setting = f"{'yes' if prompted else 'no'} | {'seen' if topic_seen else 'held out'}"
                yield f"{setting} | {counts.total} | {' | '.join(f'{share:.2f}' for share in shares)}"


if __name__ == "__main__":
    main()
