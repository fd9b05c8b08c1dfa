"""What a user names: a local path, a repository of the Hub, or an address of a store."""

from __future__ import annotations

from pathlib import Path

from llamaconv.checkpoint.hub_address import PREFIX, HubAddress, hub_address, repository_meant
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_address import BUCKETS, SCHEME, StoreAddress, store_address
from llamaconv.report import shell
from llamaconv.report.errors import RefusedError


def path_or_address(
    text: str | Path, remedy: str = "Copy the files to a local folder"
) -> Path | HubAddress | StoreAddress:
    """Return what the user's ``text`` names.

    Args:
        text: What the user gave.
        remedy: What to do instead of giving an address of another kind.

    Returns:
        A repository if it begins with ``hf://``, an address if it begins as one of a store that
        fsspec knows, else a path.

    Raises:
        RefusedError: It begins with ``hf://``, but is not the name of a repository; or it is an
            address of another kind, such as that of a page.
    """
    if isinstance(text, Path):
        return text
    if text.startswith(PREFIX) and not text.startswith(BUCKETS):
        return hub_address(text)
    scheme = SCHEME.match(text)
    if scheme is None:
        if "::" in text and "://" in text:
            raise RefusedError(f"{text}: chained addresses are neither read nor written. {remedy}")
        return Path(text)
    if meant := repository_meant(text):
        raise RefusedError(f"{text}: for the repository on the Hub, use {meant}")
    if found := store_address(text):
        return found
    raise RefusedError(
        f"{text}: addresses that begin with {scheme[0]} are neither read nor written. {remedy}"
    )


def copy_command(address: StoreAddress) -> str:
    """Return the command that copies a folder of a store here, to a folder of its name."""
    source, name = str(address), address.name
    if address.scheme in ("s3", "s3a"):
        return shell.join(["aws", "s3", "cp", "--recursive", source, name])
    if address.scheme in ("gs", "gcs"):
        return shell.join(["gcloud", "storage", "cp", "--recursive", source, "."])
    code = (
        "import fsspec, sys; fs, path = fsspec.url_to_fs(sys.argv[1]); "
        "fs.get(path, sys.argv[2], recursive=True)"
    )
    return shell.join(["python", "-c", code, source, name])


def local(file: Path | RemoteFile | HubAddress | StoreAddress) -> Path:
    """Return ``file`` if it is a local path.

    Raises:
        RefusedError: It is somewhere else; with the command that copies it here.
    """
    if isinstance(file, Path):
        return file
    if isinstance(file, StoreAddress):
        command = copy_command(file)
    else:
        command = file.download() if isinstance(file, HubAddress) else file.download
    if str(file).startswith(PREFIX) and not str(file).startswith(BUCKETS):
        raise RefusedError(
            f"{file}: this reads all weights, and from the Hub only a conversion does. Download "
            f"them, then name the folder: {command}"
        )
    raise RefusedError(
        f"{file}: this needs the files here, and only a conversion reads them from a store. Copy "
        f"them, then name the folder: {command}"
    )
