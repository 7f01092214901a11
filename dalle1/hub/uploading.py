"""Uploads a model folder to the Hub, in one commit: a reader sees all of it or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from dalle1 import registry
from dalle1.common.files import write_text
from dalle1.common.image_inputs import ImageLike
from dalle1.common.origins import CARD
from dalle1.hub.access import HubAccess
from dalle1.hub.card import card_for_hub, check_license, read_widgets, save_widgets
from dalle1.hub.errors import HubError, hub_errors, import_hub
from dalle1.hub.names import MAIN, HubName, as_repository, as_revision


def push(
    repository: str,
    save: Callable[[Path], None],
    card: str,
    access: HubAccess,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    license: str | None,
    create_pr: bool,
    widget: Mapping[str, ImageLike] | None,
) -> str:
    """Uploads a model; the arguments and errors are those of `Model.push_to_hub`.

    Args:
        save: writes the model into a folder.
        card: text of its README.md, with or without metadata.
        access: to the Hub, with the right to write.

    Returns:
        The address of the commit, or of the pull request.
    """
    repository = as_repository(repository)
    revision = None if revision is None else as_revision(revision)
    check_license(license)
    widgets = read_widgets(widget)
    if not isinstance(message, str) or not message.strip():
        raise ValueError(f"commit_message: expected a text, got {message!r}")
    if access.offline:
        raise HubError(f"{repository}: HF_HUB_OFFLINE is set; unset it to upload")
    import_hub()  # before gigabytes are written
    with tempfile.TemporaryDirectory(prefix="dalle1-push-") as made:
        folder = Path(made)
        save(folder)
        names = save_widgets(folder, widgets)
        write_text(folder / CARD, card_for_hub(card, license, widgets, names))
        return _upload(folder, repository, access, private, revision, message, create_pr)


def _upload(
    folder: Path,
    repository: str,
    access: HubAccess,
    private: bool | None,
    revision: str | None,
    message: str,
    create_pr: bool,
) -> str:
    hub, api = import_hub(), access.api()
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    operations = [hub.CommitOperationAdd(name, path) for name, path in files.items()]
    with hub_errors(repository, access.endpoint):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision not in (None, MAIN) and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # Of parts that an earlier upload had.
        held = access.list_files(HubName(repository, revision)).files
        gone = sorted((registry.files_of_parts() - files.keys()) & held.keys())
        operations += [hub.CommitOperationDelete(name) for name in gone]
        done = api.create_commit(
            repository,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    address: str = done.pr_url or done.commit_url
    return address
