"""tensorstore's key-value stores: files, http(s)://, s3:// and gs://, with waits that end.

S3 is set up by the usual environment: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION,
AWS_ACCESS_KEY_ID and so on, profiles and roles; AWS_NO_SIGN_REQUEST=1 reads a public bucket without credentials.

Forks: tensorstore has threads, and aborts a process that was forked after they had been started. Such a process
(`tensorstore_usable` knows) must do without it.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 30.0  # seconds for one read; a server that refuses the connection fails in about one
SILENCE = 10.0  # seconds without a byte after which a connection is given up
RETRIES = 3

_RETRY = {"max_retries": RETRIES, "initial_delay": "100ms", "max_delay": "1s"}
RETRY_CONTEXT = {"s3_request_retries": _RETRY, "gcs_request_retries": _RETRY, "http_request_retries": _RETRY}

_started_in: list[int] = []  # the process in which we first used tensorstore; forks inherit it


def tensorstore_usable() -> bool:
    """Whether this process may use tensorstore: not where it was forked from one that had."""
    return not _started_in or _started_in[0] == os.getpid()


def start_tensorstore() -> Any:
    """The module tensorstore; connections that stall are given up, and from now on forks do without it."""
    if not _started_in:
        _started_in.append(os.getpid())
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(int(SILENCE)))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(int(SILENCE)))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import tensorstore

    return tensorstore


def kvstore_spec(path: Any) -> dict[str, Any] | None:
    """tensorstore's description of the folder `path` (a Path or a RemotePath); None where it knows no such scheme."""
    if isinstance(path, Path):
        return {"driver": "file", "path": f"{path}/"}
    parts = urlsplit(str(path))
    if parts.scheme in ("http", "https"):
        return {"driver": "http", "base_url": f"{path}/"}
    folder = {"bucket": parts.netloc, "path": parts.path.lstrip("/") + "/"}
    if parts.scheme == "gs":
        return {"driver": "gcs", **folder}
    return {"driver": "s3", **folder, **s3_options()} if parts.scheme == "s3" else None


def s3_options() -> dict[str, Any]:
    """What tensorstore's S3 driver is told beside the bucket, from the environment."""
    names = os.environ
    endpoint = names.get("AWS_ENDPOINT_URL_S3") or names.get("AWS_ENDPOINT_URL")
    region = names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    if names.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true"):
        credentials = "anonymous"
    else:
        credentials = "environment" if names.get("AWS_ACCESS_KEY_ID") else "default"
    options = {"endpoint": endpoint, "aws_region": region, "aws_credentials": {"type": credentials}}
    return {key: value for key, value in options.items() if value}


def tensorstore_reason(error: BaseException) -> str:
    """What a tensorstore error says, in one line without its bookkeeping."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    line = str(error).split(" [", 1)[0].split("\n", 1)[0]
    return line if len(line) <= 240 else line[:237] + "..."


@functools.cache
def tensorstore_context(pool_bytes: int = 0) -> Any:
    """Bounded retries, and a pool that keeps what was read last (shard indexes); one of each size a process."""
    return start_tensorstore().Context({**RETRY_CONTEXT, "cache_pool": {"total_bytes_limit": pool_bytes}})


@functools.lru_cache(64)
def _key_value_store(spec: str) -> Any:
    opened = start_tensorstore().KvStore.open(json.loads(spec), context=tensorstore_context())
    return opened.result(timeout=TIMEOUT)


def read_object(url: str) -> bytes:
    """A whole file of s3:// or gs://.

    Raises:
        FileNotFoundError: there is none.
        OSError: whatever else; strerror says what.
    """
    folder, name = url.rsplit("/", 1)
    try:
        found = _key_value_store(json.dumps(kvstore_spec(folder))).read(name).result(timeout=TIMEOUT)
    except (ValueError, OSError) as error:  # a TimeoutError is an OSError
        raise OSError(errno.EIO, tensorstore_reason(error), url) from error
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, "not found", url)
    return bytes(found.value)
