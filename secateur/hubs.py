"""The places where pruned models are published: a Hugging Face Hub, or a folder with the layout of a Hub cache.

Both places support compare-and-swap: a commit names its parent and is refused if the parent is no longer HEAD.
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
from secateur.files import link_or_copy, sha256, sync, write_whole

TRIES = 10
KEPT = ".gitattributes"
"""A file that the Hub itself creates with the repository."""


class HeadMoved(Exception):
    """Another process committed first; the caller must read HEAD again."""


class Hub(Protocol):
    """A place with repositories; ``repo_id`` is ``org/name``, and a commit is 40 hex digits."""

    def head(self, repo_id: str, private: bool) -> str | None:
        """Return the last commit, or ``None`` if there is none; create the repository if it does not exist."""

    def find(self, repo_id: str, message: str) -> str | None:
        """Return the commit with this message from anywhere in the history, or ``None`` if there is none."""

    def commit(self, repo_id: str, parent: str | None, folder: Path, message: str) -> str:
        """Replace the repository's files by those of ``folder``, in one commit on ``parent``; return the commit.

        Raises:
            HeadMoved: ``parent`` is not HEAD.
        """

    def url(self, repo_id: str, commit: str) -> str | None:
        """Return the URL of a commit for people, or ``None`` if the place has none that other machines can open."""


def publish(hub: Hub, repo_id: str, private: bool, folder: Path, message: str) -> str:
    """Replace the repository's files by those of ``folder``, in one commit with this message; return the commit.

    A commit with this message that is already in the history was made by an earlier attempt, and is returned instead.

    Raises:
        PruningError: An error of the Hub's methods, or ``hub_conflict`` (retryable) if others keep committing.
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
    """A Hugging Face Hub.

    Raises:
        PruningError: ``hub_forbidden``, ``hub_refused`` or ``hub_unavailable`` (retryable), from each method.
    """

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
    """A folder with the layout of ``HF_HUB_CACHE``: ``models--org--name/{refs/main,snapshots/COMMIT/}``.

    The folder also has a link ``org/name`` to the snapshot of HEAD.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def head(self, repo_id: str, private: bool) -> str | None:
        with self._locked(repo_id):
            commit = self._main(repo_id)
            if commit is not None:
                self._link(repo_id, commit)  # an earlier process may have been killed between the commit and its link
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
            shutil.rmtree(snapshot, ignore_errors=True)  # a killed process may have left an incomplete snapshot
            shutil.copytree(folder, snapshot, copy_function=link_or_copy)
            for path in [*snapshot.rglob("*"), snapshot, snapshot.parent]:
                sync(path)
            record = json.dumps({"parent": parent, "message": message})
            write_whole(self._record(repo_id, commit), record.encode())
            write_whole(self._repository(repo_id) / "refs" / "main", commit.encode())
            self._link(repo_id, commit)
            return commit

    def url(self, repo_id: str, commit: str) -> None:
        return None

    def _repository(self, repo_id: str) -> Path:
        return self.root / f"models--{repo_id.replace('/', '--')}"

    def _snapshot(self, repo_id: str, commit: str) -> Path:
        return self._repository(repo_id) / "snapshots" / commit

    def _record(self, repo_id: str, commit: str) -> Path:
        """Return the file with a commit's parent and message; only the commits that main leads back to were made."""
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
    """Return 40 hex digits that are computed from ``header`` and all files of ``folder``."""
    digest = hashlib.sha1(header.encode(), usedforsecurity=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
