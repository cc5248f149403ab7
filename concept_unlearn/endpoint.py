"""Questions put to another process over HTTP, as JSON: an answer, or one error that says what went wrong."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from .errors import EndpointFailed

_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""What a server says that may answer later."""
_MAX_PAUSE = 60.0


class _Stays(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the key is for this address, and a question that is sent on arrives without its body."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Unanswered(Exception):
    """Worth asking again, after so many seconds where the server says how many."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


def post_json(
    url: str,
    question: Mapping[str, Any],
    *,
    key: str | None = None,
    timeout: float = 60.0,
    tries: int = 1,
    pause: float = 1.0,
) -> Any:
    """What ``url`` answers. ``key`` goes into the header; ``timeout`` and ``pause`` are seconds.

    A server that is silent, late or busy is asked up to ``tries`` times, ``pause`` apart, then twice that, and so on,
    or as it says itself, at most a minute; one that refuses is asked once. Raises EndpointFailed.
    """
    for left in reversed(range(max(tries, 1))):
        try:
            content = _post(url, question, key, timeout)
        except _Unanswered as error:
            if not left:
                raise EndpointFailed(str(error)) from error.__cause__
            time.sleep(min(pause if error.pause is None else error.pause, _MAX_PAUSE))
            pause *= 2
        else:
            try:
                return json.loads(content)
            except ValueError as error:
                raise EndpointFailed(f"{url} answered something that is not JSON: {content[:200]!r}") from error
    raise AssertionError(tries)


def _post(url: str, question: Mapping[str, Any], key: str | None, timeout: float) -> bytes:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(question).encode(), headers)
    try:
        with urllib.request.build_opener(_Stays).open(request, timeout=timeout) as reply:
            content: bytes = reply.read()
            return content
    except urllib.error.HTTPError as error:
        why = f"{url} refused ({error.code} {error.reason}): {error.read().decode(errors='replace')[:200]}"
        if error.code not in _PASSING:
            raise EndpointFailed(why) from error
        said = error.headers.get("Retry-After", "")
        raise _Unanswered(why, float(said) if said.isdigit() else None) from error
    except TimeoutError as error:
        raise _Unanswered(f"{url} did not answer within {timeout:g} s: give timeout=...") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unanswered(f"{url} cannot be reached: {error}") from error
