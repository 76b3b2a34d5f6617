"""A checkpoint of the reference repository gives the vectors that its own equations give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.errors import InputError
from calibration.plan import Positions, Site
from sarsteer_export.interchange.convert import ConversionSettings, convert

HARMFUL, BENIGN, LAYERS, WIDTH = 6, 9, 3, 8
RTOL = 1e-4
"""Of float32 against float64: the singular vectors of 9 states that are no closer than a few per cent to degenerate."""


def checkpoint(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A stand-in of the form that `save_checkpoint` writes: last rows of block outputs, views included."""
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> dict[int, list[torch.Tensor]]:
        return {
            layer: [
                torch.randn(1, 5, WIDTH, generator=generator, dtype=torch.float64)
                .to(dtype)[:, -1, :]
                .squeeze()
                for _ in range(count)
            ]
            for layer in range(LAYERS)
        }

    return {
        "harm_hiddens": states(HARMFUL),
        "harm_refusal_hiddens": states(HARMFUL),
        "safe_hiddens": states(BENIGN),
        "safe_refusal_hiddens": states(BENIGN),
    }


def reference_vector(content: dict[str, Any], layer: int, rank: int, ablation: float) -> np.ndarray:
    """v⊥ of one block in float64, as the paper's equations and the repository have it."""
    harmful, refused, benign = (
        torch.stack(content[name][layer]).double()
        for name in ("harm_hiddens", "harm_refusal_hiddens", "safe_hiddens")
    )
    direction = (refused - harmful).mean(0)
    left, _, _ = torch.linalg.svd((benign - benign.mean(0)).T, full_matrices=False)
    basis = left[:, :rank]
    return (direction - ablation * basis @ (basis.T @ direction)).numpy()


def convert_checkpoint(content: object, folder: Path, **said: Any) -> Any:
    torch.save(content, folder / "activations.pth")
    return convert(
        folder / "activations.pth", folder / "plan.safetensors", ConversionSettings(**said), overwrite=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_vectors_are_those_of_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    content = checkpoint(dtype)
    plan = convert_checkpoint(content, tmp_path, alpha=0.3, ablation=0.5, rank=4).plan
    assert (plan.num_layers, plan.hidden_size, len(plan.edits)) == (LAYERS, WIDTH, LAYERS)
    for layer, edit in enumerate(plan.edits):
        assert (edit.layer, edit.strength, edit.site) == (layer, 0.3, Site.BLOCK_OUTPUT)
        assert edit.positions == Positions.LAST
        expected = reference_vector(content, layer, 4, 0.5)
        np.testing.assert_allclose(
            edit.tensors()["vector"], expected, rtol=0, atol=RTOL * np.abs(expected).max()
        )


def test_the_defaults_are_those_of_the_paper_and_stand_in_the_provenance(tmp_path: Path) -> None:
    provenance = convert_checkpoint(checkpoint(), tmp_path).plan.provenance
    assert {
        "alpha": 0.1,
        "lambda": 1.0,
        "rank": BENIGN - 1,
        "rank_requested": 10,
    }.items() <= provenance.items()
    assert provenance["source"]["format"] == "SARSteer activations"
    assert provenance["source"]["file"] == "activations.pth"
    assert len(provenance["source"]["sha256"]) == 64
    assert (provenance["harmful"]["count"], provenance["benign"]["count"]) == (HARMFUL, BENIGN)


def test_chosen_layers(tmp_path: Path) -> None:
    plan = convert_checkpoint(checkpoint(), tmp_path, rank=2, layers=lambda count: (0, count - 1)).plan
    assert [edit.layer for edit in plan.edits] == [0, LAYERS - 1]


def broken(change: Any) -> dict[str, Any]:
    content = checkpoint()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["safe_hiddens"].pop(1), "safe_hiddens is no dict over the blocks"),
        (lambda c: c["safe_hiddens"][1].pop(), "no list of tensors for every block, of one length"),
        (
            lambda c: c.update(safe_hiddens={n: c["safe_hiddens"][n][:1] for n in range(LAYERS)}),
            "expected at least 2",
        ),
        (lambda c: c.update(harm_refusal_hiddens=c["safe_refusal_hiddens"]), "expected the first two alike"),
        (lambda c: c.pop("harm_refusal_hiddens"), "harm_refusal_hiddens is no dict"),
        (
            lambda c: c["harm_hiddens"][0].__setitem__(2, torch.zeros(WIDTH + 1)),
            r"harm_hiddens\[0\]\[2\] is no vector",
        ),
        (lambda c: c["harm_hiddens"][0][0].fill_(float("nan")), "hold NaN or infinite"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        convert_checkpoint(broken(change), tmp_path)
    assert not (tmp_path / "plan.safetensors").exists()
