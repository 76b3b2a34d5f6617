"""Graphs without an unbroken chain of residual adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from calibration.errors import SiteNotFoundError
from graph_passes.residual_stream import find_residual_stream
from tests.decoders import _torchscript


def graph_of(module: torch.nn.Module, sample: Any, folder: Path) -> onnx.ModelProto:
    _torchscript(module, sample, folder / "model.onnx", ["x"], ["y"])
    return onnx.load(folder / "model.onnx")


def test_a_graph_without_residual_adds_names_the_nearest_candidates(tmp_path: Path) -> None:
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    proto = graph_of(mlp, torch.zeros(2, 3, 4), tmp_path)
    with pytest.raises(
        SiteNotFoundError, match=r"leads to 'y'; nearest candidates: .*Add '/0/Add', Add '/2/Add'"
    ):
        find_residual_stream(proto)
    assert SiteNotFoundError.exit_code == 4


def test_a_graph_without_any_add_says_so(tmp_path: Path) -> None:
    proto = graph_of(torch.nn.ReLU(), torch.zeros(2, 3, 4), tmp_path)
    with pytest.raises(SiteNotFoundError, match="the graph has no Add"):
        find_residual_stream(proto)


def test_a_post_norm_decoder_is_refused(tmp_path: Path) -> None:
    """Post-norm blocks normalise the stream itself: there is no unbroken chain of residual adds."""

    class PostNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)
            )
            self.head = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block.norm1(x + block._sa_block(x, None, None))
                x = block.norm2(x + block._ff_block(x))
            return self.head(x)

    proto = graph_of(PostNorm().eval(), torch.randn(2, 3, 8), tmp_path)
    with pytest.raises(SiteNotFoundError):
        find_residual_stream(proto)
