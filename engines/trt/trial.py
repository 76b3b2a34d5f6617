"""Does TensorRT work here? Build an engine of one layer and open it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.trt.api import log_of

if TYPE_CHECKING:
    from types import ModuleType

    from engines.backends import Backend

CAPABILITY_PREFIX = "SM"


@dataclass(frozen=True)
class EngineTrial:
    """Why an engine of one layer could not be built, and why it could not be opened; None where it could.

    `capabilities`: the CUDA compute capabilities, such as `8.9`, that the library can be told to build for;
    empty for one that builds for the GPU at hand.
    """

    build_problem: str | None
    open_problem: str | None
    capabilities: tuple[str, ...]


def try_engine(backend: Backend) -> EngineTrial:
    """Build and open an engine of one layer.

    The bindings raise many kinds of errors, and C++ may end the process: call it in a process of its own.
    Raises `UnsupportedError` when the library is not installed.
    """
    trt = backend.load()
    log = log_of(backend)
    capabilities = _capabilities(trt)
    try:
        engine = _build(trt, log)
    except Exception as error:  # without a GPU, TensorRT's factories return null: a TypeError in Python
        problem = _reason(log, error)
        return EngineTrial(problem, problem, capabilities)
    try:
        _open(trt, log, engine)
    except Exception as error:
        return EngineTrial(None, _reason(log, error), capabilities)
    return EngineTrial(None, None, capabilities)


def _build(trt: ModuleType, log: Any) -> Any:
    log.start()
    builder = trt.Builder(log)
    network = builder.create_network()
    layer = network.add_identity(network.add_input("x", trt.float32, (1,)))
    network.mark_output(layer.get_output(0))
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    if engine is None:
        raise RuntimeError("the builder returned nothing")
    return engine


def _open(trt: ModuleType, log: Any, serialized: Any) -> None:
    log.start()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None or engine.create_execution_context() is None:
        raise RuntimeError("the runtime returned nothing")


def _capabilities(trt: ModuleType) -> tuple[str, ...]:
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    numbers = [name.removeprefix(CAPABILITY_PREFIX) for name in members if name.startswith(CAPABILITY_PREFIX)]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))


def _reason(log: Any, error: Exception) -> str:
    errors: list[str] = log.errors
    return errors[0] if errors else " ".join(str(error).split())
