"""The residual stream is found by structure, in graphs of several exporters and kinds of decoder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from calibration.errors import SiteNotFoundError, UnsupportedError
from calibration.plan import Site
from graph_passes.residual_stream import SCOPES_KEY, find_residual_stream
from tests import tiny_lalm
from tests.conftest import padded
from tests.decoders import (
    HAND_LAYERS,
    HAND_WIDTH,
    HandDecoder,
    TinyDecoder,
    Variant,
    hand_decoder,
    hand_feeds,
    no_past,
    run_eager,
    run_graph,
    session,
)
from tests.graph_passes.test_residual_chain import graph_of

STREAM_ATOL = 2e-5
"""float32 sums in another order than PyTorch's: measured at most 4e-6 on states of magnitude up to 11."""

VARIANTS = {
    "pre-norm RMS": Variant(),
    "Gemma norm": Variant(norm="rms_gemma"),
    "LayerNorm with bias": Variant(norm="layer"),
    "parallel attention and MLP": Variant(residual="parallel"),
    "parallel, summed first": Variant(residual="parallel_sum", norm="layer"),
    "sandwich norm": Variant(residual="sandwich"),
    "learned positions": Variant(tokens=True, norm="layer"),
    "no cache": Variant(cache=False),
    "no cache, experts": Variant(cache=False, experts=True),
    "experts": Variant(experts=True),
    "elementwise residual before block 0": Variant(warm=True),
    "blocks that scale their sum": Variant(scaled=True, residual="sandwich"),
    "one block without a cache of its own": Variant(sharing=1),
    "two blocks that attend to the first": Variant(sharing=2, experts=True, scaled=True),
    "no mask": Variant(mask=False),
    "logits of the last token": Variant(head="last"),
    "capped logits": Variant(head="capped", norm="rms_gemma"),
}


def with_outputs(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    present = {value.name for value in proto.graph.output}
    probed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present
    )
    return probed


def hooked(blocks: Any, final_norm: torch.nn.Module, call: Any) -> dict[str, torch.Tensor]:
    """The streams of an eager run: inputs and outputs of blocks and the final norm's output."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, output: Any) -> None:
            seen[f"input {name}"] = args[0]
            seen[f"output {name}"] = output[0] if isinstance(output, tuple) else output

        return hook

    modules = {**{str(number): block for number, block in enumerate(blocks)}, "norm": final_norm}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.inference_mode():
        call()
    for handle in handles:
        handle.remove()
    return seen


def test_the_stream_of_the_tiny_decoder_is_the_models(any_decoder: TinyDecoder) -> None:
    stream = find_residual_stream(any_decoder.proto)
    assert len(stream.blocks) == tiny_lalm.LAYERS
    assert [block.index for block in stream.blocks] == list(range(tiny_lalm.LAYERS))
    assert all(len(block.adds) == 2 for block in stream.blocks)
    assert stream.hidden_size == tiny_lalm.WIDTH
    assert stream.elem_type == TensorProto.FLOAT
    assert stream.attention_mask == "attention_mask"
    assert stream.other_types == ()
    tensors = [stream.tensor(Site.BLOCK_INPUT, layer) for layer in range(tiny_lalm.LAYERS)]
    tensors += [stream.tensor(Site.BLOCK_OUTPUT, layer) for layer in range(tiny_lalm.LAYERS)]
    tensors += [stream.tensor(Site.FINAL_NORM_OUTPUT, tiny_lalm.LAYERS - 1)]
    mask = padded("none")
    embeds = torch.randn(*mask.shape, tiny_lalm.WIDTH, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(mask.shape[1])[None].repeat(len(mask), 1)
    arguments = (embeds, mask, positions, no_past(len(mask)))
    parts = find_parts(any_decoder)
    seen = hooked(parts.blocks, parts.final_norm, lambda: run_eager(any_decoder.model, *arguments))
    runner = session(with_outputs(any_decoder.proto, computed(tensors)), any_decoder.path.parent)
    values = run_graph(runner, *arguments) | {"inputs_embeds": embeds.numpy()}
    names = [f"input {layer}" for layer in range(tiny_lalm.LAYERS)]
    names += [f"output {layer}" for layer in range(tiny_lalm.LAYERS)] + ["output norm"]
    for name, tensor in zip(names, tensors, strict=True):
        np.testing.assert_allclose(values[tensor], seen[name], rtol=0, atol=STREAM_ATOL, err_msg=name)


def find_parts(decoder: TinyDecoder) -> Any:
    from calibration.decoder_parts import find_decoder

    return find_decoder(decoder.model)


def computed(tensors: list[str]) -> list[str]:
    return [name for name in tensors if name != "inputs_embeds"]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_stream_of_every_kind_of_decoder_is_the_models(variant: Variant, tmp_path: Path) -> None:
    model, proto = hand_decoder(variant, tmp_path / "model.onnx")
    assert_stream_is_the_models(model, proto)


def assert_stream_is_the_models(model: HandDecoder, proto: onnx.ModelProto) -> None:
    stream = find_residual_stream(proto)
    assert (len(stream.blocks), stream.hidden_size) == (HAND_LAYERS, HAND_WIDTH)
    assert stream.attention_mask == ("attention_mask" if model.variant.mask else None)
    sample = model.sample(seed=5)
    seen = hooked(model.blocks, model.norm, lambda: model(*sample))
    tensors = {f"input {block.index}": block.input for block in stream.blocks}
    tensors |= {f"output {block.index}": block.output for block in stream.blocks}
    tensors["output norm"] = stream.tensor(Site.FINAL_NORM_OUTPUT, HAND_LAYERS - 1)
    feeds = hand_feeds(proto, sample)
    names = [name for name in dict.fromkeys(tensors.values()) if name not in feeds]
    runner = session(with_outputs(proto, names))
    values = dict(zip(names, runner.run(names, feeds), strict=True)) | feeds
    for name, tensor in tensors.items():
        np.testing.assert_allclose(values[tensor], seen[name], rtol=0, atol=STREAM_ATOL, err_msg=name)


@pytest.mark.parametrize("opset", [13, 14, 18])
def test_the_stream_is_found_in_older_and_newer_opsets(opset: int, tmp_path: Path) -> None:
    model, proto = hand_decoder(Variant(), tmp_path / "model.onnx", opset=opset)
    assert_stream_is_the_models(model, proto)


@pytest.mark.parametrize("norm", ["rms", "rms_gemma", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_in_a_low_precision_graph_are_no_obstacle(
    dtype: torch.dtype, norm: str, tmp_path: Path
) -> None:
    """Norms widen to float32 and narrow again; the stream and the norm's output are of the graph's dtype."""
    _, proto = hand_decoder(Variant(norm=norm, dtype=dtype), tmp_path / "model.onnx")
    stream = find_residual_stream(proto)
    assert len(stream.blocks) == HAND_LAYERS
    assert stream.elem_type == helper.np_dtype_to_tensor_dtype(np.dtype(torch_to_numpy(dtype)))
    assert stream.other_types == ()
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    for name in (*(block.output for block in stream.blocks), stream.final_norm_output):
        assert types[str(name)].type.tensor_type.elem_type == stream.elem_type


def torch_to_numpy(dtype: torch.dtype) -> Any:
    import ml_dtypes

    return {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]


def test_the_stream_does_not_depend_on_names_or_scopes(exported_decoder: TinyDecoder) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported_decoder.proto)
    for node in proto.graph.node:
        node.name = ""
        del node.metadata_props[:]
    found = find_residual_stream(proto)
    expected = find_residual_stream(exported_decoder.proto)
    assert [(b.input, b.output) for b in found.blocks] == [(b.input, b.output) for b in expected.blocks]
    assert dataclasses.replace(found, blocks=()) == dataclasses.replace(expected, blocks=())


def test_a_module_scope_that_contradicts_structure_is_an_error(exported_decoder: TinyDecoder) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(exported_decoder.proto)
    output = find_residual_stream(proto).blocks[1].output
    node = next(node for node in proto.graph.node if output in node.output)
    entry = next(entry for entry in node.metadata_props if entry.key == SCOPES_KEY)
    assert "layers.1'" in entry.value
    entry.value = entry.value.replace("layers.1'", "layers.2'")
    with pytest.raises(SiteNotFoundError, match="ends block 1; its module scope says layer 2"):
        find_residual_stream(proto)


def test_an_embedding_in_another_dtype_starts_the_stream_behind_its_cast(tmp_path: Path) -> None:
    proto = _with_cast_embedding(tmp_path)
    stream = find_residual_stream(proto)
    assert stream.blocks[0].input == "narrow_embeds"
    assert stream.elem_type == TensorProto.FLOAT16
    assert stream.other_types == ()


def test_an_embedding_that_block_0_reads_uncast_is_of_its_own_dtype(tmp_path: Path) -> None:
    """The skip reads a cast, the branch another: the tensor that all of block 0 reads is before both."""
    proto = _with_cast_embedding(tmp_path)
    stream = find_residual_stream(proto)
    readers = [node for node in proto.graph.node if "narrow_embeds" in node.input]
    skip = next(node for node in readers if node.op_type == "Add")
    skip.input[list(skip.input).index("narrow_embeds")] = "second_cast"
    second = helper.make_node("Cast", ["inputs_embeds"], ["second_cast"], to=TensorProto.FLOAT16)
    proto.graph.node.insert(0, second)
    again = find_residual_stream(proto)
    assert again.blocks[0].input == "inputs_embeds"
    assert again.other_types == (("inputs_embeds", TensorProto.FLOAT),)
    assert again.elem_type_of("inputs_embeds") == TensorProto.FLOAT
    assert again.elem_type_of(again.blocks[0].output) == TensorProto.FLOAT16
    assert again.blocks[1:] == stream.blocks[1:]


def _with_cast_embedding(folder: Path) -> onnx.ModelProto:
    """A float16 decoder whose embeddings come in as float32 and are cast first."""
    _, proto = hand_decoder(Variant(dtype=torch.float16), folder / "model.onnx")
    graph = proto.graph
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == "inputs_embeds":
                node.input[position] = "narrow_embeds"
    next(v for v in graph.input if v.name == "inputs_embeds").type.tensor_type.elem_type = TensorProto.FLOAT
    cast = helper.make_node("Cast", ["inputs_embeds"], ["narrow_embeds"], to=TensorProto.FLOAT16)
    graph.node.insert(0, cast)
    return proto


class ResidualMlp(torch.nn.Module):
    """A residual stream without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.inner(x).relu()
        return self.inner(x + self.inner(x).relu())


def test_a_stream_without_attention_is_no_decoder(tmp_path: Path) -> None:
    proto = graph_of(ResidualMlp(), torch.zeros(2, 3, 4), tmp_path)
    with pytest.raises(SiteNotFoundError, match=r"starts with Add '/Add', whose branch holds no attention"):
        find_residual_stream(proto)


def test_a_merged_decoder_is_refused(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    body = helper.make_graph(
        [helper.make_node("MatMul", ["logits", "w"], ["z"])],
        "body",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [23, 1], [0.0] * 23)],
    )
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True]))
    merged = helper.make_node("If", ["c"], ["out"], name="merged", then_branch=body, else_branch=body)
    proto.graph.node.extend([condition, merged])
    with pytest.raises(UnsupportedError, match="If 'merged' holds bodies that compute"):
        find_residual_stream(proto)


def test_a_cache_that_no_block_reads_is_an_error(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    proto.graph.input.append(helper.make_tensor_value_info("past.3.key", TensorProto.FLOAT, [2, 2, 3, 8]))
    with pytest.raises(
        SiteNotFoundError, match=r"found 3 decoder blocks .* has 7 KV-cache inputs; expected 6"
    ):
        find_residual_stream(proto)


def test_a_width_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    output = find_residual_stream(proto).blocks[0].output
    outputs = [block.output for block in find_residual_stream(proto).blocks]
    for width, name in zip((16, 16, 8), outputs, strict=True):
        proto.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", width])
        )
    with pytest.raises(SiteNotFoundError, match=re.escape(f"stream at {output!r} is not one fixed number")):
        find_residual_stream(proto)


def test_a_numeric_string_is_a_width(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    for block in find_residual_stream(proto).blocks:
        dims = ["b", "s", str(HAND_WIDTH)]
        proto.graph.value_info.append(helper.make_tensor_value_info(block.output, TensorProto.FLOAT, dims))
    assert find_residual_stream(proto).hidden_size == HAND_WIDTH


def test_a_four_dimensional_mask_cannot_say_which_position_is_last(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(mask=False), tmp_path / "model.onnx")
    proto.graph.input.append(
        helper.make_tensor_value_info("attention_mask", TensorProto.FLOAT, ["b", 1, "s", "t"])
    )
    assert find_residual_stream(proto).attention_mask is None


@pytest.mark.parametrize(
    "cache", [f"past_key_values.layers.{layer}.{kind}" for layer in (0, 2) for kind in ("keys", "values")]
)
def test_positions_may_be_numbered_by_the_length_of_any_block_s_cache(
    exported_decoder: TinyDecoder, cache: str
) -> None:
    """Exporters take the length of the past from whichever cache they like; everything then depends on that one."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exported_decoder.proto)
    lengths = [
        node
        for node in proto.graph.node
        if node.op_type == "Shape" and node.input[0].startswith("past_key_values.")
    ]
    assert lengths
    for node in lengths:
        node.input[0] = cache
    assert find_residual_stream(proto).blocks == find_residual_stream(exported_decoder.proto).blocks
