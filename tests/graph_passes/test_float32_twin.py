"""Float32 twins of bfloat16 graphs: every bfloat16 is found, every value kept, and nothing else is changed."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import InputError
from calibration.lalm import load_lalm
from calibration.plan import Positions, Site
from calibration.steered import steered
from graph_passes import float32_twin
from graph_passes.float32_twin import PAGE_BYTES, write_float32_twins
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import patch_model
from sarsteer_export.exporting.export import export_decoder
from tests import tiny_lalm
from tests.conftest import one_edit, padded, plan_of
from tests.decoders import TinyDecoder, no_past, run_eager, run_graph, session
from tests.sarsteer_export.command_line import listing

BFLOAT16, FLOAT, INT64, UINT8 = (
    TensorProto.BFLOAT16,
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.UINT8,
)
BITS = np.array(
    [0x3F80, 0xC020, 0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x3DCD, 0x0080],
    np.uint16,
)
"""1, −2.5, zeros, the smallest subnormals, the largest values, infinities, a value that is no short decimal."""
ANYWHERE = re.compile(r"(data_type|elem_type): 16\b")
Usage = namedtuple("Usage", "total used free")


def widened(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bit patterns, by another way than the code under test."""
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def tensor_of(name: str, bits: np.ndarray, *, raw: bool = True) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=BFLOAT16, dims=bits.shape)
    if raw:
        tensor.raw_data = bits.astype("<u2").tobytes()
    else:
        tensor.int32_data.extend(int(value) for value in bits.ravel())
    return tensor


def external(
    name: str, elem_type: int, dims: tuple[int, ...], location: str, **entries: int
) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=elem_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def value(name: str, elem_type: int, dims: list[Any] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, dims)


def model_of(*initializers: onnx.TensorProto) -> onnx.ModelProto:
    """A graph that only hands its initializers out."""
    nodes = [helper.make_node("Identity", [tensor.name], [f"{tensor.name}_out"]) for tensor in initializers]
    outputs = [value(f"{tensor.name}_out", tensor.data_type, list(tensor.dims)) for tensor in initializers]
    return model_from(helper.make_graph(nodes, "g", [], outputs, list(initializers)))


def model_from(graph: onnx.GraphProto, **more: Any) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    folder = tmp_path / "twins"
    folder.mkdir()
    return folder


def twin_of(model: onnx.ModelProto, home: Path, twins: Path) -> onnx.ModelProto:
    """The twin of one graph as it was written, checked to be a valid graph without bfloat16."""
    onnx.save(model, home / "model.onnx")
    before = listing(home)
    write_float32_twins([home / "model.onnx"], twins)
    assert listing(home) == before
    assert (twins / "model.onnx").stat().st_mode == (home / "model.onnx").stat().st_mode
    onnx.checker.check_model(twins / "model.onnx", full_check=True)
    twin = onnx.load(twins / "model.onnx", load_external_data=False)
    assert not ANYWHERE.search(str(twin))
    return twin


def outputs_of(path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    runner = session(path)
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(names, feeds), strict=True))


@pytest.mark.parametrize("raw", [True, False], ids=["raw_data", "int32_data"])
def test_inline_values_are_kept_to_the_bit(home: Path, twins: Path, *, raw: bool) -> None:
    scalar = tensor_of("scalar", BITS[1].reshape(()), raw=raw)
    twin = twin_of(model_of(tensor_of("w", BITS.reshape(3, 4), raw=raw), scalar), home, twins)
    table, single = (numpy_helper.to_array(tensor) for tensor in twin.graph.initializer)
    assert (table.dtype, table.shape) == (np.float32, (3, 4))
    assert table.tobytes() == widened(BITS).tobytes()
    assert (single.shape, float(single)) == ((), -2.5)
    assert outputs_of(twins / "model.onnx")["w_out"].tobytes() == widened(BITS).tobytes()


def test_external_values_are_kept_to_the_bit_and_the_rest_is_copied(home: Path, twins: Path) -> None:
    counts, odd = np.arange(5, dtype=np.int64), np.arange(7, dtype=np.uint8)
    content = b"header" + BITS.tobytes() + counts.tobytes() + odd.tobytes()
    (home / "w.bin").write_bytes(content)
    offsets = np.cumsum([6, BITS.nbytes, counts.nbytes]).tolist()
    model = model_of(
        external("w", BFLOAT16, (3, 4), "w.bin", offset=offsets[0], length=BITS.nbytes),
        external("counts", INT64, (5,), "w.bin", offset=offsets[1], length=counts.nbytes),
        external("odd", UINT8, (7,), "w.bin", offset=offsets[2]),
        external("none", BFLOAT16, (0, 2), "w.bin", offset=0, length=0),
        numpy_helper.from_array(counts, "inline"),
    )
    twin = twin_of(model, home, twins)
    seen = outputs_of(twins / "model.onnx")
    assert seen["w_out"].tobytes() == widened(BITS).tobytes()
    assert seen["counts_out"].tolist() == seen["inline_out"].tolist() == counts.tolist()
    assert seen["odd_out"].tolist() == odd.tolist()
    assert seen["none_out"].shape == (0, 2)
    entries = [{e.key: e.value for e in tensor.external_data} for tensor in twin.graph.initializer]
    assert all(int(entry["offset"]) % PAGE_BYTES == 0 for entry in entries[:4])
    assert (twins / "w.bin").stat().st_size == 2 * PAGE_BYTES + odd.nbytes
    assert twin.graph.initializer[4] == model.graph.initializer[4]


def test_a_data_file_that_graphs_share_is_converted_once(home: Path, twins: Path) -> None:
    """As in a bundle: the steered and the unsteered decoder read one file of weights."""
    (home / "sub").mkdir()
    (home / "sub" / "w.bin").write_bytes(BITS.tobytes() + BITS[::-1].tobytes())
    first = external("w", BFLOAT16, (3, 4), "sub/w.bin", offset=0, length=BITS.nbytes)
    same = external("again", BFLOAT16, (12,), "./sub/w.bin", offset=BITS.nbytes, length=BITS.nbytes)
    second = external("other", BFLOAT16, (12,), "sub/w.bin", offset=BITS.nbytes, length=BITS.nbytes)
    write_graph(model_of(first), home / "a.onnx")
    write_graph(model_of(same, second, tensor_of("own", BITS)), home / "b.onnx")
    write_float32_twins([home / "a.onnx", home / "b.onnx"], twins)
    assert sorted(listing(twins)) == ["a.onnx", "b.onnx", "sub", "sub/w.bin"]
    assert (twins / "sub" / "w.bin").stat().st_size == PAGE_BYTES + 2 * BITS.nbytes
    seen = outputs_of(twins / "a.onnx") | outputs_of(twins / "b.onnx")
    backwards = widened(BITS[::-1].copy()).tobytes()
    assert {name: array.tobytes() for name, array in seen.items()} == {
        **dict.fromkeys(("w_out", "own_out"), widened(BITS).tobytes()),
        **dict.fromkeys(("again_out", "other_out"), backwards),
    }


def test_every_place_that_holds_bfloat16_is_found(home: Path, twins: Path) -> None:
    """Casts, constants, fills, bodies, functions and recorded types; what is float32 or integer stays as it is."""
    three, four, five = (tensor_of("", np.array([bits], np.uint16)) for bits in (0x4040, 0x4080, 0x40A0))
    then = helper.make_graph(
        [
            helper.make_node("Constant", [], ["t"], value=three),
            helper.make_node("Identity", ["t"], ["t_out"]),
        ],
        "then",
        [],
        [value("t_out", BFLOAT16, [1])],
        value_info=[value("t", BFLOAT16, [1])],
    )
    held = tensor_of("e", np.array([0x40C0], np.uint16))
    other = helper.make_graph(
        [helper.make_node("Identity", ["e"], ["e_out"])], "else", [], [value("e_out", BFLOAT16, [1])], [held]
    )
    shift = helper.make_function(
        "local",
        "Shift",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["s"], value=five),
            helper.make_node("Cast", ["a"], ["n"], to=BFLOAT16),
            helper.make_node("Add", ["n", "s"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
    )
    shift.value_info.append(value("n", BFLOAT16, [None]))
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=BFLOAT16),
        helper.make_node("Constant", [], ["c"], value=three),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["fill"], value=four),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("If", ["which"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Shift", ["narrow"], ["shifted"], domain="local"),
        helper.make_node("Sum", ["shifted", "c", "fill", "chosen"], ["y"]),
        helper.make_node("LayerNormalization", ["y", "scale"], ["normed"], stash_type=BFLOAT16),
        helper.make_node("LayerNormalization", ["y", "scale"], ["normed_wide"], stash_type=FLOAT),
        helper.make_node("Cast", ["y"], ["counts"], to=INT64),
        helper.make_node("Concat", ["y", "y"], ["both"], axis=0),
        helper.make_node("SequenceConstruct", ["y"], ["many"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", FLOAT, [4]), value("which", TensorProto.BOOL, [])],
        [value("y", BFLOAT16, [4]), value("normed", BFLOAT16, [4]), value("counts", INT64, [4])],
        [tensor_of("scale", np.full(4, 0x4000, np.uint16), raw=False)],
        value_info=[
            value("narrow", BFLOAT16, [4]),
            value("zeros", FLOAT, [4]),
            helper.make_tensor_sequence_value_info("many", BFLOAT16, [4]),
        ],
    )
    model = model_from(graph, functions=[shift])
    twin = twin_of(model, home, twins)
    x = np.array([1, 2, -3, 4], np.float32)
    for which, added in ((True, 3.0), (False, 6.0)):
        seen = outputs_of(twins / "model.onnx", x=x, which=np.array(which))
        expected = x + 5 + 3 + 4 + np.float32(added)
        assert seen["y"].tolist() == expected.tolist()
        assert seen["counts"].tolist() == expected.astype(int).tolist()
        centred = expected - expected.mean()
        normed = 2 * centred / np.sqrt((centred**2).mean() + 1e-5)
        assert np.abs(seen["normed"] - normed).max() < 1e-5
    assert [node.op_type for node in twin.graph.node] == [node.op_type for node in model.graph.node]
    kept = {node.output[0]: [attribute.i for attribute in node.attribute] for node in twin.graph.node}
    assert kept["normed"] == kept["normed_wide"] == kept["narrow"] == [FLOAT]
    assert (kept["counts"], kept["both"], kept["zeros"]) == ([INT64], [0], [])
    types = {entry.name: entry.type for entry in twin.graph.value_info}
    assert types["many"].sequence_type.elem_type.tensor_type.elem_type == FLOAT
    assert twin.functions[0].value_info[0].type.tensor_type.elem_type == FLOAT
    assert twin.functions[0].node[1].attribute[0].i == FLOAT


def test_a_number_that_is_no_element_type_is_left_alone(home: Path, twins: Path) -> None:
    model = model_of(tensor_of("w", BITS.reshape(3, 4)))
    model.graph.node.append(helper.make_node("Gelu", ["w"], ["g"], domain="local", groups=16))
    model.functions.append(
        helper.make_function(
            "local",
            "Gelu",
            ["a"],
            ["b"],
            [helper.make_node("Identity", ["a"], ["b"])],
            [helper.make_opsetid("", 20)],
            attributes=["groups"],
        )
    )
    assert twin_of(model, home, twins).graph.node[1].attribute[0].i == 16


def test_a_graph_without_bfloat16_is_refused(home: Path, twins: Path) -> None:
    onnx.save(model_of(tensor_of("w", BITS)), home / "narrow.onnx")
    onnx.save(model_of(numpy_helper.from_array(np.ones(2, np.float32), "w")), home / "wide.onnx")
    with pytest.raises(ValueError, match=r"wide\.onnx: holds no bfloat16"):
        write_float32_twins([home / "narrow.onnx", home / "wide.onnx"], twins)
    assert listing(twins) == {}


def test_twins_never_replace_their_sources(home: Path, twins: Path) -> None:
    for folder in (home, twins):
        onnx.save(model_of(tensor_of("w", BITS)), folder / "model.onnx")
    before = listing(home)
    for sources, target in (
        ([home / "model.onnx"], home),
        ([home / "model.onnx"], twins / ".." / "home"),
        ([home / "model.onnx", twins / "model.onnx"], twins.parent),
    ):
        with pytest.raises(ValueError, match="one folder other than"):
            write_float32_twins(sources, target)
    assert listing(home) == before


def damaged_length(home: Path) -> None:
    tensor = external("w", BFLOAT16, (3, 4), "w.bin", offset=0, length=BITS.nbytes - 2)
    write_graph(model_of(tensor), home / "model.onnx")


def truncated(home: Path) -> None:
    (home / "w.bin").write_bytes(BITS.tobytes()[:-1])


def truncated_without_length(home: Path) -> None:
    write_graph(model_of(external("w", BFLOAT16, (3, 4), "w.bin")), home / "model.onnx")
    truncated(home)


def missing(home: Path) -> None:
    (home / "w.bin").unlink()


def outside(home: Path) -> None:
    tensor = external("w", BFLOAT16, (3, 4), "../w.bin", offset=0, length=BITS.nbytes)
    write_graph(model_of(tensor), home / "model.onnx")


def outside_from_a_function(home: Path) -> None:
    model = model_of(tensor_of("w", BITS))
    held = external("c", BFLOAT16, (12,), "../w.bin", offset=0, length=BITS.nbytes)
    constant = helper.make_node("Constant", [], ["b"], value=held)
    model.functions.append(
        helper.make_function("local", "Held", [], ["b"], [constant], [helper.make_opsetid("", 20)])
    )
    write_graph(model, home / "model.onnx")


def no_graph(home: Path) -> None:
    (home / "model.onnx").write_bytes(b"\x0a\xff not onnx")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_length, ("model.onnx", "'w' has 22 bytes", "expected 24", r"\(3, 4\)", "damaged")),
        (truncated, ("w.bin has 23 bytes", "at least 24")),
        (truncated_without_length, ("w.bin has 23 bytes", "at least 24")),
        (missing, ("w.bin is missing",)),
        (outside, ("leaves the graph's folder",)),
        (outside_from_a_function, ("'c'", "'../w.bin'", "leaves the graph's folder")),
        (no_graph, ("not a readable ONNX model",)),
    ],
)
def test_a_damaged_source_is_refused_and_nothing_written(
    home: Path, twins: Path, damage: Any, words: tuple[str, ...]
) -> None:
    (home / "w.bin").write_bytes(BITS.tobytes())
    tensor = external("w", BFLOAT16, (3, 4), "w.bin", offset=0, length=BITS.nbytes)
    write_graph(model_of(tensor), home / "model.onnx")
    write_float32_twins([home / "model.onnx"], twins)
    shutil.rmtree(twins)
    twins.mkdir()
    damage(home)
    with pytest.raises(InputError, match=".*".join(words)):
        write_float32_twins([home / "model.onnx"], twins)
    assert listing(twins) == {}


def test_data_that_shrinks_meanwhile_is_seen(
    home: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "w.bin").write_bytes(BITS.tobytes())
    write_graph(model_of(external("w", BFLOAT16, (12,), "w.bin", length=24)), home / "model.onnx")

    def plenty(_folder: Path) -> Usage:
        (home / "w.bin").write_bytes(BITS.tobytes()[:10])
        return Usage(1 << 40, 0, 1 << 40)

    monkeypatch.setattr(float32_twin.shutil, "disk_usage", plenty)
    with pytest.raises(InputError, match=r"w\.bin: ended 14 bytes early"):
        write_float32_twins([home / "model.onnx"], twins)
    assert not (twins / "model.onnx").exists()


def test_too_little_space_is_seen_before_anything_is_written(
    home: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (home / "w.bin").open("wb") as data:
        data.truncate(4_000_000)
    write_graph(model_of(external("w", BFLOAT16, (2_000_000,), "w.bin")), home / "model.onnx")
    monkeypatch.setattr(float32_twin.shutil, "disk_usage", lambda _: Usage(9_000_000, 1_000_001, 7_999_999))
    with pytest.raises(InputError, match=r"twins: .* needs about 8 MB .* 8 MB are free .*TMPDIR"):
        write_float32_twins([home / "model.onnx"], twins)
    assert listing(twins) == {}
    monkeypatch.setattr(float32_twin.shutil, "disk_usage", lambda _: Usage(9_000_000, 0, 8_010_000))
    write_float32_twins([home / "model.onnx"], twins)
    assert (twins / "w.bin").stat().st_size == 8_000_000


def test_data_is_streamed_piece_by_piece(home: Path, twins: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, 20_000_001 // 2, np.uint16)
    bits.tofile(home / "w.bin")
    write_graph(model_of(external("w", BFLOAT16, bits.shape, "w.bin")), home / "model.onnx")
    tracemalloc.start()
    try:
        write_float32_twins([home / "model.onnx"], twins)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    assert np.array_equal(np.fromfile(twins / "w.bin", np.float32), widened(bits))


@pytest.fixture(scope="module")
def narrow_decoder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """The tiny checkpoint's decoder in bfloat16, and the model it came from computing in float32."""
    model = load_lalm(checkpoint, dtype="bfloat16").model
    path = tmp_path_factory.mktemp("narrow") / "decoder.onnx"
    export_decoder(model, path)
    wide: Any = copy.deepcopy(model)
    return TinyDecoder(path, wide.float())


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_twin_of_a_steered_decoder_computes_what_the_model_with_its_weights_does(
    narrow_decoder: TinyDecoder, tmp_path: Path, padding: str
) -> None:
    shape = {"width": tiny_lalm.WIDTH, "layers": tiny_lalm.LAYERS}
    edits = [
        one_edit("add", Site.BLOCK_OUTPUT, Positions.LAST, layer=0, **shape),
        one_edit("project", Site.BLOCK_OUTPUT, Positions.LAST, layer=1, **shape),
        one_edit("add", Site.BLOCK_INPUT, Positions.ALL, layer=2, **shape),
        one_edit("project", Site.FINAL_NORM_OUTPUT, Positions.ALL, layer=0, **shape),
    ]
    edits = [
        dataclasses.replace(edit, vector=edit.vector.astype(ml_dtypes.bfloat16), strength=1.0)
        if edit.op == "add"
        else edit
        for edit in edits
    ]
    plan = plan_of(*edits)
    steered_path = narrow_decoder.path.with_name(f"steered_{padding}.onnx")
    write_graph(patch_model(read_graph(narrow_decoder.path), plan).model, steered_path)
    write_float32_twins([narrow_decoder.path, steered_path], tmp_path)
    mask = padded(padding)
    embeds = torch.randn(*mask.shape, tiny_lalm.WIDTH, generator=torch.Generator().manual_seed(5))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = (embeds, mask, positions, no_past(len(mask)))
    attended = mask.numpy() != 0
    logits = {}
    with steered(narrow_decoder.model, plan):
        wanted = run_eager(narrow_decoder.model, *arguments)
    for name, oracle in (
        (narrow_decoder.path.name, run_eager(narrow_decoder.model, *arguments)),
        (steered_path.name, wanted),
    ):
        outputs = run_graph(session(tmp_path / name), *arguments)
        logits[name] = outputs["logits"]
        for seen, expected in zip(outputs.values(), oracle, strict=True):
            by_position = seen if seen.ndim == 3 else seen.swapaxes(1, 2)
            wanted_array = expected.numpy() if expected.ndim == 3 else expected.numpy().swapaxes(1, 2)
            scale = np.abs(wanted_array[attended]).max()
            assert scale > 0.1
            assert np.abs(by_position[attended] - wanted_array[attended]).max() < 1e-5 * max(1.0, scale)
    plain, edited = logits.values()
    assert np.abs(plain - edited)[attended].max() > 0.1
