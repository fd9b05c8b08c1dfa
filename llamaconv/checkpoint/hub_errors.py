"""Errors of requests to the Hub: one line each, with the cause and the remedy.

The Hub states the reason in headers of its answers (huggingface_hub's ``hf_raise_for_status``).
The hosts in messages are those of the endpoint and of the request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from llamaconv.report.errors import RefusedError

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def host() -> str:
    """Return the Hub's host, with its port and without a password."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]


def _host_of(error: BaseException) -> str:
    """Return which host did not answer: the Hub, or the one that it redirected to."""
    try:
        return str(error.request.url.netloc.decode())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return host()


def check_endpoint(given: str | None) -> None:
    """Raise `RefusedError` if HF_ENDPOINT is not an address.

    Call this before huggingface_hub is imported, which parses the address and prints an error.
    """
    try:
        parts = urlsplit(given or "https://default")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    except ValueError:
        pass
    raise RefusedError(f"HF_ENDPOINT must be an address like https://HOST; got {given!r}")


def client_error() -> type[Exception]:
    """Return the base class of the HTTP client's errors: of httpx, or httpx2 (huggingface_hub 2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def is_timeout(error: BaseException) -> bool:
    """Return whether a host took too long; the names of both clients' errors tell."""
    return "Timeout" in type(error).__name__


@contextmanager
def as_refusals(where: object) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into one `RefusedError` of one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except RefusedError:
        raise
    except OfflineModeIsEnabled as error:
        raise RefusedError(
            f"{where}: HF_HUB_OFFLINE is set, so {host()} is not asked; unset it, or name a "
            "downloaded folder"
        ) from error
    except (client_error(), OSError) as error:
        asked = _host_of(error)
        if is_timeout(error):
            reason = (
                f"{asked} did not answer within {constants.HF_HUB_DOWNLOAD_TIMEOUT:g} s; try "
                "again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
            )
        else:
            said = str(error).strip() or type(error).__name__
            reason = f"no connection to {asked} ({said}); check the network, and HF_ENDPOINT if set"
        raise RefusedError(f"{where}: {reason}") from error


def refused(where: object, repo: str, status: int, headers: Mapping[str, str]) -> RefusedError:
    """Return what an answer of ``status`` means, by the headers that the Hub writes."""
    from huggingface_hub import constants

    there = host()
    page = f"{urlsplit(constants.ENDPOINT).scheme}://{there}/{repo}"
    code, said = headers.get("x-error-code"), headers.get("x-error-message") or ""
    if code == "RevisionNotFound":
        reason = (
            f"{there} has {repo}, but not this revision; branches, tags and commits are at "
            f"{page}/tree/main"
        )
    elif code == "GatedRepo":
        reason = f"the repository is gated; accept its terms at {page}, then {LOG_IN}"
    elif status == 401 and said.startswith("Invalid"):
        reason = f"{there} rejects the token; {LOG_IN} with a valid one"
    elif code == "EntryNotFound":
        reason = f"{there} lists the file, but does not have it; try again, or use another revision"
    elif code == "RepoNotFound" or status in (401, 404):
        reason = f"{there} has no such repository, or it is private; check the name, or {LOG_IN}"
    elif status == 403:
        reason = (
            f"{there} denies access (403); accept the terms at {page} if there are any, and "
            f"{LOG_IN} with a token that may read it"
        )
    elif status == 429:
        wait = headers.get("retry-after")
        wait = f"{wait} s" if wait and wait.isdecimal() else "some minutes"
        reason = (
            f"{there} limits the rate of requests (429); try again in {wait}, or {LOG_IN} for a "
            "higher limit"
        )
    elif status >= 500:
        reason = f"{there} returned a server error ({status}); try again later"
    else:
        reason = f"{there} returned status {status}{': ' if said else ''}{said}"
    return RefusedError(f"{where}: {reason}")
