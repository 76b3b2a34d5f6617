"""Try torch and the runtimes on next to nothing, each in a process of its own.

A package that is installed need not work: libraries are missing, the driver is too old, the GPU is not one it was
compiled for. Whether it does shows only when it computes something. What goes wrong then may end the process or write
to its output from C++, so that the trial is not made in this one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibration.errors import UnsupportedError
from engines.backends import BACKENDS, Runtime

if TYPE_CHECKING:
    from engines.backends import Backend

TORCH = "torch"
CPU_BUILD = "CPU build"
NOT_INSTALLED = "not installed"
TIMEOUT_S = 180
"""TensorRT takes tens of seconds to load its kernels the first time."""
CHILD = "import sys; from sarsteer_export.trials import answer; answer(sys.argv[1])"
LOADER_ERROR = re.compile(r"Failed to load library \S+ with error: (.+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Trial:
    """What came of a trial; `load_problem`, `build_problem` and `run_problem` are None for what works.

    `details`: of torch, the CUDA version it was built for or `CPU build`; of ONNX Runtime, the execution
    providers compiled into it; of TensorRT, the compute capabilities it can be told to build for.
    """

    version: str | None = None
    load_problem: str | None = None
    build_problem: str | None = None
    run_problem: str | None = None
    details: tuple[str, ...] = ()


def attempt(name: str, *, timeout_s: float = TIMEOUT_S) -> Trial:
    """Try `torch`, or the backend of a name, in a process of its own. Never raises for what goes wrong there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # modules of the current folder are not ours
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Trial(load_problem=f"gave no answer within {timeout_s:g} s")
    noise = COLOUR.sub("", done.stderr)
    try:
        values = json.loads(done.stdout)
    except ValueError:
        return Trial(load_problem=f"ended with exit code {done.returncode}{_last_line(noise)}")
    trial = Trial(**{**values, "details": tuple(values["details"])})
    if trial.run_problem and (found := LOADER_ERROR.search(noise)):
        return dataclasses.replace(trial, run_problem=found[1].strip())
    return trial


def answer(name: str) -> None:
    """Make a trial in this process and print it on stdout as JSON; everything else goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    module = TORCH if name == TORCH else BACKENDS[name].module
    try:
        trial = _try_torch() if name == TORCH else _try_backend(BACKENDS[name])
    except ModuleNotFoundError as error:
        trial = Trial(load_problem=NOT_INSTALLED if error.name == module else _first_line(error))
    except Exception as error:  # a broken library raises anything
        trial = Trial(load_problem=_first_line(error))
    with os.fdopen(stdout, "w", encoding="utf-8") as stream:
        json.dump(dataclasses.asdict(trial), stream)


def _try_torch() -> Trial:
    torch: Any = import_module(TORCH)
    built_for = torch.version.cuda
    trial = Trial(str(torch.__version__), details=(built_for or CPU_BUILD,))
    try:
        (torch.ones(2, device="cuda") + 1).sum().item()
    except Exception as error:  # torch raises AssertionError, RuntimeError and its own
        return dataclasses.replace(trial, run_problem=_first_line(error))
    return trial


def _try_backend(backend: Backend) -> Trial:
    try:
        library: Any = backend.load()
    except UnsupportedError as error:
        raise (error.__cause__ or error) from None
    trial = Trial(str(getattr(library, "__version__", "unknown")))
    if backend.runtime is Runtime.TENSORRT:
        from engines.trt.trial import try_engine

        made = try_engine(backend)
        return dataclasses.replace(
            trial,
            build_problem=made.build_problem,
            run_problem=made.open_problem,
            details=made.capabilities,
        )
    trial = dataclasses.replace(trial, details=tuple(library.get_available_providers()))
    if backend.provider not in trial.details:
        return dataclasses.replace(trial, run_problem="not compiled in")
    try:
        return dataclasses.replace(trial, run_problem=_provider_problem(backend))
    except Exception as error:  # a broken library raises anything
        return dataclasses.replace(trial, run_problem=_first_line(error))


def _provider_problem(backend: Backend) -> str | None:
    """Why a graph of one node does not run on a provider. The list of providers only says what was compiled in."""
    import numpy as np

    from engines.onnxruntime_runner import OnnxRuntimeRunner, provider_of

    with OnnxRuntimeRunner(_one_node(), providers=provider_of(backend)) as runner:
        total = runner.run({"x": np.ones(2, np.float32)})["y"]
    return None if np.array_equal(total, [2, 2]) else f"1 + 1 gives {total.tolist()}"


def _one_node() -> bytes:
    """A graph that adds its input, float32 (2,), to itself."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "trial", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return f": {lines[-1].strip()}" if lines else ""
