"""What goes wrong on the way to the Hub, each as one line with its cause and the way out.

The Hub's own words are in headers of its answers (huggingface_hub's ``hf_raise_for_status``);
hosts are those of the endpoint and of the request, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from llamaconv.problems import RefusedError

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def host() -> str:
    """The Hub's host, with its port and without a password."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]


def _host_of(error: BaseException) -> str:
    """Who did not answer: the Hub, or where it sent the request."""
    try:
        return str(error.request.url.netloc.decode())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return host()


def check_endpoint(given: str | None) -> None:
    """Before huggingface_hub is imported, which takes the address apart and prints its error."""
    try:
        parts = urlsplit(given or "https://default")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    except ValueError:
        pass
    raise RefusedError(f"HF_ENDPOINT is {given!r}; an address like https://HOST was expected")


def client_error() -> type[Exception]:
    """Base of what huggingface_hub's HTTP client raises: httpx in its version 1, httpx2 in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def is_timeout(error: BaseException) -> bool:
    # Both clients call every kind of waiting too long by such a name.
    return "Timeout" in type(error).__name__


@contextmanager
def as_refusals(where: object) -> Iterator[None]:
    """What huggingface_hub and its HTTP client raise on the way to the Hub, as one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except RefusedError:
        raise
    except OfflineModeIsEnabled as error:
        raise RefusedError(
            f"{where}: HF_HUB_OFFLINE is set, so {host()} is not asked; unset it, or name the "
            "folder of a download"
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
            reason = f"no connection to {asked} ({said}); check the network, and HF_ENDPOINT if it is set"
        raise RefusedError(f"{where}: {reason}") from error


def refused(where: object, repo: str, status: int, headers: Mapping[str, str]) -> RefusedError:
    """What an answer of ``status`` means, by its headers as the Hub writes them."""
    from huggingface_hub import constants

    there = host()
    page = f"{urlsplit(constants.ENDPOINT).scheme}://{there}/{repo}"
    code, said = headers.get("x-error-code"), headers.get("x-error-message") or ""
    if code == "RevisionNotFound":
        reason = f"{there} has {repo}, but no such revision of it; branches, tags and commits are at {page}/tree/main"
    elif code == "GatedRepo":
        reason = f"the repository is gated; accept its terms at {page}, then {LOG_IN}"
    elif status == 401 and said.startswith("Invalid"):
        reason = f"{there} does not take the token; {LOG_IN} to one that is valid"
    elif code == "EntryNotFound":
        reason = f"{there} lists the file and does not have it; try again, or another revision"
    elif code == "RepoNotFound" or status in (401, 404):
        reason = f"{there} has no such repository, or it is private; check the name, or {LOG_IN}"
    elif status == 403:
        reason = f"{there} forbids it (403); accept the terms at {page} if there are any, and {LOG_IN} to a token that may read it"
    elif status == 429:
        wait = headers.get("retry-after")
        wait = f"{wait} s" if wait and wait.isdecimal() else "some minutes"
        reason = f"{there} limits the rate of requests (429); try again in {wait}, or {LOG_IN} for a higher limit"
    elif status >= 500:
        reason = f"{there} has a fault of its own ({status}); try again later"
    else:
        reason = f"{there} answers with status {status}{': ' if said else ''}{said}"
    return RefusedError(f"{where}: {reason}")
