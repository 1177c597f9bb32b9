"""An OpenAI-compatible chat endpoint (vLLM, TGI, Ollama, vendors), many requests in flight.

What may pass is tried again with growing pauses: refused connections, time-outs, 429 and 5xx,
bodies that are not JSON, answers in another form than asked for. What cannot pass stops the run:
an unknown key or model, a redirection. An endpoint that dies stops it too, with everything answered
kept.
"""

import http.client
import ipaddress
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
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


class Passing(Exception):
    """May be better next time; `after` is the pause in seconds that the server asked for."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class Refused(Exception):
    """The model or its filter will not answer this prompt."""


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
    patience: int = 8,
    sleep: Callable[[float], None] = time.sleep,
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
      patience: prompts in a row that never got through after which the endpoint counts as dead.
      sleep: pauses.
    """

    def ask(request: Request, check: Callable[[str], Any]) -> Reply:
        error, malformed = "", 0
        for attempt in range(attempts):
            try:
                answer = _post(url, model, request.prompt, timeout, max_tokens)
                check(answer)
                return Reply(request.key, answer)
            except Refused as refusal:
                return Reply(request.key, error=f"refused: {refusal}")
            except Passing as problem:
                error, after = f"{problem}", problem.after
            except ValueError:
                error, after, malformed = "malformed answer", 0.0, malformed + 1
            if malformed == 2:
                break
            if attempt + 1 < attempts:
                pause = min(first_pause * 2**attempt, LONGEST_PAUSE)
                sleep(max(after, pause * random.uniform(0.5, 1.0)))
        return Reply(request.key, error=error)

    def complete(requests, check):
        requests, lost = iter(requests), 0
        pool = ThreadPoolExecutor(in_flight, thread_name_prefix="endpoint")
        try:
            pending = {pool.submit(ask, r, check) for r in islice(requests, in_flight)}
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
                pending |= {pool.submit(ask, r, check) for r in islice(requests, len(done))}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return Backend(f"endpoint:{model}", complete)


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


def _post(url: str, model: str, prompt: str, timeout: float, max_tokens: int) -> str:
    """Ask once.

    Raises:
      Passing, Refused: see there.
      UserError: where no attempt can succeed.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
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
        raise _http_error(error, url, model) from None
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
    return Refused(f"HTTP {error.code}")


def _content(body: bytes) -> str:
    try:
        choice = parse_json(body)["choices"][0]
        message = choice["message"]
        answer = message["content"]
    except (ValueError, LookupError, TypeError):
        raise Passing("a body that is no chat completion") from None
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise Refused("by the model or its filter")
    if not isinstance(answer, str):
        raise Passing("a body that is no chat completion")
    return answer
