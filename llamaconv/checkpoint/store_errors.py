"""Errors of stores: one line each, with the cause and the remedy, whichever driver raised it.

Drivers raise what their clients raise, or what Python has for files. So the classes, the codes and
the status of an error and of its causes are looked at, by name: no driver is imported.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.report.errors import FailedError, LlamaconvError, RefusedError, printable

_LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket, "
    "set FSSPEC_S3_ANON=true",
    "gs": "log in with 'gcloud auth application-default login', or set "
    "GOOGLE_APPLICATION_CREDENTIALS; for a public bucket, set FSSPEC_GS_TOKEN=anon",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and "
    "AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "log in with 'hf auth login', or set HF_TOKEN",
}
_KINDS = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
_ENDPOINT = {"s3": ", and AWS_ENDPOINT_URL if it is set", "hf": ", and HF_ENDPOINT if it is set"}

# Names of classes: of botocore and aiobotocore, google.auth, gcsfs, azure.core, aiohttp, httpx.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOError",
    "DefaultCredentialsError",
    "RefreshError",
    "CredentialUnavailableError",
    "LocalTokenNotFoundError",
}
_REJECTED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthenticationFailed",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "401",
}
_NO_CONNECTION = {
    "EndpointConnectionError",
    "ConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "TransportError",
    "RequestException",
    "gaierror",
    "SSLError",
    "EOFError",
    "SSHException",
}
_BUSY = {"SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded", "ServerBusy"}
_BUSY |= {"Throttling", "ThrottlingException", "429", "503"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"}
_FULL |= {"XMinioAdminBucketQuotaExceeded", "AccountQuotaExceeded"}
_ARCHIVED = {"InvalidObjectState", "BlobArchived"}
_SHORTER = {"InvalidRange", "416"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "BucketNotFoundError"}
_OTHER_REGION = {"PermanentRedirect", "IllegalLocationConstraintException", "301"}
_OTHER_REGION |= {"AuthorizationHeaderMalformed"}


@dataclass(frozen=True)
class Reason:
    """What an error of a driver means.

    Attributes:
        text: The cause and the remedy, as the rest of a sentence that begins with the address.
        is_transient: Whether the same request may succeed a little later.
        is_missing: Whether the file or the folder is not there.
    """

    text: str
    is_transient: bool = False
    is_missing: bool = False


def log_in(address: StoreAddress) -> str:
    """Return how to give credentials to the driver of an address."""
    kind = _KINDS.get(address.scheme, address.scheme)
    return _LOG_IN.get(kind, "see how fsspec's driver for it is configured")


def explain(error: BaseException, address: StoreAddress) -> Reason:
    """Return what an error that a driver raised for ``address`` means."""
    chain = _chain(error)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    codes = {code for one in chain for code in _codes(one)}
    numbers = {one.errno for one in chain if isinstance(one, OSError)}
    quoted = _quoted(error, address)
    kind = _KINDS.get(address.scheme, address.scheme)
    server_error = any(code.isdecimal() and 500 <= int(code) < 600 for code in codes)
    # adlfs raises a plain ValueError if it is told of no account.
    no_account = isinstance(error, ValueError) and "account" in quoted
    if names & _NO_CREDENTIALS or no_account:
        return Reason(f"no credentials that can be used ({quoted}); {log_in(address)}")
    if found := codes & _REJECTED:
        return Reason(
            f"the store rejects the credentials ({min(found)}); {log_in(address)} with valid ones"
        )
    if found := codes & _ARCHIVED:
        return Reason(
            f"archived ({min(found)}); restore it to a class that can be read, then retry"
        )
    if codes & _OTHER_REGION:
        return Reason(f"the bucket is in another region ({quoted}); set AWS_DEFAULT_REGION to it")
    if "PermissionError" in names or codes & {"AccessDenied", "403"}:
        return Reason(
            f"access denied ({quoted}). Credentials that may do this are needed: {log_in(address)}"
        )
    if codes & _NO_BUCKET or "bucket does not exist" in quoted:
        return Reason(
            "no such bucket; check the name, and the account or endpoint", is_missing=True
        )
    if "FileNotFoundError" in names or codes & {"404", "NoSuchKey", "BlobNotFound"}:
        return Reason("not found; check the address", is_missing=True)
    if codes & _SHORTER:
        return Reason("shorter than its store listed; was it replaced? Open the source again")
    if codes & _FULL or numbers & {errno.ENOSPC, errno.EDQUOT}:
        return Reason(f"the store is full, or a quota is used up ({quoted}); free space there")
    if found := codes & _BUSY:
        return Reason(
            f"the store limits the rate of requests, or is overloaded ({min(found)}); try again "
            "in some minutes",
            is_transient=True,
        )
    if any("Timeout" in name for name in names) or "RequestTimeout" in codes:
        return Reason(
            f"no answer in time ({quoted}); check the network{_ENDPOINT.get(kind, '')}, and try "
            "again",
            is_transient=True,
        )
    if server_error or "InternalError" in codes:
        return Reason(f"the store has a server error ({quoted}); try again later", True)
    if names & _NO_CONNECTION:
        return Reason(
            f"no connection, or it was cut ({quoted}); check the network{_ENDPOINT.get(kind, '')}",
            is_transient=True,
        )
    return Reason(f"the store does not do it: {quoted}")


@contextmanager
def as_refusals(where: object, address: StoreAddress) -> Iterator[None]:
    """Turn what a driver raises into one `RefusedError` of one line, which begins with ``where``."""
    try:
        yield
    except LlamaconvError:
        raise
    except Exception as error:
        raise RefusedError(f"{where}: {explain(error, address).text}") from error


@contextmanager
def as_failures(where: object, address: StoreAddress) -> Iterator[None]:
    """Turn what a driver raises into one `FailedError` of one line, which begins with ``where``."""
    try:
        yield
    except LlamaconvError:
        raise
    except Exception as error:
        raise FailedError(f"{where}: {explain(error, address).text}") from error


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _codes(error: BaseException) -> Iterator[str]:
    """Yield the codes and the status that a server answered with, as text."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        yield str(response.get("Error", {}).get("Code", ""))
        yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    else:
        yield str(getattr(response, "status_code", ""))
    for name in ("error_code", "status_code", "status", "code"):
        value = getattr(error, name, None)
        value = getattr(value, "value", value)  # azure has an enumeration
        if isinstance(value, int | str):
            yield str(value)


def _quoted(error: BaseException, address: StoreAddress) -> str:
    """Return what the error says, short, in one line and without secrets."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError):
        said = f"{type(error).__name__}: {said}"
    said = printable(address.hide(said))
    return said if len(said) <= 300 else f"{said[:297]}..."
