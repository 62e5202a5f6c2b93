"""Downloads from a remote folder, with patience for what may pass and a clear word for what will not."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from titans_data._imports import import_extra, import_streaming
from titans_data.errors import DataError

log = logging.getLogger(__name__)

_MISSING = {"404", "NoSuchKey", "NoSuchBucket"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
# Of botocore, google and azure. Others with such names, as CredentialRetrievalError, come of services that may recover.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "CredentialUnavailableError",
}
_MISSING_ATTEMPTS = 2
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and S3_ENDPOINT_URL for a store beside AWS",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET",
    "azure": "set AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "azure-dl": "set AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "hf": "set HF_TOKEN",
}


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


@dataclass(frozen=True)
class Retries:
    """How long a download is tried. Raises DataError when a value is not allowed."""

    attempts: int = 5
    first_wait_s: float = 1.0
    """Before the second attempt; later waits are twice as long each, and all up to `first_wait_s` longer at random."""
    timeout_s: float = 60.0
    """How long a remote may send nothing."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise DataError(f"attempts of a download is {self.attempts}: give at least 1")
        if self.first_wait_s < 0:
            raise DataError(f"first_wait_s of a download is {self.first_wait_s}: give 0 or more")
        if self.timeout_s <= 0:
            raise DataError(f"timeout_s of a download is {self.timeout_s}: give more than 0")


class MissingFile(DataError):
    """There is no such file, though the remote answers."""


class Damaged(Exception):
    """What arrived is not what was asked for; the message completes "it ..."."""


class _Passing(Exception):
    """A failure that another attempt may not meet."""


class Remote:
    """The files below a URL of any kind that streaming knows: s3, gs, azure, hf and so on, or file.

    May be used from several threads and in forked processes: each makes its own client when it first needs one.
    Raises DataError for a URL of another kind.
    """

    def __init__(self, url: str, retries: Retries | None = None) -> None:
        self.url = url.rstrip("/")
        self._retries = retries or Retries()
        self._clients = threading.local()
        parts = urlsplit(url)
        self._scheme = parts.scheme
        if self._scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path):
            raise DataError(f"{url} is not a file URL: give file:// and an absolute path, as in file:///data/corpus")
        known = _download_module().DOWNLOADER_MAPPINGS
        if self._scheme != "file" and self._scheme not in known:
            names = ", ".join(sorted({"file", *filter(None, known)}))
            raise DataError(f"{url} is of an unknown kind: choose a local folder or one of {names}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url, self._retries)

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def download(self, name: str, path: Path, check: Callable[[Path], None]) -> None:
        """Write the file `name` of the remote to `path`, in a folder that is the caller's own.

        `check` raises Damaged when the file is not the right one, which counts as a failed attempt.
        Raises DataError naming the URL when it cannot be had (MissingFile when it does not exist), and OSError when
        the disk of `path` is full.
        """
        from streaming.base.util import retry

        url = self.url_of(name)
        attempt = 0

        def once() -> None:
            nonlocal attempt
            attempt += 1
            try:
                path.unlink(missing_ok=True)
                self._client().download(self._address(name), str(path), self._retries.timeout_s)
                if not path.is_file():
                    raise Damaged("sent nothing")
                check(path)
            except Exception as error:
                self._clients.of_process = None  # streaming's client for S3 does not recover from every error
                raise self._judge(error, url, attempt) from error

        patient = retry(
            exc_class=_Passing,
            num_attempts=self._retries.attempts,
            initial_backoff=self._retries.first_wait_s,
            max_jitter=self._retries.first_wait_s,
        )
        try:
            patient(once)()
        except _Passing as error:
            raise DataError(
                f"{url} could not be downloaded in {attempt} attempts (at last {error}): "
                "check the remote and the way to it, or restore the file there"
            ) from error.__cause__

    def _judge(self, error: Exception, url: str, attempt: int) -> Exception:
        """What a failed attempt is to be raised as."""
        full = disk_full(error)
        if full is not None:
            return full
        reason = _reason(error)
        codes = _codes(error)
        if isinstance(error, ImportError):
            return DataError(
                f"{url} cannot be downloaded ({reason}): install the package that its kind of remote needs"
            )
        # Streaming says the last as a ValueError, which names what it wants.
        if codes & _DENIED or type(error).__name__ in _NO_CREDENTIALS or "GCS_KEY" in str(error):
            mend = _CREDENTIALS.get(self._scheme, "give the credentials that it asks for")
            return DataError(f"{url} may not be read or does not exist ({reason}): {mend}, or correct the URL")
        if isinstance(error, FileNotFoundError) or codes & _MISSING:
            reason = "it does not exist"
            if attempt >= min(_MISSING_ATTEMPTS, self._retries.attempts):
                return MissingFile(f"{url} does not exist: correct the URL or upload the file again")
        log.warning("%s: attempt %d of %d failed: %s", url, attempt, self._retries.attempts, reason)
        return _Passing(reason)

    def _address(self, name: str) -> str:
        """Where streaming's downloader finds the file: it has plain paths for file URLs."""
        url = self.url_of(name)
        return url2pathname(urlsplit(url).path) if self._scheme == "file" else url

    def _client(self) -> Any:
        """The downloader of this thread in this process."""
        owner, client = getattr(self._clients, "of_process", None) or (None, None)
        if owner != os.getpid():
            client = _download_module().CloudDownloader.get(None if self._scheme == "file" else self.url)
            self._clients.of_process = os.getpid(), client
        return client


def _download_module() -> Any:
    import_streaming()
    return import_extra("streaming.base.storage.download")


def disk_full(error: BaseException | None) -> OSError | None:
    """The "no space left" that `error` is or came from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def _codes(error: Exception) -> set[str]:
    """The status that a remote answered with, in the ways of boto3, requests, google and azure."""
    response = getattr(error, "response", None)
    found = [getattr(error, "code", None), getattr(error, "status_code", None), getattr(response, "status_code", None)]
    if isinstance(response, dict):
        found.append(response.get("Error", {}).get("Code"))
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return {str(code) for code in found if isinstance(code, int | str)}


def _reason(error: Exception) -> str:
    """One line of at most 300 characters."""
    if isinstance(error, Damaged):
        return f"it {error}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
