"""What every command shares: errors with exit codes, `--json`, `--config`, `--debug`, progress on stderr."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from calibration.errors import InputError, SarsteerError
from sarsteer_export.cli import INTERRUPTED
from sarsteer_export.staging import out_of_room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

UNEXPECTED = 1
SHARED = "calibrate"
"""The one command that the processes of a launcher such as torchrun share among them."""
WAIT_SECONDS = 5.0
"""How long the others let the first process say what is wrong; a launcher ends them as soon as it has."""
DEBUG, SIGNALLED = "sarsteer_export.debug", "sarsteer_export.signalled"
DETAIL = "\n  "
"""What stands between the lines of a message that has details."""
LOGGERS = ("calibration", "engines", "graph_passes", "sarsteer_export")


class Command(click.Command):
    """A command that turns errors into one message and an exit code, unless `--debug` is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])  # also without its group
        self.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on stdout."),
            click.Option(
                ["--config"],
                type=click.Path(dir_okay=False, path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=_read_config,
                help="TOML file with options by their long names; the command line wins.",
            ),
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_remember_debug,
                help="Show tracebacks of errors.",
            ),
        ]

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        _log_to_stderr()
        debug = bool(context.meta.get(DEBUG))
        try:
            self._check_alone()
            with _signals_interrupt(context):
                return super().invoke(context)
        except SarsteerError as error:
            if error.silent:
                context.exit(error.exit_code)
            if debug:
                raise
            lines = str(error).split(DETAIL) if error.has_details else [str(error)]
            _fail(context, lines, error.exit_code)
        except KeyboardInterrupt as interrupt:
            _fail(context, [str(interrupt) or "interrupted; nothing was written"], INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # the last resort: one message, whatever happened
            if context.meta.get(SIGNALLED):
                _fail(context, ["interrupted; nothing was written"], INTERRUPTED)
            if debug or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise  # a reader of stdout that went away, such as `head`, is no error: click ends quietly
            message, exit_code = _unexpected(error)
            _fail(context, [message], exit_code)

    def _check_alone(self) -> None:
        """Raise `InputError` where several processes would write one output: each would do all the work."""
        count, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
        writes = any(parameter.name == "output" for parameter in self.params)
        if self.name == SHARED or not writes or not count.isdigit() or int(count) < 2:
            return
        if rank.isdigit() and int(rank) > 0:
            time.sleep(WAIT_SECONDS)
        raise InputError(
            f"{self.name} runs in one process, and WORLD_SIZE is {count}: of the commands that write, {SHARED} alone "
            "shares its work among processes; start it without a launcher such as torchrun, or unset WORLD_SIZE"
        )


LINE_SECONDS = 60.0
"""How often long work says in a log how far it is."""


class Progress:
    """Progress of long work on stderr: a line that is redrawn on a terminal; elsewhere one per stage and minute.

    The time left goes by what was done since the first report of a stage, which may have begun before this run.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._start = 0.0
        self._first = 0
        self._printed = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` parts of a stage are finished."""
        context = click.get_current_context(silent=True)
        if context is not None and context.meta.get(SIGNALLED):
            raise KeyboardInterrupt
        if stage != self._stage:
            self._stage, self._start, self._first = stage, time.monotonic(), done
        now = time.monotonic()
        seconds = now - self._start
        if self._terminal:
            since = done - self._first
            rest = f", {seconds / since * (total - done):.0f} s left" if since > 0 and done < total else ""
            click.echo(f"\r\x1b[K{stage}: {done}/{total} ({seconds:.0f} s{rest})", nl=done == total, err=True)
        elif done == total or now - self._printed >= LINE_SECONDS:
            self._printed = now
            click.echo(f"{stage}: {done}/{total}", err=True)


@contextmanager
def _signals_interrupt(context: click.Context) -> Iterator[None]:
    """Within the block, SIGTERM ends the command as Ctrl-C does: staging folders are removed.

    Libraries now and then swallow or rewrap a KeyboardInterrupt while they are imported; so the signal is
    remembered too, and `Progress` raises it again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        context.meta[SIGNALLED] = True
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result on stdout: as text for people, or as one JSON object, in which null is no finite number."""
    if as_json:
        click.echo(json.dumps(_finite(result), indent=2, default=str))
    else:
        click.echo("\n".join(map(_on_one_line, text.split("\n"))))


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: a damaged file may hold any."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet_transformers() -> None:
    """Keep transformers' progress bars and notes out of our output."""
    from transformers.utils import logging as transformers_logging

    controls: Any = transformers_logging
    controls.set_verbosity_error()
    controls.disable_progress_bar()


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order given."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _fail(context: click.Context, lines: Sequence[str], exit_code: int) -> NoReturn:
    click.echo(f"Error: {DETAIL.join(map(_on_one_line, lines))}", err=True)
    context.exit(exit_code)


def _on_one_line(message: str) -> str:
    """A line without what would end it or move the cursor: it may quote a file from anywhere."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in message
    )


def _unexpected(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error that nobody foresaw."""
    if reason := out_of_room(error):
        return f"{reason}; nothing was written", InputError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", InputError.exit_code
    report = "this is a defect, please report it with the output of --debug"
    return f"unexpected {type(error).__name__}: {error}; {report}", UNEXPECTED


def _read_config(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML ({error})") from None
    named = {
        option.lstrip("-"): parameter
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and parameter.name not in ("config", "debug", "help")
        for option in parameter.opts
        if option.startswith("--")
    }
    for key, value in values.items():
        if key not in named:
            raise click.BadParameter(f"{path}: unknown option {key!r}; known are {', '.join(sorted(named))}")
        kind, accepted = _toml_kind(named[key])
        values_given = value if named[key].multiple and isinstance(value, list) else [value]
        if not all(_is(entry, accepted) for entry in values_given):
            raise click.BadParameter(f"{path}: {key} is {value!r}; expected {kind}")
    context.default_map = {
        str(named[key].name): [value] if named[key].multiple and isinstance(value, str) else value
        for key, value in values.items()
    }


def _toml_kind(option: click.Option) -> tuple[str, type | tuple[type, ...]]:
    """What TOML value an option takes: a name for people, and the Python types. Repeated ones take an array too."""
    if option.is_flag:
        return "true or false", bool
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number", int
    if isinstance(option.type, click.types.FloatParamType):
        return "a number", (int, float)
    return "a string, or an array of strings" if option.multiple else "a string", str


def _is(value: object, accepted: type | tuple[type, ...]) -> bool:
    return isinstance(value, accepted) and (accepted is bool or not isinstance(value, bool))


def _remember_debug(context: click.Context, _option: click.Parameter, value: bool) -> None:
    context.meta[DEBUG] = value


def _log_to_stderr() -> None:
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is now, so that it can be redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {_on_one_line(record.getMessage())}", err=True)
