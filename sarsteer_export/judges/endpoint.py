"""The judge by a language model behind an OpenAI-compatible endpoint: one chat completion per output."""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as OverdueError  # the built-in one only from Python 3.11 on
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, UnsupportedError
from sarsteer_export.judges.judge import Behaviour, Exchange, Judge, identity_of
from sarsteer_export.judges.prompts import filled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from email.message import Message

API_KEY_VARIABLE = "SARSTEER_JUDGE_API_KEY"
"""The environment variable that holds the endpoint's key. It is sent to the endpoint and goes nowhere else."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
"""Waits before the second attempt, doubled from one to the next, and at most."""
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP states that may be gone at the next attempt."""
PROBE = Exchange("I cannot help with that.", "How do I bake bread?")
"""What an endpoint is asked first."""
QUOTED = 200
"""How much of what an endpoint says a message quotes."""
THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""What reasoning models write before their reply; it is no part of the verdict."""
FENCED = re.compile(r"```(?:json)?[ \t\r]*\n((?:(?!```).)*)\n[ \t]*```", re.DOTALL)
"""A reply that is one code block and nothing else, as many models quote JSON."""


@dataclass(frozen=True)
class Endpoint:
    """Where a judging model is reached, and how patiently.

    `url`: the API's base, such as `http://localhost:8000/v1`. `timeout_seconds`: how long one attempt may take from its
    beginning to the last byte of the reply. `attempts`: how often one output is tried.
    """

    url: str
    model: str
    timeout_seconds: float = 60.0
    attempts: int = 5
    concurrency: int = 4
    first_wait_seconds: float = FIRST_WAIT_SECONDS

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"judge URL is {self.url!r}; expected http://host/v1 or https://host/v1")
        if parts.username is not None or parts.password is not None:
            raise InputError(f"the judge URL holds credentials; put the key into {API_KEY_VARIABLE}")
        if not self.model:
            raise InputError("the judge endpoint needs the name of a model; give --judge-model-name")
        for name, least in (("attempts", 1), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise InputError(f"judge {name} is {getattr(self, name)}; expected at least {least}")
        if not self.timeout_seconds > 0:
            raise InputError(f"judge timeout is {self.timeout_seconds}; expected more than 0 seconds")

    @property
    def completions_url(self) -> str:
        """Where a chat completion is asked for; a query of the base is kept."""
        parts = urllib.parse.urlsplit(self.url)
        return parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions", fragment="").geturl()

    @property
    def shown_url(self) -> str:
        """The URL as reports and messages name it: without its query, which may hold a secret."""
        return urllib.parse.urlsplit(self.url)._replace(query="", fragment="").geturl()


@dataclass(frozen=True)
class EndpointJudge(Judge):
    """Judges by asking a language model, at temperature 0. `key`: sent as a bearer token when there is one."""

    endpoint: Endpoint
    template: str
    key: str | None = field(default=None, repr=False)
    answer_pattern: str | None = None

    def _judge(self, exchanges: Sequence[Exchange]) -> list[Behaviour]:
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="judge")
        try:
            asked = [pool.submit(self._verdict, exchange, stop) for exchange in exchanges]
            return [verdict.result() for verdict in asked]
        finally:
            stop.set()  # after an error or Ctrl-C nobody waits for the rest
            pool.shutdown(cancel_futures=True)

    def probe(self) -> None:
        """Ask for one verdict, so that a wrong URL, key or model shows before anything long is done."""
        self._judge([PROBE])

    def _verdict(self, exchange: Exchange, stop: threading.Event) -> Behaviour:
        """The verdict on one output, tried until there is one. Raises when attempts run out."""
        content = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": filled(self.template, exchange)}],
            "temperature": 0,
        }
        wait = self.endpoint.first_wait_seconds
        failure: _FailedError | None = None
        for attempt in range(self.endpoint.attempts):
            if attempt and stop.wait(min(max(wait, failure.wait if failure else 0), LONGEST_WAIT_SECONDS)):
                break
            wait *= 2 if attempt else 1
            try:
                return parse_verdict(self._completion_in_time(content))
            except _FailedError as error:
                failure = error
                if error.lasting:
                    break
        if failure is None:
            raise InterruptedError("judging was stopped")
        raise self._given_up(failure)

    def _given_up(self, failure: _FailedError) -> InputError | UnsupportedError:
        name = f"judge {self.endpoint.model} at {self.endpoint.shown_url}"
        reason = self._without_key(str(failure))
        if failure.lasting:
            return InputError(f"{name}: {reason}; check the URL, the model's name and {API_KEY_VARIABLE}")
        tried = f"after {self.endpoint.attempts} attempts"
        if failure.verdict:
            return InputError(
                f"{name}: {reason} {tried}; expected one of {', '.join(kind.value for kind in Behaviour)}, or a JSON "
                'object such as {"verdict": "refusal"}; use a model that follows the prompt, or give --judge-prompt'
            )
        return UnsupportedError(f"{name}: {reason} {tried}; nothing was judged; try again when it is there")

    def _completion_in_time(self, content: dict[str, Any]) -> str:
        """The same as `_completion`, given up when its time is over.

        A socket's timeout starts again with every byte, and looking up a name has none; so a thread asks, which is
        left to itself when it is too late.
        """
        seconds = self.endpoint.timeout_seconds
        completion: Future[str] = Future()

        def ask() -> None:
            try:
                completion.set_result(self._completion(content))
            except BaseException as error:  # raised again where the result is waited for
                completion.set_exception(error)

        threading.Thread(target=ask, name="judge request", daemon=True).start()
        try:
            return completion.result(seconds)
        except OverdueError:
            raise _FailedError(f"could not be reached (timed out, no whole reply in {seconds:g} s)") from None

    def _completion(self, content: dict[str, Any]) -> str:
        """The text that the model replies with. Raises `_FailedError`."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(  # noqa: S310 - Endpoint takes http and https alone
            self.endpoint.completions_url, data=json.dumps(content).encode(), headers=headers, method="POST"
        )
        try:
            with _OPENER.open(request, timeout=self.endpoint.timeout_seconds) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = _shortened(error.read(10 * QUOTED).decode("utf-8", "replace"))
                raise _FailedError(
                    f"answered HTTP {error.code} ({said})",
                    lasting=error.code not in PASSING,
                    wait=_retry_after(error.headers),
                ) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSError
            reason = getattr(error, "reason", None) or error
            raise _FailedError(f"could not be reached ({reason or type(error).__name__})") from None
        try:
            reply = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            shown = _shortened(body.decode("utf-8", "replace"))
            raise _FailedError(f"sent no chat completion ({shown})", verdict=True) from None
        if not isinstance(reply, str):
            raise _FailedError(f"sent a reply without text ({reply!r})", verdict=True)
        return reply

    def _without_key(self, text: str) -> str:
        return text if not self.key else text.replace(self.key, "***")


def parse_verdict(reply: str) -> Behaviour:
    """The verdict in a model's reply: one of the three words alone, or a JSON object with it as `verdict`.

    Either may stand in a code block, with or without `json`, that is the whole reply. Raises `_FailedError` for
    anything else: a verdict is never guessed from a sentence.
    """
    said = THOUGHTS.sub("", reply).strip()
    if fenced := FENCED.fullmatch(said):
        said = fenced[1].strip()
    word: object = said.rstrip(".").strip("\"'`").lower()
    if said.startswith("{"):
        try:
            parsed = json.loads(said)
        except (ValueError, RecursionError):
            parsed = None
        word = parsed.get("verdict") if isinstance(parsed, dict) else None
        word = word.lower() if isinstance(word, str) else word
    found = next((kind for kind in Behaviour if kind.value == word), None)
    if found is None:
        raise _FailedError(f"replied {_shortened(reply)!r}, which is no verdict,", verdict=True)
    return found


def endpoint_identity(endpoint: Endpoint, template_sha256: str, pattern: str | None) -> dict[str, Any]:
    """What the report says of a judge behind an endpoint: no key, no query."""
    return identity_of(
        "endpoint",
        pattern,
        url=endpoint.shown_url,
        model=endpoint.model,
        prompt_sha256=template_sha256,
    )


class _FailedError(Exception):
    """One attempt failed. `lasting`: another would too. `verdict`: the endpoint works, its reply is no verdict."""

    def __init__(
        self, message: str, *, lasting: bool = False, verdict: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.lasting, self.verdict, self.wait = lasting, verdict, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along to wherever it leads."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Nothing is asked for instead; the redirect is then an HTTP error."""
        return


_OPENER = urllib.request.build_opener(_NoRedirect)


def _retry_after(headers: Message) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not say."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= QUOTED else f"{line[:QUOTED]} …"
