"""What goes wrong with the Hub, in one line each that says what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dalle1.common.extras import import_extra, one_line
from dalle1.hub.names import HubName

HUB = "https://huggingface.co"  # where HF_ENDPOINT names no other
LOGIN = "give a token, set HF_TOKEN, or log in with `hf auth login`"
TOO_MANY, FAILED = 429, 500  # HTTP statuses: of a busy server; from here on of one that fails


class HubError(ValueError):
    """The Hub holds or tells something else than was expected of it."""


class HubUnreachableError(ConnectionError):
    """The Hub cannot be reached, fails or is busy; another time it may not."""


class CacheUsedWarning(UserWarning):
    """A copy in the cache stands for what could not be asked for; it may not be the newest."""


class NoSuchFileError(HubError):
    """A repository does not hold a file."""


def warn_of_cache(error: HubUnreachableError) -> None:
    """Warns that the cache is used, and why."""
    warnings.warn(f"{error}; the copy in the cache is used", CacheUsedWarning, stacklevel=3)


def import_hub(module: str = "huggingface_hub") -> Any:
    """The package huggingface_hub, or a module of it.

    Raises ValueError, with how to install it, where it is not there.
    """
    return import_extra(module, "hub", "Hugging Face Hub")


@contextmanager
def hub_errors(name: HubName | str, endpoint: str | None = None) -> Iterator[None]:
    """In this block the errors of the Hub's package, and of those below it, are told in one line.

    Args:
        name: of the repository.
        endpoint: address of the Hub; None: the usual one.

    Raises:
        HubError: a mistake in what was asked for, or in what the Hub tells; a ValueError.
        HubUnreachableError: the Hub cannot be reached, fails or is busy; a ConnectionError.
        OSError: of this machine's disk.
    """
    errors = import_hub("huggingface_hub.errors")
    try:
        yield
    except (HubError, HubUnreachableError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _told(errors, error, str(name), endpoint or HUB) from error


def _told(errors: Any, error: Exception, name: str, at: str) -> Exception:
    """Another package's error as one of ours."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachableError(f"{name}: HF_HUB_OFFLINE is set, and nothing is asked of {at}")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{name}: expected OWNER/NAME of the Hub, got another name")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError(f"{name}: token: expected one, got none; {LOGIN}")
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name}: expected the right to read it, got a gate; ask for it at {at}/"
            f"{re.split('[@:]', name)[0]}, then {LOGIN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{name}: expected a repository at {at}, got none of this name that may be read; check "
            f"the name, and for a private one {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name}: revision: expected a branch, a tag or a commit of the repository, got one "
            "that it does not have; leave it out for the newest"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return NoSuchFileError(f"{name}: expected a file of the repository, got none")
    if status == 401:
        return HubError(f"{name}: token: expected one that {at} knows, got another; {LOGIN}")
    if status == 403:
        return HubError(
            f"{name}: token: expected one with the right to do this at {at}, got one without; make "
            "another there, with access to this repository"
        )
    if status is not None and status != TOO_MANY and status < FAILED:
        return HubError(f"{name}: {at} refuses ({status}): {one_line(error)}")
    if type(error) is ValueError:  # of the package itself, such as of a card's metadata
        return HubError(f"{name}: {one_line(error)}")
    if status is not None or _is_of_network(error):
        return HubUnreachableError(f"{name}: {at} cannot be reached: {one_line(error)}")
    # A parser that meets something else: behind the address is no Hub.
    return HubError(
        f"{name}: expected the Hub's answers from {at}, got others ({type(error).__name__}: "
        f"{one_line(error)}); check HF_ENDPOINT"
    )


def _is_of_network(error: Exception) -> bool:
    """Whether an error is of a connection: Python's own, or of the package below the Hub's, which
    is httpx or httpx2."""
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")
