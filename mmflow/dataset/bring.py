"""A file of others under a name of ours: linked where the file system can, copied where not, and never written to."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmflow.core.storage import COPY_BYTES, filesystem, fsync_directory, local_path, publish

# What a file system says where it cannot link: another device, no permission, no links at all, too many of them.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def bring(path: Path, target: str) -> None:
    """Bring a tar under its name in the dataset: by a hard link where that can be, else by a copy."""
    goal = local_path(target)
    if goal is not None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        staging = goal.with_name(f".staging-{goal.name}")
        staging.unlink(missing_ok=True)
        try:
            os.link(path, staging)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
        else:
            # A rename over another link of the same file does nothing and leaves both, hence the second unlink.
            os.replace(staging, goal)
            staging.unlink(missing_ok=True)
            fsync_directory(goal.parent)
            return
    with path.open("rb") as source, publish(target) as stream:
        shutil.copyfileobj(source, stream, COPY_BYTES)


@contextmanager
def on_this_machine(uri: str, beside: Path | None) -> Iterator[Path]:
    """A tar on this machine; of a remote one a temporary copy, where it can be linked from."""
    path = local_path(uri)
    if path is not None:
        yield path.resolve()
        return
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".staging-", dir=beside) as file:
        system, remote = filesystem(uri)
        with system.open_input_stream(remote) as stream:
            shutil.copyfileobj(stream, file, COPY_BYTES)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        yield Path(file.name)
