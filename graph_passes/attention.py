"""Which branches of the residual stream hold attention, and which graph inputs are its KV cache."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from graph_passes.attention_mask import MASK_NAME
from graph_passes.graph_index import MATMUL_OPS

if TYPE_CHECKING:
    from graph_passes.graph_index import GraphIndex

PER_LAYER_INPUTS = "per_layer_inputs"
"""Embeddings of the tokens for every block, [batch, sequence, layers, width], as Gemma reads them."""
NOT_CACHES = frozenset({MASK_NAME, PER_LAYER_INPUTS})


def cache_inputs(index: GraphIndex) -> list[str]:
    """Graph inputs of rank 4: past keys and values [batch, kv_heads, past, head_dim]."""
    return [name for name, rank in index.input_ranks.items() if rank == 4 and name not in NOT_CACHES]


def read_caches(index: GraphIndex) -> list[str]:
    """The caches that a graph reads: the body for passes without a past reads none of a merged decoder's."""
    caches = cache_inputs(index)
    return caches if any(index.consumers[name] for name in caches) else []


class AttentionFinder:
    """Tells attention from other branches of one graph.

    Attention reads a KV cache, or computes scores: a fused operator, or a Softmax over the product of two
    computed tensors. A block that attends to keys and values of an earlier one has no cache of its own.
    """

    def __init__(self, index: GraphIndex) -> None:
        self.index = index
        self.caches = {name: index.bit(name) for name in read_caches(index)}

    def is_attention(self, branch: int) -> bool:
        """Whether the nodes and inputs of a branch, a bit set, hold attention."""
        if any(branch & bit for bit in self.caches.values()) or branch & self._fused:
            return True
        return any(branch & bit and ancestors & branch & self._products for bit, ancestors in self._softmaxes)

    def caches_of(self, branch: int) -> list[str]:
        """The caches that a branch reads."""
        return [name for name, bit in self.caches.items() if branch & bit]

    @cached_property
    def _fused(self) -> int:
        return sum(
            1 << position for position, node in enumerate(self.index.nodes) if "Attention" in node.op_type
        )

    @cached_property
    def _products(self) -> int:
        """Products of two computed tensors: a router's Softmax in a mixture of experts has none behind it."""
        return sum(
            1 << position
            for position, node in enumerate(self.index.nodes)
            if node.op_type in MATMUL_OPS and all(self.index.is_computed(name) for name in node.input[:2])
        )

    @cached_property
    def _softmaxes(self) -> list[tuple[int, int]]:
        """The bit and the ancestors of every Softmax."""
        return [
            (1 << position, self.index.ancestors(node.output[0]))
            for position, node in enumerate(self.index.nodes)
            if node.op_type == "Softmax"
        ]
