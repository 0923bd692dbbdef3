"""Where pruned models are published: a Hugging Face Hub, or a folder laid out like a Hub cache.

Both offer a compare-and-swap: a commit names the parent it was decided upon and is refused when that is no longer HEAD.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from secateur.contract.errors import ErrorCode, PruningError
from secateur.files import sync, write_whole

TRIES = 10
KEPT = ".gitattributes"
"""The Hub's own file, made with the repository."""


class HeadMoved(Exception):
    """Somebody else committed first; look again."""


class Hub(Protocol):
    """``repo_id`` is ``org/name``; commits are 40 hex digits."""

    def head(self, repo_id: str, private: bool) -> str | None:
        """The last commit, ``None`` if there is none; makes the repository if it is missing."""

    def find(self, repo_id: str, message: str) -> str | None:
        """The commit with this message, wherever in the history it is; ``None``: there is none."""

    def commit(self, repo_id: str, parent: str | None, folder: Path, message: str) -> str:
        """Make the repository's files those of ``folder``, in one commit upon ``parent``.

        Raises:
            HeadMoved: ``parent`` is not HEAD.
        """

    def url(self, repo_id: str, commit: str) -> str:
        """Where a person finds it."""


def publish(hub: Hub, repo_id: str, private: bool, folder: Path, message: str) -> str:
    """Make the repository's files those of ``folder``, by one commit with this message; returns that commit.

    A commit with the message that is in the history already was made by an earlier attempt, and is adopted.

    Raises:
        PruningError: the Hub's own, or ``hub_conflict`` (retryable) when others keep committing.
    """
    for _ in range(TRIES):
        head = hub.head(repo_id, private)
        ours = hub.find(repo_id, message) if head is not None else None
        if ours is not None:
            return ours
        try:
            return hub.commit(repo_id, head, folder, message)
        except HeadMoved:
            continue
    raise PruningError(ErrorCode.HUB_CONFLICT, f"Others keep committing to '{repo_id}'; try again later.")


class HuggingFaceHub:
    """Raises :class:`PruningError` ``hub_forbidden``, ``hub_refused`` or (retryable) ``hub_unavailable``."""

    def __init__(self, token: str | None, endpoint: str | None) -> None:
        self.api = HfApi(token=token, endpoint=endpoint)

    def head(self, repo_id: str, private: bool) -> str | None:
        with self._errors(repo_id):
            try:
                return self.api.repo_info(repo_id).sha
            except RepositoryNotFoundError:
                self.api.create_repo(repo_id, private=private, exist_ok=True)
                return self.api.repo_info(repo_id).sha

    def find(self, repo_id: str, message: str) -> str | None:
        with self._errors(repo_id):
            commits = self.api.list_repo_commits(repo_id)
        return next((commit.commit_id for commit in commits if commit.title == message), None)

    def commit(self, repo_id: str, parent: str | None, folder: Path, message: str) -> str:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        with self._errors(repo_id):
            before = self.api.list_repo_files(repo_id, revision=parent)
            stale = [CommitOperationDelete(name) for name in before if name not in files and name != KEPT]
            added = [CommitOperationAdd(name, path) for name, path in files.items()]
            try:
                done = self.api.create_commit(repo_id, [*added, *stale], commit_message=message, parent_commit=parent)
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    raise HeadMoved from error
                raise
            return done.oid

    def url(self, repo_id: str, commit: str) -> str:
        return f"{self.api.endpoint}/{repo_id}/tree/{commit}"

    @contextmanager
    def _errors(self, repo_id: str) -> Iterator[None]:
        try:
            yield
        except (httpx2.HTTPError, LocalEntryNotFoundError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (401, 403):
                message = f"The Hub does not let this service's token write to '{repo_id}'."
                raise PruningError(ErrorCode.HUB_FORBIDDEN, message, field="publish.repo_id") from error
            if status is None or status == 429 or status >= 500:
                message = f"The Hub {self.api.endpoint} does not answer as it should: {error}"
                raise PruningError(ErrorCode.HUB_UNAVAILABLE, message) from error
            message = f"The Hub refused '{repo_id}': {error}"
            raise PruningError(ErrorCode.HUB_REFUSED, message, field="publish.repo_id") from error


class FolderHub:
    """``models--org--name/{refs/main,snapshots/COMMIT/}`` as in ``HF_HUB_CACHE``, and a link ``org/name`` to HEAD."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def head(self, repo_id: str, private: bool) -> str | None:
        with self._locked(repo_id):
            commit = self._main(repo_id)
            if commit is not None:
                self._link(repo_id, commit)  # a kill may have come between the commit and its link
            return commit

    def find(self, repo_id: str, message: str) -> str | None:
        with self._locked(repo_id):
            commit = self._main(repo_id)
            while commit is not None:
                record = json.loads(self._record(repo_id, commit).read_bytes())
                if record["message"] == message:
                    return commit
                commit = record["parent"]
            return None

    def commit(self, repo_id: str, parent: str | None, folder: Path, message: str) -> str:
        with self._locked(repo_id):
            if self._main(repo_id) != parent:
                raise HeadMoved
            commit = _digest(folder, f"{parent}\n{message}\n")
            snapshot = self._snapshot(repo_id, commit)
            shutil.rmtree(snapshot, ignore_errors=True)  # what a kill left half-made
            shutil.copytree(folder, snapshot, copy_function=_link_or_copy)
            for path in [*snapshot.rglob("*"), snapshot, snapshot.parent]:
                sync(path)
            record = json.dumps({"parent": parent, "message": message})
            write_whole(self._record(repo_id, commit), record.encode())
            write_whole(self._repository(repo_id) / "refs" / "main", commit.encode())
            self._link(repo_id, commit)
            return commit

    def url(self, repo_id: str, commit: str) -> str:
        return self._snapshot(repo_id, commit).as_uri()

    def _repository(self, repo_id: str) -> Path:
        return self.root / f"models--{repo_id.replace('/', '--')}"

    def _snapshot(self, repo_id: str, commit: str) -> Path:
        return self._repository(repo_id) / "snapshots" / commit

    def _record(self, repo_id: str, commit: str) -> Path:
        """Parent and message of a commit: only what main leads back to was committed."""
        return self._repository(repo_id) / "commits" / commit

    @contextmanager
    def _locked(self, repo_id: str) -> Iterator[None]:
        repository = self._repository(repo_id)
        for part in ("refs", "snapshots", "commits"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        with (repository / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _main(self, repo_id: str) -> str | None:
        try:
            return (self._repository(repo_id) / "refs" / "main").read_text()
        except FileNotFoundError:
            return None

    def _link(self, repo_id: str, commit: str) -> None:
        link = self.root / repo_id
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(self._snapshot(repo_id, commit), link.parent))
        new.replace(link)
        sync(link.parent)


def _digest(folder: Path, header: str) -> str:
    """40 hex digits over ``header`` and all files of ``folder``."""
    digest = hashlib.sha1(header.encode(), usedforsecurity=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
