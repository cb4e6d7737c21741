"""One run folder, one run: a lock that the operating system gives back when the process that has it dies."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from moka.errors import MokaError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


def _forget() -> None:
    """In a forked child, such as a data loader's worker: it must not keep the lock of a parent that was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class FolderLock:
    """``FOLDER/.lock``, kept by the main process from ``take`` to ``release``; the file is there only meanwhile.

    Args:
        use, key: what is done to the folder, and the setting that names it, for the message.
    """

    def __init__(self, folder: Path, use: str = "trained", key: str = "output.dir") -> None:
        self.path, self.use, self.key = folder / LOCK, use, key
        self._descriptor: int | None = None
        self._taken = False  # also where there is no lock to hold

    def take(self) -> bool:
        """Return whether it was free, and is now ours; False where we hold it already.

        Raises:
            MokaError: another process has it.
        """
        if self._taken:
            return False
        while self._descriptor is None and fcntl is not None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                who = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(descriptor)
                if error.errno in _TAKEN:
                    raise MokaError(
                        f"{self.path.parent} is being {self.use} by {who}. Wait for it or end it, or choose another folder "
                        f"with {self.key}=..."
                    ) from error
                print(f"note: no lock on {self.path} ({error.strerror}); see that no other run writes this folder.")
                self.path.unlink(missing_ok=True)
                break
            if not self._is_current(descriptor):
                os.close(descriptor)  # its holder removed the file between our two calls
                continue
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            self._descriptor = descriptor
            _held.add(descriptor)
        self._taken = True
        return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self._taken = False
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
