"""Run graphs on ONNX Runtime: one-shot graphs, and decoders whose KV cache stays in runtime memory."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from calibration.errors import EngineError, InputError, UnsupportedError
from engines.runner import TensorSpec, cache_pairs, check_feeds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

    from engines.backends import Backend

    Provider = str | tuple[str, dict[str, str]]

CPU = ("CPUExecutionProvider",)
DATA_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
ONLY_ERRORS = 3
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeRunner:
    """Runs a graph on ONNX Runtime.

    `graph`: a path, or the serialized bytes of a graph whose external data lies in `data_folder`.
    Entering raises `EngineError` when the runtime refuses the graph, `UnsupportedError` when it cannot use a
    provider; it never falls back to another.
    """

    def __init__(
        self,
        graph: str | Path | bytes,
        *,
        data_folder: str | Path | None = None,
        providers: Sequence[Provider] = CPU,
    ) -> None:
        self._graph = graph
        self._data_folder = data_folder
        self._providers = list(providers)
        self._session: Any = None
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()

    def __enter__(self) -> Self:
        options = ort.SessionOptions()
        options.log_severity_level = ONLY_ERRORS
        if self._data_folder is not None:
            options.add_session_config_entry(DATA_FOLDER_KEY, str(self._data_folder))
        graph = self._graph if isinstance(self._graph, bytes) else str(self._graph)
        names = [provider if isinstance(provider, str) else provider[0] for provider in self._providers]
        if names != list(CPU):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
                ort.preload_dlls()  # CUDA's libraries, as packages of Python hold them
        try:
            self._session = ort.InferenceSession(graph, options, providers=self._providers)
        except Exception as error:  # the runtime's exceptions share no base class but Exception
            raise EngineError(
                f"ONNX Runtime {ort.__version__} refuses the graph: {_first_line(error)}"
            ) from error
        if missing := [name for name in names if name not in self._session.get_providers()]:
            self._session = None
            raise UnsupportedError(
                f"ONNX Runtime {ort.__version__} cannot use {missing[0]} here; its libraries or its GPU are missing; "
                "`sarsteer-export doctor` shows what this machine can run"
            )
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    @property
    def session(self) -> Any:
        """The open session. Raises `RuntimeError` outside the `with` block."""
        if self._session is None:
            raise RuntimeError("the runner is closed; use it inside a `with` block")
        return self._session

    def _fed_defaults(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[TensorSpec, ...]:
        """Inputs that have a default in the graph and are fed all the same."""
        defaults = self.session.get_overridable_initializers()
        return tuple(_spec(value) for value in defaults if value.name in feeds)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name; inputs with a default may be left out.

        Raises `InputError` for inputs that do not fit the graph.
        """
        session = self.session
        check_feeds((*self.inputs, *self._fed_defaults(feeds)), feeds)
        names = [spec.name for spec in self.outputs]
        try:
            results = session.run(names, dict(feeds))
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed to run the graph: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True))


class OnnxRuntimeDecoder(OnnxRuntimeRunner):
    """Runs a decoder on ONNX Runtime, its cache bound from step to step without passing through numpy."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._pairs = cache_pairs(self.inputs, self.outputs)
        self._fed = tuple(spec for spec in self.inputs if spec.name not in self._pairs)
        self._cache: dict[str, Any] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cache = {}
        super().__exit__(kind, error, trace)

    def reset(self) -> None:
        """Forget the cache; the next step is a prefill."""
        self._cache = {}

    def step(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one step and extend the cache; the outputs by name, those of the cache left out."""
        session = self.session
        check_feeds((*self._fed, *self._fed_defaults(feeds)), feeds)
        batch = next(iter(feeds.values())).shape[0]
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for spec in self.inputs:
            if spec.name in self._pairs:
                past = self._cache.get(self._pairs[spec.name])
                binding.bind_ortvalue_input(spec.name, past if past is not None else _empty(spec, batch))
        for spec in self.outputs:
            binding.bind_output(spec.name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed to run the decoder: {_first_line(error)}") from error
        values = dict(zip((spec.name for spec in self.outputs), binding.get_outputs(), strict=True))
        self._cache = {name: values.pop(name) for name in self._pairs.values()}
        return {name: value.numpy() for name, value in values.items()}

    def cache(self) -> dict[str, NDArray[Any]]:
        """A copy of the cache on the host, by output name."""
        return {name: value.numpy() for name, value in self._cache.items()}


def provider_of(backend: Backend) -> list[Provider]:
    """A backend's execution provider with its options, as ONNX Runtime takes it."""
    if backend.provider is None:
        raise ValueError(f"{backend.name} is no execution provider of ONNX Runtime")
    return [(backend.provider, dict(backend.provider_options))]


def _spec(value: Any) -> TensorSpec:
    if value.type not in DTYPES:
        raise InputError(f"graph value {value.name!r} is {value.type}, which numpy has no type for")
    dims = tuple(
        dim if isinstance(dim, int) else dim or f"{value.name}.{axis}" for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(value.name, np.dtype(DTYPES[value.type]), dims)


def _empty(spec: TensorSpec, batch: int) -> Any:
    """A cache of no positions: the symbols are batch and past, everything else is fixed."""
    shape = [
        dim if isinstance(dim, int) else (batch if axis == 0 else 0) for axis, dim in enumerate(spec.dims)
    ]
    return ort.OrtValue.ortvalue_from_numpy(np.empty(shape, dtype=spec.dtype))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
