"""The errors of `sarsteer-export`: one small family, each with the exit code it ends a command with.

An error message says what failed, the value seen, the value expected and what to do. It is raised where
that is known; the command line only prints it.
"""

from __future__ import annotations


class SarsteerError(Exception):
    """Base of every error this project raises on purpose.

    `has_details`: the message goes on in lines of its own, each indented by two. `silent`: it was said elsewhere, and
    is not printed again.
    """

    exit_code = 2
    has_details = False
    silent = False


class InputError(SarsteerError):
    """A file, option or value given by the user is missing, malformed or contradicts another."""

    exit_code = 2


class BadRecordsError(InputError):
    """Several records of the user's data cannot be used; each has its line."""

    has_details = True


class UnsupportedError(SarsteerError):
    """What was asked cannot be done here; the message names the remedy."""

    exit_code = 3


class SiteNotFoundError(SarsteerError):
    """The residual stream, or one of its sites, was not found in a graph."""

    exit_code = 4


class EngineError(SarsteerError):
    """A runtime refused to build or run a graph."""

    exit_code = 5
    has_details = True


class ParityError(SarsteerError):
    """An engine does not do what the steered PyTorch model does."""

    exit_code = 6
    has_details = True


class AuditError(SarsteerError):
    """A file does not hold the steering that it should, or not all of it, or not unaltered."""

    exit_code = 6


class LimitsError(SarsteerError):
    """No setting of a sweep keeps to its limits."""

    exit_code = 6
