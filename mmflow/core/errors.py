"""The typed errors: each message is one line that says what, where and what to do; the command line adds nothing."""

import contextlib
from collections.abc import Iterator


class MmflowError(Exception):
    """A failure that one line explains. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class MisuseError(MmflowError):
    """The request itself is wrong: nothing was started and the workspace is untouched."""

    exit_code = 2


class RecipeError(MisuseError):
    """A recipe that cannot mean anything: an unknown key, a wrong type, a missing section."""


class MissingArtifactError(MmflowError):
    """A directory without a manifest: the artifact was never committed, so it does not exist."""


class CorruptArtifactError(MmflowError):
    """Committed bytes that no longer match their manifest."""


class CorruptShardError(CorruptArtifactError):
    """A whole shard that is not what was committed: no single sample of it can be left out."""


class BusyArtifactError(MmflowError):
    """Another live process on this machine is building the same artifact."""


class TrainingError(MmflowError):
    """Training ended without its last step."""


class ClusterError(MmflowError):
    """A Ray cluster that cannot be reached, refuses a job, or lost one."""


class TrackingError(MmflowError):
    """The MLflow server or database refuses or cannot be reached where its answer is needed."""


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Have an error begin with the key of the recipe that names what it is about; its type, by which a
    scheduler knows whether to try again, stays."""
    try:
        yield
    except MmflowError as error:
        raise type(error)(f"{key}: {error}") from error
