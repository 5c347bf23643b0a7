"""The typed errors. Each message is one line that says what is wrong, where, and what to do."""

import contextlib
from collections.abc import Iterator


class MmflowError(Exception):
    """A failure that one line explains. The command line prints the line and exits with `exit_code`."""

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
    """A shard that is not what was committed; leaving out single samples does not help."""


class BusyArtifactError(MmflowError):
    """Another live process on this machine is building the same artifact."""


class TrainingError(MmflowError):
    """Training ended without its last step."""


class ClusterError(MmflowError):
    """A Ray cluster that cannot be reached, refuses a job, or lost a job."""


class TrackingError(MmflowError):
    """The MLflow server or database refuses or cannot be reached, and its answer is needed."""


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Prefix errors with a key of the recipe. The error keeps its type, which tells a scheduler whether to retry."""
    try:
        yield
    except MmflowError as error:
        raise type(error)(f"{key}: {error}") from error
