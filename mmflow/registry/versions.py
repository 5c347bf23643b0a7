"""Model versions and the `champion` alias in MLflow, with the two things that MLflow lacks: history and a way back.

A version is a pointer to a plain package directory and its digest: never mlflow.pyfunc, which runs code when loaded. An
MLflow alias moves in silence and remembers nothing, so each move is written first as a tag of the registered model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from mmflow.core.errors import TrackingError
from mmflow.core.storage import local_path
from mmflow.models.config import PackageConfig
from mmflow.registry.tracking import connect, explained, tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

Located = TypeVar("Located", bound=PackageConfig)

CHAMPION = "champion"
DIGEST_TAG = "mmflow.digest"
METRICS_TAG = "mmflow.metrics"  # one JSON text, because MLflow's tag names do not admit "R@1"
PACKAGE_TAG = "mmflow.package"
HISTORY_TAG = "mmflow.alias"
REASON_LENGTH = 2000  # MLflow's column holds 5000 characters of the whole entry


@dataclass(frozen=True)
class Version:
    """A registered model package. `aliases` are those that it holds now."""

    name: str
    version: int
    package_uri: str
    digest: str
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    created: datetime
    tags: Mapping[str, str]


@dataclass(frozen=True)
class AliasChange:
    """One move of an alias: to `version`, from `previous` (None where nobody held it)."""

    alias: str
    version: int
    previous: int | None
    reason: str
    time: datetime
    rollback: bool


def register(
    name: str, package_uri: str, *, digest: str, metrics: Mapping[str, float], tags: Mapping[str, str], uri: str
) -> int:
    """The version number of a package in the registered model `name`; the same digest is the same version.

    Args:
        name: registered model, created if it is not there.
        package_uri: directory of the package; MLflow stores where it lies and copies nothing.
        digest: hash of the package's files.
        metrics: metric → value, read back by `Version.metrics`.
        tags: lineage, such as the dataset fingerprint, the teacher's digest and the MLflow run id.
        uri: MLflow's tracking URI.
    """
    with explained(uri, f"register {package_uri} as {name}"):
        client = connect(uri)
        if find_model(client, name) is None:
            create_model(client, name)
        known = versions_of_digest(client, name, digest)
        if known:
            return known[0]
        own = {DIGEST_TAG: digest, PACKAGE_TAG: package_uri, METRICS_TAG: json.dumps(dict(metrics), sort_keys=True)}
        created = client.create_model_version(
            name, source(package_uri, digest, uri), tags={**tags, **own}, await_creation_for=0
        )
        # Two promote jobs at once: the lower number stays, and the loser takes its own away.
        first, version = versions_of_digest(client, name, digest)[0], int(created.version)
        if first != version:
            client.delete_model_version(name, str(version))
        return first


def set_alias(name: str, alias: str, version: int, reason: str, *, uri: str) -> None:
    """Point an alias at a version and keep the reason in the history. Does nothing where it points there already."""
    with explained(uri, f"make version {version} of {name} the {alias}"):
        client = connect(uri)
        client.get_model_version(name, str(version))  # MLflow would point an alias at a version that does not exist
        move_alias(client, name, alias, version, reason, rollback=False)


def champion(name: str, *, uri: str) -> Version | None:
    """The version in office, or None where there is no such model or nobody holds the alias."""
    with explained(uri, f"read the champion of {name}"):
        client = connect(uri)
        model = find_model(client, name)
        number = holder(model, CHAMPION) if model else None
        return describe(client.get_model_version(name, str(number)), model) if model and number else None


def list_versions(name: str, *, uri: str) -> tuple[Version, ...]:
    """All versions of a registered model, oldest first; empty where there is no such model."""
    with explained(uri, f"list the versions of {name}"):
        client = connect(uri)
        model = find_model(client, name)
        found = search(client, f"name = '{name}'") if model else []
        return tuple(sorted((describe(one, model) for one in found), key=lambda version: version.version))


def package_of(name: str, version: int, *, uri: str) -> str:
    """Where the package of a version lies. Raises TrackingError where there is no such version."""
    known = {each.version: each.package_uri for each in list_versions(name, uri=uri)}
    if version not in known:
        raise TrackingError(f"{name}: no version {version} is registered; `mmflow models list` shows those that are")
    return known[version]


def located(package: Located, workspace: str) -> Located:
    """The settings with the URI of the package, looked up for a registered version. Raises as `package_of`."""
    if package.package is not None or package.model is None or package.version is None:
        return package
    uri = package_of(package.model, package.version, uri=tracking_uri(workspace))
    return package.model_copy(update={"package": uri})


def history(name: str, alias: str = CHAMPION, *, uri: str) -> tuple[AliasChange, ...]:
    """Every move of an alias through this module, oldest first; empty where there is no such model."""
    with explained(uri, f"read the history of {name}"):
        return changes(find_model(connect(uri), name), alias)


def rollback(name: str, reason: str, *, uri: str) -> Version:
    """Make the version that was champion before champion again, and return it. A second call goes back one further.

    Raises TrackingError where there is no champion, or none before it whose version still exists.
    """
    with explained(uri, f"roll back {name}"):
        client = connect(uri)
        model = find_model(client, name)
        current = holder(model, CHAMPION) if model else None
        where = without_credentials(uri)
        if current is None:
            raise TrackingError(f"{where}: {name} has no champion to roll back; see `mmflow models list`")
        existing = {int(one.version) for one in search(client, f"name = '{name}'")}
        earlier = [version for version in terms(changes(model, CHAMPION), current)[:-1] if version in existing]
        if not earlier:
            raise TrackingError(f"{where}: {name} had no champion before version {current}; promote another instead")
        move_alias(client, name, CHAMPION, earlier[-1], reason, rollback=True)
        return describe(client.get_model_version(name, str(earlier[-1])), find_model(client, name))


def terms(past: tuple[AliasChange, ...], current: int) -> list[int]:
    """The versions that held the alias up to `current`, oldest first, without those that a rollback took back.

    What MLflow says of `current` wins over the history: the last entry may have been written by a process killed before
    it moved the alias, and a person may have moved the alias in MLflow's own UI.
    """
    held: list[int] = []
    for change in past:
        if change.previous is not None:
            held = up_to(held, change.previous)
        held = up_to(held[:-1], change.version) if change.rollback else [*held, change.version]
    return up_to(held, current)


def up_to(held: list[int], version: int) -> list[int]:
    """The list cut after the last occurrence of the version, or with the version added where it does not occur."""
    last = max((place for place, one in enumerate(held) if one == version), default=len(held))
    return [*held[:last], version]


def move_alias(client: MlflowClient, name: str, alias: str, version: int, reason: str, *, rollback: bool) -> None:
    """Write the history, then move the alias: a kill between the two leaves an entry too many, never one too few."""
    model = client.get_registered_model(name)
    previous = holder(model, alias)
    if previous == version:
        return
    entry = {"version": version, "previous": previous, "reason": reason[:REASON_LENGTH], "rollback": rollback}
    # Nanoseconds order the entries and keep two processes from writing the same tag; never before the last one's.
    last = max((int(key.rpartition(".")[2]) for key in model.tags if history_key(key, alias)), default=0)
    key = f"{HISTORY_TAG}.{alias}.{max(time.time_ns(), last + 1):020d}"
    client.set_registered_model_tag(name, key, json.dumps(entry | {"time": time.time()}, ensure_ascii=False))
    client.set_registered_model_alias(name, alias, str(version))


def history_key(key: str, alias: str) -> bool:
    """Whether a tag of the registered model is an entry of this alias's history."""
    return re.fullmatch(rf"{re.escape(HISTORY_TAG)}\.{re.escape(alias)}\.\d+", key) is not None


def changes(model: RegisteredModel | None, alias: str) -> tuple[AliasChange, ...]:
    """The history entries in a registered model's tags, oldest first."""
    tags: Mapping[str, str] = model.tags if model else {}
    entries: list[dict[str, Any]] = [json.loads(tags[key]) for key in sorted(tags) if history_key(key, alias)]
    return tuple(
        AliasChange(
            alias=alias,
            version=entry["version"],
            previous=entry["previous"],
            reason=entry["reason"],
            time=datetime.fromtimestamp(entry["time"], UTC),
            rollback=entry["rollback"],
        )
        for entry in entries
    )


def holder(model: RegisteredModel, alias: str) -> int | None:
    """The version that an alias points at now."""
    number = model.aliases.get(alias)
    return None if number is None else int(number)


def find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model, or None where there is none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def create_model(client: MlflowClient, name: str) -> None:
    """Create the registered model, unless another process was faster."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def search(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """All model versions that fulfil MLflow's filter, through all its pages."""
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(condition, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def versions_of_digest(client: MlflowClient, name: str, digest: str) -> list[int]:
    """The version numbers that carry this digest, lowest first."""
    return sorted(int(one.version) for one in search(client, f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"))


def source(package_uri: str, digest: str, uri: str) -> str:
    """What MLflow is told of where the package lies; `Version.package_uri` comes from our own tag.

    A server refuses every local path (it could be one of the server's own), yet a cluster with a shared disk has no
    other kind of place: then MLflow gets the digest under a scheme that it does not resolve.
    """
    path = local_path(package_uri)
    if path is None:
        return package_uri
    return f"mmflow:///{digest}" if uri.startswith(("http://", "https://")) else path.as_uri()


def describe(found: ModelVersion, model: RegisteredModel | None) -> Version:
    """MLflow's record of a version as ours. A version that others registered has no digest and no metrics."""
    number, tags = int(found.version), dict(found.tags)
    return Version(
        name=found.name,
        version=number,
        package_uri=tags.get(PACKAGE_TAG, found.source or ""),
        digest=tags.get(DIGEST_TAG, ""),
        aliases=tuple(sorted(alias for alias, held in (model.aliases if model else {}).items() if int(held) == number)),
        metrics=json.loads(tags.get(METRICS_TAG, "{}")),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        tags={key: value for key, value in tags.items() if key not in (DIGEST_TAG, PACKAGE_TAG, METRICS_TAG)},
    )
