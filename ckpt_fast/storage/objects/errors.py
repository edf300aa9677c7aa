# SPDX-License-Identifier: Apache-2.0
"""What an error of multi-storage-client means: will it pass, and what did the storage say?

The client tries again for seconds, and only after what it calls a RetryableError: a refused connection is
none, nor a 500, nor a 503 within the upload of a large file. Which it was is in the errors behind its own:
those of boto3, other vendors' clients, HTTP libraries and the operating system. They are recognized by what
they say, so that none of these packages is imported.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

# Of HTTP: timeout, too early, too many requests. 501 and 505 are answers about the request.
_PASSING = {408, 425, 429}
_LASTING = {501, 505}
# Of S3, where the status alone does not say it.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestLimitExceeded",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "BucketNotFound"}
_PASSING_ERRNO = {
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# By the name of the class or of one it is derived from: connections that fail, break off or time out.
_PASSING_CLASSES = {
    "ConnectionClosedError",
    "ConnectionError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProtocolError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "RetryableError",
    "RustRetryableError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TimeoutError",
    "TransportError",
}
_LASTING_CLASSES = {"NoCredentialsError", "PartialCredentialsError", "PermissionError", "SSLError"}


class ObjectErrors:
    """The ``Judge`` of what multi-storage-client raises."""

    def may_pass(self, error: BaseException) -> bool:
        """Whether the same request may succeed later. What nothing is known of will not."""
        verdicts = (_verdict(each) for each in _chain(error))
        return next((verdict for verdict in verdicts if verdict is not None), False)

    def cause_of(self, error: BaseException) -> str:
        """What the storage or the network said, in one line."""
        if lacks_bucket(error):
            return "the bucket does not exist"
        chain = list(_chain(error))
        told = next((each for each in chain if _status(each) is not None), None)
        if told is None:
            told = next(
                (each for each in chain if _names(each) & (_PASSING_CLASSES - {"RetryableError"})), chain[0]
            )
        return f"{type(told).__name__}: {' '.join(str(told).split())}"


def lacks_bucket(error: BaseException) -> bool:
    """Whether it is said behind ``error`` that there is no such bucket."""
    return any(_code(each) in _NO_BUCKET for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it, each once."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        behind = current.__context__ if not current.__suppress_context__ else None
        current = current.__cause__ or behind


def _verdict(error: BaseException) -> bool | None:
    """Whether it will pass; None: ask the one behind it."""
    status, code = _status(error), _code(error)
    if code in _PASSING_CODES:
        return True
    if status is not None and status >= 400:
        return status in _PASSING or (status >= 500 and status not in _LASTING)
    names = _names(error)
    if names & _LASTING_CLASSES:
        return False
    if names & _PASSING_CLASSES:
        return True
    return True if isinstance(error, OSError) and error.errno in _PASSING_ERRNO else None


def _status(error: BaseException) -> int | None:
    """The status of HTTP, as boto3 or other vendors' clients keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next((getattr(error, name, None) for name in ("status_code", "code", "status")), None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _code(error: BaseException) -> str:
    """The name that S3 or Azure gives the error; "" if there is none."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(found or getattr(error, "error_code", None) or "")


def _names(error: BaseException) -> set[str]:
    return {each.__name__ for each in type(error).__mro__}
