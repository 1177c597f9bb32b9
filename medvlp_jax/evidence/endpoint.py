"""An OpenAI-compatible chat endpoint (vLLM, TGI, Ollama, vendors), many requests in flight.

What may pass is tried again with growing pauses: refused connections, time-outs, 429 and 5xx,
bodies that are not JSON, answers in another form than asked for. What cannot pass stops the run:
an unknown key or model, a redirection. An endpoint that dies stops it too, with everything answered
kept. Another attempt is no use where the model refuses or its tokens are used up.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.evidence.protocol import Backend, Reply, Request
from medvlp_jax.reading import parse_json

KEYS = ("MEDVLP_API_KEY", "OPENAI_API_KEY")  # environment variables, first one that is set
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FATAL = (401, 403, 404)
LONGEST_PAUSE = 60.0
OURS = ("model", "messages", "stream")  # fields of a request that no user sets
_NAME = re.compile(r"[\w.\[\]-]{1,60}")


class Passing(Exception):
    """May be better next time; `after` is the pause in seconds that the server asked for."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class Final(Exception):
    """This prompt gets no answer, however often it is asked."""


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: urllib would send the key to whatever host one names."""

    def redirect_request(self, *_):
        return None


def endpoint(
    url: str,
    model: str,
    *,
    in_flight: int = 16,
    timeout: float = 120.0,
    attempts: int = 6,
    first_pause: float = 1.0,
    max_tokens: int = 1024,
    extra_body: Mapping[str, Any] | None = None,
    patience: int = 8,
    sleep: Callable[[float], Any] | None = None,
) -> Backend:
    """Return a backend that asks an endpoint.

    Args:
      url: up to and with /v1.
      model: its name there.
      in_flight: requests at the same time.
      timeout: seconds without an answer after which a request is tried again.
      attempts: at most for one prompt; an answer in the wrong form is tried twice.
      first_pause: seconds, doubled with every attempt, at most LONGEST_PAUSE, drawn from the
        upper half at random so that requests do not come back together.
      max_tokens: of an answer.
      extra_body: fields of a request beside ours, or instead of them; None takes one out.
      patience: prompts in a row that never got through after which the endpoint counts as dead.
      sleep: pauses; None for pauses that end with the run.

    Raises:
      UserError: where `extra_body` sets one of OURS.
    """
    extra_body = dict(extra_body or {})
    if taken := [name for name in OURS if name in extra_body]:
        raise UserError(f"--extra-body sets '{taken[0]}', which is not its to set.")

    def body(prompt: str) -> dict:
        fields = {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
        fields |= {"model": model, "max_tokens": max_tokens, **extra_body}
        return {name: value for name, value in fields.items() if value is not None}

    limits = (f"{name}={value}" for name, value in body("").items() if name.startswith("max_"))
    cut_off = f"cut off: no answer within {', '.join(limits)}"

    def ask(request: Request, check: Callable[[str], Any], stopped: threading.Event) -> Reply:
        error, malformed = "", 0
        for attempt in range(attempts):
            if stopped.is_set():
                break
            is_cut = False
            try:
                answer, is_cut = _post(url, body(request.prompt), timeout)
                check(answer)
                return Reply(request.key, answer)
            except Final as problem:
                return Reply(request.key, error=f"{problem}")
            except Passing as problem:
                error, after = f"{problem}", problem.after
            except ValueError:
                if is_cut:
                    return Reply(request.key, error=cut_off)
                error, after, malformed = "malformed answer", 0.0, malformed + 1
            if malformed == 2:
                break
            if attempt + 1 < attempts:
                pause = min(first_pause * 2**attempt, LONGEST_PAUSE)
                (sleep or stopped.wait)(max(after, pause * random.uniform(0.5, 1.0)))
        return Reply(request.key, error=error)

    def complete(requests, check):
        requests, lost, stopped = iter(requests), 0, threading.Event()
        pool = ThreadPoolExecutor(in_flight, thread_name_prefix="endpoint")
        submit = lambda request: pool.submit(ask, request, check, stopped)
        try:
            pending = set(map(submit, islice(requests, in_flight)))
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    reply = future.result()
                    lost = lost + 1 if _never_got_through(reply) else 0
                    yield reply
                if lost >= patience:
                    raise UserError(
                        f"{url} does not answer any more ({reply.error}). What it answered "
                        "is kept; start the same command again to go on."
                    )
                pending |= set(map(submit, islice(requests, len(done))))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    extra = {"extra_body": extra_body} if extra_body else {}
    return Backend(f"endpoint:{model}", complete, settings={"max_tokens": max_tokens, **extra})


def is_this_machine(host: str) -> bool:
    """Return whether a host's name or address is the one of this machine to itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _never_got_through(reply: Reply) -> bool:
    return reply.error.startswith(("no answer", "HTTP 5", "HTTP 429"))


def _post(url: str, body: Mapping[str, Any], timeout: float) -> tuple[str, bool]:
    """Ask once; return the answer, and whether it was cut off for want of tokens.

    Raises:
      Passing, Final: see there.
      UserError: where no attempt can succeed.
    """
    headers = {"Content-Type": "application/json"}
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    address = url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    # What is for this machine must not take the way over a proxy, which is another one.
    near = is_this_machine(urllib.parse.urlsplit(url).hostname or "")
    proxies = urllib.request.ProxyHandler({} if near else None)
    try:
        opener = urllib.request.build_opener(proxies, _StaysHere)
        with opener.open(request, timeout=timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        raise _http_error(error, url, body["model"]) from None
    except (OSError, http.client.HTTPException) as error:
        # Neither the prompt nor the key is part of the message.
        reason = getattr(error, "reason", error)
        raise Passing(f"no answer: {type(reason).__name__}") from None
    return _content(content)


def _http_error(error: urllib.error.HTTPError, url: str, model: str) -> Exception:
    if error.code in FATAL:
        keys = " or ".join(KEYS)
        return UserError(
            f"{url} answers {error.code} for model '{model}': check the model's name and the key "
            f"in the environment variable {keys}."
        )
    if 300 <= error.code < 400:
        place = error.headers.get("Location", "")[:200].removesuffix("/chat/completions")
        return UserError(
            f"{url} answers {error.code}: it redirects to '{place}', and neither texts nor the key "
            "are sent to a place that --url does not name. Name that one if you trust it."
        )
    if error.code in PASSING:
        after = error.headers.get("Retry-After", "")
        seconds = min(float(after), LONGEST_PAUSE) if after.isdigit() else 0.0
        return Passing(f"HTTP {error.code}", seconds)
    return Final(f"refused: HTTP {error.code}{_reason(error)}")


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the names a server gives a refusal; never its sentence, which may hold the prompt."""
    found = {}
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        found = parse_json(error.read(1 << 16))
    found = found if isinstance(found, dict) else {}
    found = found["error"] if isinstance(found.get("error"), dict) else found
    pairs = ((name, str(found.get(name) or "")) for name in ("type", "code", "param"))
    named = [f"{name} {value}" for name, value in pairs if _NAME.fullmatch(value)]
    return f" ({', '.join(named)})" if named else ""


def _content(body: bytes) -> tuple[str, bool]:
    try:
        choice = parse_json(body)["choices"][0]
        message = choice["message"]
        answer, end = message.get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Passing("a body that is no chat completion") from None
    if message.get("refusal") or end == "content_filter":
        raise Final("refused: by the model or its filter")
    if answer is None and end == "length":  # thoughts that were never finished
        answer = ""
    if not isinstance(answer, str):
        raise Passing("a body that is no chat completion")
    return answer, end == "length"
