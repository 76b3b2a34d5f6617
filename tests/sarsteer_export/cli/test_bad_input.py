"""Bad input: one message that says what is wrong, the right exit code, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from safetensors.numpy import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from calibration.plan import METADATA_KEY, SteeringPlan
from sarsteer_export.bundle.manifest import MANIFEST, PLAN, STEERED_DECODER
from tests import tiny_lalm
from tests.sarsteer_export.command_line import answered, listing, one_error, refused, run_python, sarsteer
from tests.sarsteer_export.conftest import Inputs

RATE = tiny_lalm.SAMPLING_RATE


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for outputs, apart from the bad inputs."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def model_copy(inputs: Inputs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs.model, tmp_path / "model"))


# --- the model -----------------------------------------------------------------------------------------------


def no_such_model(model: Path) -> None:
    shutil.rmtree(model)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": [', encoding="utf-8")


def unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(
        json.dumps(config | {"architectures": ["Oracle9000"]}), encoding="utf-8"
    )


def truncated_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.1.mlp.up_proj" in name)]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def text_only(model: Path) -> None:
    shutil.rmtree(model)
    config = Qwen2Config(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(model)


MODELS: list[tuple[Callable[[Path], None], str]] = [
    (no_such_model, "no such directory"),
    (no_config, "config.json cannot be read"),
    (broken_config, "config.json is not JSON"),
    (unknown_architecture, "Oracle9000"),
    (truncated_weights, "cannot be "),
    (no_weights, ".safetensors"),
    (missing_tensor, "weights missing"),
    (text_only, "no audio encoder"),
]


@pytest.mark.parametrize(("damage", "words"), MODELS)
@pytest.mark.parametrize("command", ["calibrate", "export", "build"])
def test_a_model_that_cannot_be_used(
    command: str, damage: Callable[[Path], None], words: str, model_copy: Path, inputs: Inputs, place: Path
) -> None:
    damage(model_copy)
    data = () if command == "export" else inputs.data
    message = refused(sarsteer(command, model_copy, *data, "-o", place / "output"), str(model_copy))
    assert words in message
    assert listing(place) == {}


def test_an_unknown_device_is_not_usable_here(inputs: Inputs, place: Path) -> None:
    for command, data in (("calibrate", inputs.data), ("export", ())):
        for device in ("cuda:99", "abacus"):
            given = (command, inputs.model, *data, "-o", place / "output", "--device", device)
            refused(sarsteer(*given), f"device '{device}' cannot be used here", code=3)
    assert listing(place) == {}


# --- the requests --------------------------------------------------------------------------------------------


def clip(name: str) -> dict[str, str]:
    return {"audio": name, "text": "please respond to the audio."}


def requests_file(folder: Path, *lines: Any) -> Path:
    """A JSON Lines file beside one good clip, `good.flac`."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 2)
    soundfile.write(folder / "good.flac", noise, RATE)
    path = folder / "requests.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["harmful", "benign"])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([clip("good.flac"), "", '{"audio": "good.flac", "text": '], ["line 3", "not JSON"]),
        ([clip("good.flac"), {"audio": "good.flac"}], ["line 2", "text is None"]),
        ([{"text": "hello"}], ["line 1", "audio is None"]),
        ([clip("good.flac"), ["good.flac", "hello"]], ["line 2", "expected an object"]),
        ([clip("good.flac"), {"audio": "good.flac", "text": ""}], ["line 2", "non-empty"]),
        ([], ["holds no requests"]),
    ],
)
def test_requests_that_cannot_be_read(
    kind: str, lines: list[Any], words: list[str], inputs: Inputs, tmp_path: Path, place: Path
) -> None:
    bad = requests_file(tmp_path, *lines)
    files = {"harmful": inputs.harmful, "benign": inputs.benign} | {kind: bad}
    data = [item for name, path in files.items() for item in (f"--{name}", path)]
    refused(sarsteer("calibrate", inputs.model, *data, "-o", place / "plan"), str(bad), *words)
    refused(sarsteer("build", inputs.model, *data, "-o", place / "bundle"), str(bad), *words)
    assert listing(place) == {}


def test_a_requests_file_that_is_missing_or_a_folder(inputs: Inputs, tmp_path: Path, place: Path) -> None:
    for bad, words in (
        (tmp_path / "absent.jsonl", "no such file"),
        (tmp_path, "holds no data that can be read"),
    ):
        given = (
            "calibrate",
            inputs.model,
            "--harmful",
            inputs.harmful,
            "--benign",
            bad,
            "-o",
            place / "plan",
        )
        refused(sarsteer(*given), str(bad), words)
    assert listing(place) == {}


def no_samples(path: Path) -> None:
    soundfile.write(path.with_suffix(".wav"), np.zeros(0), RATE)
    path.with_suffix(".wav").replace(path)


def silence(path: Path) -> None:
    soundfile.write(path, np.zeros(RATE), RATE)


def too_long(path: Path) -> None:
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(3 * RATE), RATE)


AUDIO: list[tuple[str, Callable[[Path], object], list[str]]] = [
    ("missing", lambda path: None, ["o such file"]),
    ("no bytes", lambda path: path.touch(), ["not a readable audio file"]),
    (
        "text",
        lambda path: path.write_text("this is a text file", encoding="utf-8"),
        ["not a readable audio file"],
    ),
    ("no samples", no_samples, ["holds no samples"]),
    ("silence", silence, ["is silent"]),
    ("too long", too_long, ["lasts 3.00 s", "at most 2 s"]),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in AUDIO], ids=[case[0] for case in AUDIO])
def test_audio_that_cannot_be_used(
    make: Callable[[Path], object],
    words: list[str],
    inputs: Inputs,
    bundle_path: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    bad = tmp_path / "bad.flac"
    requests = requests_file(tmp_path, clip("good.flac"), clip("bad.flac"), clip("good.flac"))
    make(bad)
    data = ("--harmful", requests, "--benign", inputs.benign)
    refused(sarsteer("calibrate", inputs.model, *data, "-o", place / "plan"), str(bad), *words)
    refused(sarsteer("build", inputs.model, *data, "-o", place / "bundle"), str(bad), *words)
    refused(sarsteer("run", bundle_path, "--audio", bad, "--text", "hello"), str(bad), *words)
    assert listing(place) == {}


def test_one_benign_request_spans_no_safe_subspace(inputs: Inputs, tmp_path: Path, place: Path) -> None:
    one = requests_file(tmp_path, clip("good.flac"))
    given = ("calibrate", inputs.model, "--harmful", inputs.harmful, "--benign", one, "-o", place / "plan")
    refused(sarsteer(*given), "expected at least 2")
    assert listing(place) == {}


def test_two_benign_requests_and_a_rank_above_what_they_span_work_and_say_so(
    inputs: Inputs, tmp_path: Path, place: Path
) -> None:
    soundfile.write(tmp_path / "other.flac", 0.1 * np.random.default_rng(1).standard_normal(RATE), RATE)
    two = requests_file(tmp_path, clip("good.flac"), clip("other.flac"))
    data = ("--harmful", inputs.harmful, "--benign", two)
    result = sarsteer("calibrate", inputs.model, *data, "-o", place / "plan", "--rank", "45")
    answered(result)
    assert "rank 45 is more than 2 benign clips can span; using rank 1" in result.stderr
    provenance = SteeringPlan.load(place / "plan").provenance
    assert (provenance["rank"], provenance["rank_requested"]) == (1, 45)


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "nan"], "alpha is nan"),
        (["--alpha", "inf"], "alpha is inf"),
        (["--alpha", "strong"], "strong"),
        (["--lambda", "nan"], "lambda is nan"),
        (["--rank", "-1"], "rank is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--refusal-prompt", ""], "refusal prompt is empty"),
        (["--layers", "3"], "block 3 does not exist"),
        (["--layers", "-4"], "block -4 does not exist"),
        (["--layers", "first"], "'first'"),
        (["--layers", "0,,1"], "''"),
        (["--layers", "0-"], "'0-'"),
        (["--layers", "0,0"], "twice"),
        (["--layers", "1,2-0"], "'2-0'"),
        (["--layers", ""], "''"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_options_of_calibrate_that_make_no_sense(
    options: list[str], words: str, inputs: Inputs, place: Path
) -> None:
    refused(sarsteer("calibrate", inputs.model, *inputs.data, "-o", place / "plan", *options), words)
    assert listing(place) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--answer-pattern", "("], "answer pattern '('"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompts", "0"], "prompts is 0"),
        (["--decode-steps", "0"], "decode_steps is 0"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--plan", "absent.safetensors"], "absent.safetensors: no such file"),
    ],
)
def test_options_of_build_that_make_no_sense(
    options: list[str], words: str, inputs: Inputs, place: Path
) -> None:
    refused(sarsteer("build", inputs.model, *inputs.data, "-o", place / "bundle", *options), words)
    assert listing(place) == {}


# --- the plan ------------------------------------------------------------------------------------------------


def edit_plan(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """Rewrite a plan file's header and tensors, past every check."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as opened:
        header = json.loads(opened.metadata()[METADATA_KEY])
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(header, tensors)
    save_file(tensors, path, {METADATA_KEY: json.dumps(header)})
    return path


def nan_vector(_header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["edits.1.vector"][3] = np.nan


def narrow(_header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["edits.1.vector"] = tensors["edits.1.vector"][:-1]


def other_width(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    header["hidden_size"] = 32
    for name in tensors:
        tensors[name] = tensors[name][:32]


def far_layer(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
    header["edits"][1]["layer"] = 3


def unknown_op(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
    header["edits"][1]["op"] = "exorcise"


def more_layers(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
    header["num_layers"] = 4


PLANS: list[tuple[Callable[..., None], list[str]]] = [
    (nan_vector, ["edits.1.vector", "NaN"]),
    (narrow, ["edits.1.vector", "(63,)", "(64,)"]),
    (other_width, ["width 32", "width is 64"]),
    (far_layer, ["edits.1.layer is 3", "0 to 2"]),
    (unknown_op, ["edits.1.op is 'exorcise'", "add, project"]),
    (more_layers, ["4 decoder blocks", "3 blocks"]),
]


@pytest.mark.parametrize(("change", "words"), PLANS)
def test_a_plan_that_cannot_be_used(
    change: Callable[..., None],
    words: list[str],
    bundle_path: Path,
    inputs: Inputs,
    decoder_folder: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    plan = edit_plan(Path(shutil.copy(bundle_path / PLAN, tmp_path / "plan.safetensors")), change)
    given = ("--plan", plan)
    refused(sarsteer("patch", decoder_folder / "decoder.onnx", *given, "-o", place / "x.onnx"), *words)
    build = ("build", inputs.model, *inputs.data, *given, "-o", place / "bundle")
    refused(sarsteer(*build), *(words[:1] if change is more_layers else words))
    if change not in (other_width, more_layers):
        refused(sarsteer("inspect", plan), *words)
    assert listing(place) == {}


def test_a_plan_that_is_no_plan(decoder_folder: Path, inputs: Inputs, tmp_path: Path, place: Path) -> None:
    weights = inputs.model / "model.safetensors"
    text = tmp_path / "plan.safetensors"
    text.write_text("alpha: 0.1", encoding="utf-8")
    for bad, words in ((weights, "not a steering plan"), (text, "not a readable safetensors file")):
        given = ("patch", decoder_folder / "decoder.onnx", "--plan", bad, "-o", place / "x.onnx")
        refused(sarsteer(*given), str(bad), words)
        refused(sarsteer("inspect", bad), str(bad), words)
    assert listing(place) == {}


def test_a_plan_for_another_model_of_the_same_shape_needs_force(
    bundle_path: Path, decoder_folder: Path, tmp_path: Path, place: Path
) -> None:
    def another(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
        header["provenance"]["model_fingerprint"] = "f" * 64

    plan = edit_plan(Path(shutil.copy(bundle_path / PLAN, tmp_path / "plan.safetensors")), another)
    given = ("patch", decoder_folder / "decoder.onnx", "--plan", plan, "-o", place / "x.onnx")
    refused(sarsteer(*given), "made for another model", "ffffffffffff", "--force")
    assert listing(place) == {}
    answered(sarsteer(*given, "--force"))
    assert (place / "x.onnx").is_file()


# --- the graph -----------------------------------------------------------------------------------------------


def truncated(decoder: Path) -> None:
    decoder.write_bytes(decoder.read_bytes()[:5000])


def random_bytes(decoder: Path) -> None:
    decoder.write_bytes(np.random.default_rng(0).bytes(5000))


def nothing_in_it(decoder: Path) -> None:
    decoder.write_bytes(b"")


def no_data(decoder: Path) -> None:
    decoder.with_name(f"{STEERED_DECODER.name}_data").unlink()


def short_data(decoder: Path) -> None:
    data = decoder.with_name(f"{STEERED_DECODER.name}_data")
    data.write_bytes(data.read_bytes()[:-1])


def missing(decoder: Path) -> None:
    decoder.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "not a readable ONNX model"),
        (random_bytes, "not a readable ONNX model"),
        (nothing_in_it, "holds no graph"),
        (no_data, "external data decoder_model_merged.onnx_data is missing"),
        (short_data, "expected at least"),
        (missing, "no such file"),
    ],
)
def test_a_decoder_that_cannot_be_read(
    damage: Callable[[Path], None], words: str, decoder_copy: Path, bundle_path: Path, place: Path
) -> None:
    damage(decoder_copy)
    given = ("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", place / "x.onnx")
    refused(sarsteer(*given), str(decoder_copy), words)
    refused(sarsteer("inspect", decoder_copy), str(decoder_copy))
    assert listing(place) == {}


def test_a_graph_without_a_residual_stream_is_a_failure_of_its_own(bundle_path: Path, place: Path) -> None:
    given = (
        "patch",
        bundle_path / "onnx/embed_tokens.onnx",
        "--plan",
        bundle_path / PLAN,
        "-o",
        place / "x.onnx",
    )
    refused(sarsteer(*given), "nearest candidates: none", "patch --sites FILE", code=4)
    assert listing(place) == {}


def test_a_decoder_whose_stream_is_broken_names_candidates_or_a_reason(
    decoder_copy: Path, bundle_path: Path, place: Path
) -> None:
    graph = onnx.load(decoder_copy, load_external_data=False)
    for node in graph.graph.node:  # no residual adds: there is no stream any more
        if node.op_type == "Add":
            node.op_type = "Mul"
    onnx.save(graph, decoder_copy)
    given = ("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", place / "x.onnx")
    refused(sarsteer(*given), code=4)
    assert listing(place) == {}


# --- the output ----------------------------------------------------------------------------------------------


@pytest.fixture
def writers(inputs: Inputs, bundle_path: Path, decoder_folder: Path) -> dict[str, tuple[str | Path, ...]]:
    """Every command that writes, ready but for its output."""
    verify = ("verify", bundle_path, "--model", inputs.model, "--requests", inputs.harmful, "--report")
    return {
        "calibrate": ("calibrate", inputs.model, *inputs.data, "-o"),
        "export": ("export", inputs.model, "-o"),
        "patch": ("patch", decoder_folder / "decoder.onnx", "--plan", bundle_path / PLAN, "-o"),
        "build": ("build", inputs.model, *inputs.data, "-o"),
        "verify": verify,
    }


WRITERS = pytest.mark.parametrize("name", ["calibrate", "export", "patch", "build", "verify"])


@WRITERS
def test_an_output_that_exists_is_kept(
    name: str, writers: dict[str, tuple[str | Path, ...]], place: Path
) -> None:
    output = place / "output.json"
    if name in ("export", "build"):
        output.mkdir()
        (output / "precious").write_text("x", encoding="utf-8")
    else:
        output.write_text("precious", encoding="utf-8")
    before = listing(place)
    refused(sarsteer(*writers[name], output), str(output), "exists", "--overwrite")
    assert listing(place) == before


@WRITERS
def test_an_output_below_a_file_is_refused(
    name: str, writers: dict[str, tuple[str | Path, ...]], place: Path
) -> None:
    (place / "file").write_text("x", encoding="utf-8")
    before = listing(place)
    refused(sarsteer(*writers[name], place / "file" / "output.json"), "file is not a directory")
    assert listing(place) == before


@WRITERS
def test_an_output_in_a_place_that_may_not_be_written(
    name: str, writers: dict[str, tuple[str | Path, ...]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp

    def refuse(suffix: str | None = None, prefix: str | None = None, dir: object = None) -> str:  # noqa: A002 - mkdtemp's
        if dir is None or Path(str(dir)) != place:  # scratch of the library's own
            return make(suffix, prefix, dir)  # type: ignore[arg-type]
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}x")

    monkeypatch.setattr("sarsteer_export.staging.tempfile.mkdtemp", refuse)
    output = place / "output.json"
    options = ("--no-blocks", "--prompts", "1", "--decode-steps", "1") if name == "verify" else ()
    result = sarsteer(*writers[name], output, *options)
    assert result.exit_code == 2
    one_error(result.stderr, str(output), "cannot be written (Permission denied)")
    assert listing(place) == {}


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("calibrate", "calibration.plan.SteeringPlan.save"),
        ("export", "onnx_ir.save"),
        ("patch", "sarsteer_export.decoder_file.write_graph"),
        ("build", "sarsteer_export.pipeline.write_graph"),
    ],
)
def test_a_disk_that_fills_up(
    name: str,
    writer: str,
    writers: dict[str, tuple[str | Path, ...]],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle_path: Path,
    inputs: Inputs,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, full)
    arguments: tuple[str | Path, ...] = (*writers[name], place / "output")
    before: dict[str, str] = {}
    if name == "build":  # over a finished bundle, so that nothing needs to be exported again
        shutil.copytree(bundle_path, place / "output")
        arguments = (*inputs.quick_build, "-o", place / "output", "--alpha", "1.0", "--overwrite")
        before = listing(place)
    refused(sarsteer(*arguments), str(place / "output"), "no space left on the device", "nothing was written")
    assert listing(place) == before


LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from sarsteer_export.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("name", "limit"), [("calibrate", 1000), ("patch", 100_000), ("build", 1000)])
def test_a_file_that_really_cannot_grow(
    name: str, limit: int, writers: dict[str, tuple[str | Path, ...]], place: Path
) -> None:
    done = run_python(LIMITED, str(limit), *writers[name], place / "new" / "output")
    assert (done.returncode, done.stdout) == (2, "")
    one_error(done.stderr, str(place / "new" / "output"), "largest size allowed", "nothing was written")
    assert listing(place) == {}


# --- the bundle ----------------------------------------------------------------------------------------------


def edit_manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


BUNDLES: list[tuple[Callable[[Path], object], list[str]]] = [
    (lambda bundle: (bundle / MANIFEST).unlink(), ["not a bundle", "manifest.json"]),
    (lambda bundle: (bundle / MANIFEST).write_text("{"), ["not JSON"]),
    (lambda bundle: (bundle / MANIFEST).write_text("[]"), ["not the manifest of a bundle"]),
    (lambda bundle: edit_manifest(bundle, format="zip"), ["sarsteer-bundle"]),
    (lambda bundle: edit_manifest(bundle, version=2), ["version 2", "reads version 1"]),
    (lambda bundle: edit_manifest(bundle, tokens=None), ["lacks tokens"]),
    (lambda bundle: edit_manifest(bundle, tokens={"audio": "three", "end": [2]}), ["tokens is malformed"]),
    (lambda bundle: edit_manifest(bundle, files=["a", "b"]), ["files is malformed"]),
    (lambda bundle: edit_manifest(bundle, files={"a": {"bytes": 1}}), ["files is malformed"]),
    (lambda bundle: edit_manifest(bundle, model={}), ["model is malformed"]),
    (lambda bundle: (bundle / PLAN).unlink(), ["incomplete", PLAN.as_posix()]),
    (lambda bundle: (bundle / "tokenizer.json").write_text("{}"), ["tokenizer.json", "bytes"]),
    (lambda bundle: shutil.rmtree(bundle), ["not a bundle"]),
]


@pytest.mark.parametrize(("damage", "words"), BUNDLES)
def test_a_bundle_that_is_damaged(
    damage: Callable[[Path], object], words: list[str], bundle_copy: Path, inputs: Inputs
) -> None:
    damage(bundle_copy)
    refused(sarsteer("run", bundle_copy, "--text", "hello"), *words)
    verify = ("verify", bundle_copy, "--model", inputs.model, "--requests", inputs.harmful)
    refused(sarsteer(*verify), *words)
    if bundle_copy.exists():
        refused(sarsteer("inspect", bundle_copy), *words)


def test_a_tokenizer_or_graph_that_was_replaced_by_something_else_of_its_size(bundle_copy: Path) -> None:
    for name, code in (("tokenizer.json", 2), (STEERED_DECODER.as_posix(), 5)):
        content = (bundle_copy / name).read_bytes()
        (bundle_copy / name).write_bytes(b"x" * len(content))
        refused(sarsteer("run", bundle_copy, "--text", "hello"), code=code)
        (bundle_copy / name).write_bytes(content)
    answered(sarsteer("run", bundle_copy, "--text", "hello", "--max-new-tokens", "1"))


@pytest.mark.parametrize("name", ["calibrate", "build", "verify"])
def test_a_clip_too_short_to_be_heard_is_named(
    name: str, inputs: Inputs, bundle_path: Path, place: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 50)
    soundfile.write(tmp_path / "blip.flac", noise, 16_000)
    requests = tmp_path / "short.jsonl"
    requests.write_text('{"audio": "blip.flac", "text": "hear"}\n', encoding="utf-8")
    data = ("--harmful", requests, "--benign", inputs.benign)
    arguments: dict[str, tuple[str | Path, ...]] = {
        "calibrate": ("calibrate", inputs.model, *data, "-o", place / "plan.safetensors"),
        "build": ("build", inputs.model, *data, "-o", place / "bundle"),
        "verify": ("verify", bundle_path, "--model", inputs.model, "--requests", requests),
    }
    refused(sarsteer(*arguments[name]), "blip.flac", "too short, 50 samples at 16000 Hz", "at least 2")
    assert listing(place) == {}


def test_run_names_a_clip_too_short_to_be_heard(bundle_path: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "blip.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 50), 16_000)
    result = sarsteer("run", bundle_path, "--audio", tmp_path / "blip.flac", "--text", "hear")
    refused(result, "blip.flac", "too short, 50 samples at 16000 Hz", "give a longer clip")


def test_an_export_never_replaces_a_bundle(inputs: Inputs, bundle_copy: Path) -> None:
    before = listing(bundle_copy)
    refused(
        sarsteer("export", inputs.model, "-o", bundle_copy, "--overwrite"), "is a bundle", "another output"
    )
    assert listing(bundle_copy) == before


def test_a_dry_run_refuses_a_plan_that_cannot_fit(
    inputs: Inputs, deeper_checkpoint: Path, plan: SteeringPlan, place: Path, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.safetensors")
    given = ("build", deeper_checkpoint, *inputs.data, "--plan", tmp_path / "plan.safetensors")
    refused(sarsteer(*given, "-o", place / "bundle", "--dry-run"), "3 decoder blocks", "this decoder has")
    assert listing(place) == {}
