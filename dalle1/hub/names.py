"""Names of repositories: OWNER/NAME[@REVISION], with `hub:` in front where that is to be said.

Of these, only the spelling is read here; nothing is looked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dalle1.common.files import is_inside

PREFIX = "hub:"
MAIN = "main"  # the revision that is meant where none is named
LONGEST = 96  # letters of OWNER/NAME
# As the Hub's own package accepts them: no dot or hyphen at the ends, and neither twice.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
# A revision with a slash: of a pull request, or of what the Hub has converted.
_SLASHED = r"refs/(?:pr|convert)/[^/@]+"
_SOURCE = re.compile(
    rf"(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>{_SLASHED}|[^/]+))?(?:/(?P<file>.+))?"
)


@dataclass(frozen=True)
class HubName:
    """A repository at a revision.

    Attributes:
        repository: OWNER/NAME.
        revision: a branch, a tag or a commit; None: not named, which is `MAIN`.
        file: a file in it, for sources of `dalle1 import`; None: the repository.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        name = self.repository if self.revision is None else f"{self.repository}@{self.revision}"
        return name if self.file is None else f"{name}/{self.file}"


def parse_model(text: str) -> HubName | None:
    """The repository of a model that a text names; None where it may only be a path.

    text: OWNER/NAME[@REVISION], or the same behind `hub:`. A revision may hold slashes.

    Raises ValueError where `hub:` stands in front of anything else.
    """
    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    if is_repository(repository) and (not at or _is_revision(revision)):
        return HubName(repository, revision if at else None)
    if text.startswith(PREFIX):
        raise ValueError(f"model: expected hub:OWNER/NAME[@REVISION], got {text!r}")
    return None


def parse_source(text: str) -> HubName:
    """The repository, or the file in one, of `hub:OWNER/NAME[@REVISION][/FILE]`.

    Raises ValueError for any other text, and for a file that lies outside of the repository.
    """
    match = _SOURCE.fullmatch(text.removeprefix(PREFIX))
    if match is not None:
        repository, revision, file = match["repository"], match["revision"], match["file"]
        known = is_repository(repository) and (revision is None or _is_revision(revision))
        if known and (file is None or is_inside(file)):
            return HubName(repository, revision, file)
    raise ValueError(f"SOURCE: expected hub:OWNER/NAME[@REVISION][/FILE], got {text!r}")


def as_repository(text: object, name: str = "repository") -> str:
    """OWNER/NAME, as it is given to be written to; `hub:` in front may stay.

    name: of the argument, for the ValueError where it is none.
    """
    repository = text.removeprefix(PREFIX) if isinstance(text, str) else ""
    if not is_repository(repository):
        raise ValueError(f"{name}: expected OWNER/NAME, got {text!r}")
    return repository


def as_revision(text: object, name: str = "revision") -> str:
    """A branch, a tag or a commit; ValueError for what cannot be one."""
    if not isinstance(text, str) or not _is_revision(text):
        raise ValueError(f"{name}: expected a branch, a tag or a commit, got {text!r}")
    return text


def is_repository(text: str) -> bool:
    """Whether a text is OWNER/NAME in the Hub's letters."""
    return (
        _REPOSITORY.fullmatch(text) is not None
        and len(text) <= LONGEST
        and not any(twice in text for twice in ("--", ".."))
        and not text.endswith(".git")
    )


def _is_revision(text: str) -> bool:
    # It becomes a path in the cache.
    return is_inside(text) and text.isprintable() and not set(text) & set('\\:*?"<>| ')
