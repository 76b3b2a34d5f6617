"""The table of foreign decoder graphs, and how each is fed: prefill and cached decode, beside its PyTorch model.

Dimensions: B batch, S sequence of this pass, P past, T = P + S, D width, V vocabulary.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graph_passes.float32_twin import write_float32_twins
from tests.decoders import session
from tests.foreign import exports
from tests.foreign.checkpoints import CHECKPOINTS

FOREIGN = Path(__file__).resolve().parent
CACHE = re.compile(r"(\d+)\.(key|value)s?$")
"""How a cache's name ends, as `past_key_values.0.key` or `input.past_key_values.layers.0.keys`."""
FLOAT32_ATOL = 3e-5
"""float32 sums in another order than PyTorch's: measured at most 2e-6 (2e-5 for GELU) on logits up to 5."""


class Rotary(str, Enum):
    """What a graph turns queries and keys by."""

    POSITION_IDS = "position_ids"  # an input
    COLUMNS = "columns"  # the column of the cache, padding counted
    LENGTHS = "lengths"  # how many tokens of the row are attended: `GroupQueryAttention`


@dataclass(frozen=True)
class Case:
    """A kind of foreign graph.

    `files`: the graph of prefill and that of decode, in the folder of the case; often one. `checkpoint`: the
    folder below `checkpoints/` that holds the model of a committed graph. `make`: writes the files of a case
    that is not committed into a folder and returns the model. `paddings`: what the graph supports.
    `atol`: how close the unsteered graph comes to PyTorch, and `atol_reason` why it is not FLOAT32_ATOL.
    """

    name: str
    exporter: str
    files: tuple[str, ...] = ("model.onnx",)
    checkpoint: str = ""
    make: Callable[[Path], PreTrainedModel] | None = None
    embeds: bool = False
    rotary: Rotary = Rotary.POSITION_IDS
    paddings: tuple[str, ...] = ("none", "left", "right")
    head: str | None = None
    dtype: torch.dtype = torch.float32
    atol: float = FLOAT32_ATOL
    atol_reason: str = ""
    has_functions: bool = False


GENAI = "onnxruntime-genai 0.18.0 builder"
OPTIMUM = "optimum 1.24.0, transformers 4.48.3, TorchScript exporter of torch 2.13.0"
TRANSFORMERS = "transformers 5.23.0 OnnxExporter"
TORCHSCRIPT = "TorchScript exporter of torch 2.13, transformers 5.23"
GROUP_QUERY: dict[str, Any] = {"rotary": Rotary.LENGTHS, "paddings": ("none", "right")}
"""`GroupQueryAttention` knows of the mask only how many tokens a row has: they must stand on the left."""
QUANTISED = "activations of 8 bits; the model beside it has none"

CASES: tuple[Case, ...] = (
    Case("genai_fp32", GENAI, checkpoint="qwen2", **GROUP_QUERY),
    Case("genai_embeds", f"{GENAI}, exclude_embeds", checkpoint="qwen2", embeds=True, **GROUP_QUERY),
    Case("genai_int4", f"{GENAI}, int4", checkpoint="qwen2_int4", **GROUP_QUERY),
    Case(
        "genai_gemma2",
        GENAI,
        checkpoint="gemma2",
        atol=5e-3,
        atol_reason="the builder rounds the scale of embeddings, √32, to 5.66",
        **GROUP_QUERY,
    ),
    Case("genai_phi", GENAI, checkpoint="phi", **GROUP_QUERY),
    Case(
        "optimum_merged",
        f"{OPTIMUM}, legacy",
        ("decoder_model_merged.onnx",),
        "llama",
        rotary=Rotary.COLUMNS,
    ),
    Case("optimum_plain", OPTIMUM, checkpoint="llama"),
    Case("transformers_text", f"{TRANSFORMERS}, generation", ("prefill.onnx", "decode.onnx"), "qwen2"),
    Case(
        "transformers_lalm",
        f"{TRANSFORMERS}, generation",
        ("language_model.onnx", "decode.onnx"),
        "qwen2",
        embeds=True,
        head="lm_head.onnx",
    ),
    Case(
        "transformers_fp16",
        TRANSFORMERS,
        checkpoint="llama",
        dtype=torch.float16,
        atol=0.006,
        atol_reason="rounded to float16 between operations, PyTorch's model only in its weights",
    ),
    Case(
        "transformers_bf16",
        f"{TRANSFORMERS}; run as its float32 twin",
        checkpoint="llama",
        dtype=torch.bfloat16,
        atol=0.01,
        atol_reason="scalars of the graph are rounded to bfloat16 (the scale of attention scores)",
    ),
    *(
        Case(f"functions_{level}", TORCHSCRIPT, make=partial(exports.functions_graph, level), has_functions=True)
        for level in exports.FUNCTIONS
    ),
    *(
        Case(f"torchscript_{name}", TORCHSCRIPT, make=partial(exports.torchscript_graph, name))
        for name in ("llama", "gemma2", "phi", "gpt_neox", "gptj")
    ),
    Case("qdq_weights", "onnxruntime.quantization, int4 weights", make=exports.qdq_weights_graph),
    Case(
        "qdq_static",
        "onnxruntime.quantization, static",
        make=exports.qdq_static_graph,
        atol=0.8,
        atol_reason=QUANTISED,
    ),
    Case(
        "dynamic",
        "onnxruntime.quantization, dynamic",
        make=exports.dynamic_graph,
        atol=0.3,
        atol_reason=QUANTISED,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One forward pass: ids (B, S) or embeddings (B, S, D), mask (B, T), and caches key 0, value 0, …"""

    tokens: torch.Tensor
    mask_BT: torch.Tensor
    past: tuple[torch.Tensor, ...]

    @property
    def attended(self) -> np.ndarray:
        """(B, S) where this pass has tokens."""
        return self.mask_BT[:, self.mask_BT.shape[1] - self.tokens.shape[1] :].bool().numpy()

    def positions(self, rotary: Rotary) -> torch.Tensor:
        """Position ids (B, S) as the graph counts them."""
        batch, total = self.mask_BT.shape
        if rotary is Rotary.COLUMNS:
            positions_BT = torch.arange(total)[None].repeat(batch, 1)
        else:
            positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)
        return positions_BT[:, total - self.tokens.shape[1] :]


@dataclass(frozen=True)
class Outputs:
    """Logits (B, S, V), or the last hidden state where a graph has no head, and caches key 0, value 0, …"""

    logits: np.ndarray
    presents: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class ForeignGraph:
    """A case with its files on disk and the PyTorch model of the same weights, in float32."""

    case: Case
    folder: Path
    model: PreTrainedModel

    @property
    def prefill_path(self) -> Path:
        """The graph for a pass without a past."""
        return self.folder / self.case.files[0]

    @property
    def decode_path(self) -> Path:
        """The graph for a pass with a past; often the same."""
        return self.folder / self.case.files[-1]

    @cached_property
    def sessions(self) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
        """The unsteered graphs of prefill and decode."""
        return self.runnable(self.prefill_path), self.runnable(self.decode_path)

    @property
    def takes_chunks(self) -> bool:
        """Whether the graph of decode takes more than one token."""
        inputs = {value.name: value.shape for value in self.sessions[1].get_inputs()}
        return inputs["inputs_embeds" if "inputs_embeds" in inputs else "input_ids"][1] != 1

    def runnable(self, path: Path) -> onnxruntime.InferenceSession:
        """A session on CPU; a bfloat16 graph, which does not run there, as its float32 twin."""
        if self.case.dtype is not torch.bfloat16:
            return session(path)
        with tempfile.TemporaryDirectory() as folder:
            write_float32_twins([path], Path(folder))
            return session(Path(folder) / path.name)

    def first(self, padding: str, *, batch: int = 3, sequence: int = 5, seed: int = 0) -> Pass:
        """A prefill with rows of unequal length, padded on one side, or all full."""
        generator = torch.Generator().manual_seed(seed)
        mask_BS = torch.ones(batch, sequence, dtype=torch.long)
        for row in range(1, batch):
            if padding != "none":
                mask_BS[row, slice(row) if padding == "left" else slice(sequence - row, None)] = 0
        layers, heads, width = exports.cache_shape(self.model)
        past = tuple(torch.zeros(batch, heads, 0, width) for _ in range(2 * layers))
        return Pass(self._tokens(batch, sequence, generator, 0), mask_BS, past)

    def next(self, before: Pass, presents: Sequence[np.ndarray], *, sequence: int = 1, seed: int = 1) -> Pass:
        """A decode step of one token, or a further chunk, after `before`, from the caches that it left."""
        batch = len(before.mask_BT)
        generator = torch.Generator().manual_seed(seed)
        mask_BT = torch.cat([before.mask_BT, torch.ones(batch, sequence, dtype=torch.long)], dim=1)
        past = tuple(torch.from_numpy(np.ascontiguousarray(present)) for present in presents)
        return Pass(self._tokens(batch, sequence, generator, before.mask_BT.shape[1]), mask_BT, past)

    def _tokens(self, batch: int, sequence: int, generator: torch.Generator, past: int) -> torch.Tensor:
        ids_BS = torch.randint(0, int(self.model.config.vocab_size), (batch, sequence), generator=generator)
        graph_embeds = self.case.embeds and not (past and self.case.head)  # its decode graph takes ids
        if not graph_embeds:
            return ids_BS
        with torch.inference_mode():
            return self.model.get_input_embeddings()(ids_BS).clone()

    def run(self, runner: onnxruntime.InferenceSession, step: Pass) -> Outputs:
        """A pass through one of the case's graphs, unsteered or not, under whatever names it has."""
        answers = dict(
            zip(
                (v.name for v in runner.get_outputs()),
                runner.run(None, self.feeds(runner, step)),
                strict=True,
            )
        )
        logits = answers.get("logits", next(iter(answers.values())))
        presents = {_cache_number(name): array for name, array in answers.items() if CACHE.search(name)}
        if self.case.head is not None and "logits" not in answers:
            logits = session(self.folder / self.case.head).run(None, {"input": logits})[0]
        return Outputs(
            logits.astype(np.float32),
            tuple(presents[number].astype(np.float32) for number in sorted(presents)),
        )

    def feeds(self, runner: onnxruntime.InferenceSession, step: Pass) -> dict[str, np.ndarray]:
        """What a graph's inputs are in a pass."""
        feeds: dict[str, np.ndarray] = {}
        for value in runner.get_inputs():
            if CACHE.search(value.name):
                feeds[value.name] = step.past[_cache_number(value.name)].numpy()
            elif value.name == "use_cache_branch":
                feeds[value.name] = np.array([step.past[0].shape[2] > 0])
            elif value.name == "position_ids":
                feeds[value.name] = step.positions(self.case.rotary).numpy()
            elif value.name.endswith(
                "attention_mask"
            ):  # of `feature_attention_mask` nothing in a decoder depends
                feeds[value.name] = step.mask_BT.numpy()
            else:
                assert value.name in ("input_ids", "inputs_embeds"), value.name
                feeds[value.name] = step.tokens.numpy()
            if value.type == "tensor(float16)":
                feeds[value.name] = feeds[value.name].astype(np.float16)
        return feeds

    def eager(self, step: Pass) -> Outputs:
        """The same pass through the PyTorch model."""
        positions_BS = step.positions(self.case.rotary)
        with torch.inference_mode():
            logits, *presents = exports.FlatCausalLM(self.model)(
                step.tokens, step.mask_BT, positions_BS, *step.past
            )
        return Outputs(logits.numpy(), tuple(present.numpy() for present in presents))

    def attended(self, step: Pass, cache: np.ndarray, *, graph: bool) -> np.ndarray:
        """The keys or values (B, H, T, W) of attended tokens, row after row: (tokens, H, W).

        `GroupQueryAttention` keeps a row's tokens at the left of the cache, PyTorch where they stood.
        """
        mask_BT = step.mask_BT.bool().numpy()
        if graph and self.case.rotary is Rotary.LENGTHS:
            mask_BT = np.arange(mask_BT.shape[1])[None] < mask_BT.sum(1, keepdims=True)
        return cache.swapaxes(1, 2)[mask_BT]


def _cache_number(name: str) -> int:
    found = CACHE.search(name)
    assert found is not None
    return 2 * int(found[1]) + (found[2] == "value")


def open_case(case: Case, scratch: Path) -> ForeignGraph:
    """A case with its files; those that are not committed are made in `scratch`."""
    if case.make is not None:
        return ForeignGraph(case, scratch, case.make(scratch))
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / case.checkpoint, local_files_only=True)
    return ForeignGraph(case, FOREIGN / case.name, model.to(case.dtype).float().eval())


def blocks_and_norm(model: PreTrainedModel) -> tuple[Sequence[nn.Module], nn.Module]:
    """The blocks and the final norm of a model, under any of the names that they have in transformers."""
    decoder: Any = model.base_model
    blocks = getattr(decoder, "layers", None) or decoder.h
    found = (getattr(decoder, name, None) for name in ("norm", "final_layer_norm", "final_layernorm", "ln_f"))
    return blocks, next(norm for norm in found if norm is not None)
