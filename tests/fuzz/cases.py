"""A case of the fuzz test: which graph and plan, what is done to them, which options; and what must hold of all verbs.

A case is numbers and names only, so that one that failed can be kept as JSON in `seeds/` and read by people.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx
from click.testing import Result
from hypothesis import strategies as st
from onnx import ModelProto

from sarsteer_export.cli import COMMANDS
from tests.fuzz import graphs, mutations, plans
from tests.fuzz.mutations import BYTE_KINDS, damaged_bytes
from tests.sarsteer_export.command_line import one_error, sarsteer

EXIT_CODES = frozenset({0, 2, 3, 4, 5, 6})
SEEDS = Path(__file__).parent / "seeds"
PICKS = st.integers(0, 9999)
State: TypeAlias = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Mutation:
    """A mutation by its name, and the two numbers that say what exactly it does."""

    kind: str
    pick: int
    other: int


@dataclass(frozen=True)
class Case:
    """A graph, mutated, and a plan, mutated, given to every verb.

    `steering`: how the graph is steered before the damage. `plan`: two numbers that pick its edits, or 0 and 0 for the
    plan that a steered graph is steered by. `raw`, `plan_raw`:
    damage to the bytes. `patching`, `inspecting`: options of these two commands. `output`: where patch writes to.
    """

    graph: str
    steering: str = "none"
    graph_mutations: tuple[Mutation, ...] = ()
    raw: Mutation | None = None
    plan: tuple[int, int] = (0, 1)
    plan_mutations: tuple[Mutation, ...] = ()
    plan_raw: Mutation | None = None
    patching: tuple[str, ...] = ()
    inspecting: tuple[str, ...] = ()
    output: str = "steered.onnx"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        for name in ("graph_mutations", "plan_mutations"):
            values[name] = tuple(Mutation(**entry) for entry in values[name])
        for name in ("raw", "plan_raw"):
            values[name] = None if values[name] is None else Mutation(**values[name])
        for name in ("plan", "patching", "inspecting"):
            values[name] = tuple(values[name])
        return cls(**values)


def _mutations(table: Any, least: int, most: int) -> st.SearchStrategy[tuple[Mutation, ...]]:
    one = st.builds(Mutation, st.sampled_from(list(table)), PICKS, PICKS)
    return st.lists(one, min_size=least, max_size=most).map(tuple)


def _options(*groups: tuple[tuple[str, ...], ...]) -> st.SearchStrategy[tuple[str, ...]]:
    """One of each group, of which the first is most often none."""
    chosen = st.tuples(*(st.sampled_from(group) for group in groups))
    return chosen.map(lambda parts: tuple(word for part in parts for word in part))


RAW = st.builds(Mutation, st.sampled_from(BYTE_KINDS), st.integers(0, 2**20), PICKS)
SELDOM = st.one_of(st.none(), st.none(), st.none(), RAW)
PATCHING = _options(
    ((), (), ("--last-from", "sequence"), ("--last-from", "input")),
    ((), ("--prompt-from", "input")),
    ((), ("--strength-input", "batch"), ("--strength-input", "edits")),
    ((), ("--replace",)),
    ((), ("--force",)),
    ((), (), (), ("--combine", "sequence"), ("--plan", "second.safetensors", "--combine", "sequence")),
    ((), (), (), ("--copy",), ("--explain",), ("--json",), ("--sites", "given.json")),
)
INSPECTING = _options(
    ((), ("--json",)),
    ((), ("--sites", "found.json")),
    ((), ("--svg", "block.svg"), ("--svg", "block.svg", "--block", "1")),
)
STEERED_OR_NOT = st.sampled_from(["none", "none", "baked", "input"])
OUTPUTS = st.sampled_from(["steered.onnx", "steered.onnx", "elsewhere/steered.onnx"])
PLANS = st.one_of(st.just((0, 0)), st.tuples(PICKS, st.integers(1, 3)))
REPLACING = PATCHING.map(lambda options: tuple(dict.fromkeys((*options, "--replace"))))
DAMAGED_GRAPHS = st.builds(
    Case,
    graph=st.sampled_from(graphs.NAMES),
    graph_mutations=_mutations(mutations.MUTATIONS, 1, 3),
    plan=PLANS,
    patching=PATCHING,
    inspecting=INSPECTING,
    output=OUTPUTS,
)
DAMAGED_STEERED_GRAPHS = st.builds(
    Case,
    graph=st.sampled_from(graphs.NAMES),
    steering=st.sampled_from(["baked", "input"]),
    graph_mutations=_mutations(mutations.MUTATIONS, 1, 2),
    plan=st.one_of(st.just((0, 0)), PLANS),
    patching=st.one_of(REPLACING, REPLACING, PATCHING),
    inspecting=INSPECTING,
)
DAMAGED_BYTES = st.builds(
    Case,
    graph=st.sampled_from(graphs.NAMES),
    steering=STEERED_OR_NOT,
    graph_mutations=_mutations(mutations.MUTATIONS, 0, 1),
    raw=RAW,
    plan=PLANS,
    plan_raw=SELDOM,
    patching=PATCHING,
    inspecting=INSPECTING,
)
DAMAGED_PLANS = st.builds(
    Case,
    graph=st.sampled_from(["hand", "external", "hand_parallel", "transformers_bf16"]),
    steering=STEERED_OR_NOT,
    graph_mutations=_mutations(mutations.MUTATIONS, 0, 1),
    plan=PLANS,
    plan_mutations=_mutations(plans.MUTATIONS, 1, 3),
    plan_raw=SELDOM,
    patching=PATCHING,
)
CASES = st.one_of(DAMAGED_GRAPHS, DAMAGED_STEERED_GRAPHS, DAMAGED_GRAPHS, DAMAGED_BYTES, DAMAGED_PLANS)


def damaged_graph(case: Case) -> bytes:
    """The bytes of the case's decoder file."""
    model = ModelProto()
    model.CopyFrom(graphs.base(case.graph, case.steering).proto)
    for mutation in case.graph_mutations:
        mutations.MUTATIONS[mutation.kind](model, mutation.pick, mutation.other)
    raw = model.SerializeToString()
    return raw if case.raw is None else damaged_bytes(raw, case.raw.kind, case.raw.pick, case.raw.other)


def damaged_plan(case: Case) -> bytes:
    """The bytes of the case's plan file."""
    base = graphs.base(case.graph)
    header, tensors = plans.whole_plan(base.width, base.layers, *case.plan)
    if case.plan == (0, 0):
        header, tensors = plans.as_file(graphs.fitting_plan(base))
    for mutation in case.plan_mutations:
        if tensors:
            plans.MUTATIONS[mutation.kind](header, tensors, mutation.pick, mutation.other)
    raw = plans.plan_file(header, tensors)
    if case.plan_raw is None:
        return raw
    return damaged_bytes(raw, case.plan_raw.kind, case.plan_raw.pick, case.plan_raw.other)


def check(case: Case) -> None:
    """Give the case's files to every verb, in a folder of its own; raises `AssertionError` for what must not be."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        _lay_out(case, work)
        decoder, output = work / "decoder.onnx", work / case.output
        _run(work, "inspect", decoder, *_placed(work, case.inspecting), made=("found.json", "block.svg"))
        patching = ["patch", decoder, "--plan", work / "plan.safetensors", "-o", output]
        steered = _run(work, *patching, *_placed(work, case.patching), made=_written(decoder, case.output))
        _run(work, "unpatch", decoder, "-o", work / "out.onnx", made=("out.onnx",))
        _run(
            work,
            "refit",
            decoder,
            "--plan",
            work / "plan.safetensors",
            "-o",
            work / "out.onnx",
            made=("out.onnx",),
        )
        if "audit" in COMMANDS:
            _run(work, "audit", decoder, "--plan", work / "plan.safetensors")
        if steered:
            _check_steered(case, work, output)


def _lay_out(case: Case, work: Path) -> None:
    """A folder with the case's files, and what hostile references may point at."""
    base = graphs.base(case.graph)
    (work / "folder").mkdir(parents=True)
    (work.parent / "outside").mkdir()
    (work.parent / "outside" / "secret.bin").write_bytes(bytes(2**20))
    (work / "link.bin").symlink_to(work.parent / "outside" / "secret.bin")
    (work / "loop.bin").symlink_to("loop.bin")
    (work / graphs.DATA).write_bytes(base.data or bytes(64))
    (work / "decoder.onnx").write_bytes(damaged_graph(case))
    (work / "plan.safetensors").write_bytes(damaged_plan(case))
    (work / "second.safetensors").write_bytes(
        plans.plan_file(*plans.whole_plan(base.width, base.layers, 5, 1))
    )
    (work / "given.json").write_text(base.sites, encoding="utf-8")


def _placed(work: Path, options: tuple[str, ...]) -> list[str]:
    """Options with the files they name in `work`."""
    return [
        str(work / word) if word.endswith((".json", ".svg", ".safetensors")) else word for word in options
    ]


def _written(decoder: Path, output: str) -> tuple[str, ...]:
    """What a patch may write: its output, and a copy of the decoder's data."""
    if output == "steered.onnx":
        return output, f"{output}.data"
    return "elsewhere", output


def _run(work: Path, *arguments: str | Path, made: tuple[str, ...] = ()) -> bool:
    """Run a verb and take back what it wrote but for a patch's; whether it did what it was asked."""
    before = state(work.parent)
    result = sarsteer(*arguments)
    worked = _check_answer(result, [str(argument) for argument in arguments])
    after = state(work.parent)
    assert {name: after.get(name) for name in before} == before, f"{arguments[0]} changed its input"
    new = set(after) - set(before)
    allowed = {f"work/{name}" for name in made} if worked else set()
    if (
        worked and "work/elsewhere" in allowed
    ):  # copies of the data, under the names that the graph has for it
        allowed |= {name for name in new if name.startswith("work/elsewhere/") and "/." not in name}
    assert new <= allowed, f"{arguments[0]} ended with {result.exit_code} and left {sorted(new - allowed)}"
    if arguments[0] != "patch":
        for name in new:
            (work.parent / name).unlink()
    return worked


def _check_answer(result: Result, arguments: list[str]) -> bool:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in EXIT_CODES, (arguments[0], result.exit_code, result.stderr)
    if result.exit_code:
        one_error(result.stderr)
        return False
    assert "Error: " not in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    if "--json" in arguments:
        json.loads(result.stdout, parse_constant=lambda name: _fail(f"{name} is not JSON"))
    return True


def _check_steered(case: Case, work: Path, output: Path) -> None:
    """A graph that was patched can be read, refitted to its own plan, and be what it was before."""
    onnx.load(output, load_external_data=False)
    _run(work, "inspect", output, "--json")
    again = work / "again.onnx"
    if "--replace" in case.patching:
        _run(work, "unpatch", output, "-o", again, made=("again.onnx",))
        return
    folder = output.parent.relative_to(work) / "again.onnx"
    result = sarsteer("unpatch", output, "-o", output.parent / "again.onnx")
    assert result.exit_code == 0, result.stderr
    if "--copy" not in case.patching:
        given, back = (_parsed(work / name) for name in ("decoder.onnx", folder))
        assert given == back, "unpatch gave back another graph than was patched"


def _parsed(path: Path) -> bytes:
    """A graph as bytes that do not depend on how it was written; comparing messages would find NaN unequal."""
    model = onnx.load(path, load_external_data=False)
    return bytes(model.SerializeToString(deterministic=True))


def state(root: Path) -> State:
    """Everything under a folder, links not followed: what it is, when it was written, and what it holds."""
    found: State = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_dir():
            content = "folder"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        written = "" if content == "folder" else str(status.st_mtime_ns)
        found[path.relative_to(root).as_posix()] = (content, written)
    return found


def _fail(message: str) -> Any:
    raise AssertionError(message)
