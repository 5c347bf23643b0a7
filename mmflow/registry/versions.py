"""Model versions and the `champion` alias in MLflow, with two things that MLflow lacks: a history and a way back.

A version is a pointer to a plain package directory and its digest, never mlflow.pyfunc, which runs code when loaded. An
MLflow alias moves silently and has no history, so each move is written first, as a tag of the registered model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mmflow.core.errors import TrackingError
from mmflow.core.storage import local_path
from mmflow.models.config import PackageConfig
from mmflow.registry.tracking import connect, explained, tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
DIGEST_TAG = "mmflow.digest"
METRICS_TAG = "mmflow.metrics"  # one JSON text, because MLflow's tag names do not admit "R@1"
PACKAGE_TAG = "mmflow.package"
HISTORY_TAG = "mmflow.alias"
REASON_LENGTH = 2000  # MLflow's column holds 5000 characters of the whole entry


@dataclass(frozen=True)
class Version:
    """A registered model package. `aliases` are those that point at it now."""

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
    """One move of an alias to `version`, from `previous` (None if it pointed nowhere)."""

    version: int
    previous: int | None
    reason: str
    rollback: bool
    time: float  # seconds since 1970


def register(
    name: str, package_uri: str, *, digest: str, metrics: Mapping[str, float], tags: Mapping[str, str], uri: str
) -> int:
    """The version number of a package in the registered model `name`; the same digest is the same version.

    Args:
        name: registered model, created if it is not there.
        package_uri: directory of the package; MLflow stores this address and copies nothing.
        digest: hash of the package's files.
        metrics: metric → value, read back by `Version.metrics`.
        tags: lineage, such as the dataset's fingerprint.
        uri: MLflow's tracking URI.
    """
    with explained(uri, f"register {package_uri} as {name}"):
        client = connect(uri)
        if _find_model(client, name) is None:  # whoever may add versions need not have the right to create models
            _create_model(client, name)
        registered = _versions_of_digest(client, name, digest)
        if registered:
            return registered[0]
        own = {DIGEST_TAG: digest, PACKAGE_TAG: package_uri, METRICS_TAG: json.dumps(dict(metrics), sort_keys=True)}
        created = client.create_model_version(
            name, source(package_uri, digest, uri), tags={**tags, **own}, await_creation_for=0
        )
        # If two promote jobs run at once, the lower number stays and the other job deletes its own.
        first, version = _versions_of_digest(client, name, digest)[0], int(created.version)
        if first != version:
            client.delete_model_version(name, str(version))
        return first


def set_alias(name: str, alias: str, version: int, reason: str, *, uri: str) -> None:
    """Point an alias at a version and keep the reason in the history. Does nothing if it points there already."""
    with explained(uri, f"make version {version} of {name} the {alias}"):
        client = connect(uri)
        client.get_model_version(name, str(version))  # MLflow would point an alias at a version that does not exist
        _move_alias(client, name, alias, version, reason, rollback=False)


def champion(name: str, *, uri: str) -> Version | None:
    """The version behind the `champion` alias, or None."""
    return held_by(name, CHAMPION, uri=uri)


def held_by(name: str, alias: str, *, uri: str) -> Version | None:
    """The version behind an alias, or None."""
    with explained(uri, f"read the {alias} of {name}"):
        client = connect(uri)
        model = _find_model(client, name)
        number = _version_behind(model, alias)
        return None if number is None else _version(client.get_model_version(name, str(number)), model)


def list_versions(name: str, *, uri: str) -> tuple[Version, ...]:
    """All versions of a registered model, oldest first; empty if there is no such model."""
    with explained(uri, f"list the versions of {name}"):
        client = connect(uri)
        model = _find_model(client, name)
        versions = (_version(record, model) for record in _search(client, f"name = '{name}'"))
        return tuple(sorted(versions, key=lambda version: version.version))


def package_uri(package: PackageConfig, workspace: str) -> str:
    """The URI of a package that a recipe names. Raises TrackingError for a version that is not registered."""
    if package.package is not None:
        return package.package
    for version in list_versions(str(package.model), uri=tracking_uri(workspace)):
        if version.version == package.version:
            return version.package_uri
    raise TrackingError(
        f"{package.model}: no version {package.version} is registered; `mmflow models list` shows those that are"
    )


def history(name: str, alias: str = CHAMPION, *, uri: str) -> tuple[AliasChange, ...]:
    """Every move of an alias through this module, oldest first; empty if there is no such model."""
    with explained(uri, f"read the history of {name}"):
        return _changes(_find_model(connect(uri), name), alias)


def rollback(name: str, reason: str, *, uri: str) -> Version:
    """Make the previous champion champion again, and return it. A second call goes back one further.

    Raises TrackingError if there is no champion, or none before it that still exists.
    """
    with explained(uri, f"roll back {name}"):
        client, where = connect(uri), without_credentials(uri)
        model = _find_model(client, name)
        current = _version_behind(model, CHAMPION)
        if current is None:
            raise TrackingError(f"{where}: {name} has no champion to roll back; see `mmflow models list`")
        others = {int(record.version) for record in _search(client, f"name = '{name}'")} - {current}
        earlier = [number for number in _champions(_changes(model, CHAMPION), current) if number in others]
        if not earlier:
            raise TrackingError(f"{where}: {name} had no champion before version {current}; promote another instead")
        _move_alias(client, name, CHAMPION, earlier[-1], reason, rollback=True)
        return _version(client.get_model_version(name, str(earlier[-1])), _find_model(client, name))


def _champions(changes: tuple[AliasChange, ...], current: int) -> list[int]:
    """The versions that the alias pointed at, up to `current`, without those that a rollback took back.

    `current` comes from MLflow and wins over the history: a process may have been killed between the last entry and the
    move, or a person may have moved the alias in MLflow's own UI.
    """
    numbers: list[int] = []
    for change in changes:
        if change.previous is not None:
            numbers = _up_to(numbers, change.previous)
        numbers = _up_to(numbers, change.version) if change.rollback else [*numbers, change.version]
    return _up_to(numbers, current)


def _up_to(numbers: list[int], version: int) -> list[int]:
    """The list cut after the last occurrence of the version, or with the version added if it does not occur."""
    last = max((place for place, number in enumerate(numbers) if number == version), default=len(numbers))
    return [*numbers[:last], version]


def _move_alias(client: MlflowClient, name: str, alias: str, version: int, reason: str, *, rollback: bool) -> None:
    """Write the history, then move the alias: a kill between the two leaves an entry too many, never one too few."""
    model = client.get_registered_model(name)
    previous = _version_behind(model, alias)
    if previous == version:
        return
    entry = {"version": version, "previous": previous, "reason": reason[:REASON_LENGTH], "rollback": rollback}
    # Nanoseconds order the entries and keep two processes from writing the same tag; never before the last one's.
    last = max((int(key.rpartition(".")[2]) for key in _history_keys(model, alias)), default=0)
    key = f"{HISTORY_TAG}.{alias}.{max(time.time_ns(), last + 1):020d}"
    client.set_registered_model_tag(name, key, json.dumps(entry | {"time": time.time()}, ensure_ascii=False))
    client.set_registered_model_alias(name, alias, str(version))


def _history_keys(model: RegisteredModel, alias: str) -> list[str]:
    """The tags of a registered model that are the history of this alias, oldest first."""
    pattern = re.compile(rf"{re.escape(HISTORY_TAG)}\.{re.escape(alias)}\.\d+")
    return sorted(filter(pattern.fullmatch, model.tags))


def _changes(model: RegisteredModel | None, alias: str) -> tuple[AliasChange, ...]:
    if model is None:
        return ()
    return tuple(AliasChange(**json.loads(model.tags[key])) for key in _history_keys(model, alias))


def _version_behind(model: RegisteredModel | None, alias: str) -> int | None:
    number = model.aliases.get(alias) if model else None
    return None if number is None else int(number)


def _find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _search(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """All model versions that fulfil MLflow's filter, over all pages."""
    page = client.search_model_versions(condition)
    records = list(page)
    while page.token:
        page = client.search_model_versions(condition, page_token=page.token)
        records += page
    return records


def _versions_of_digest(client: MlflowClient, name: str, digest: str) -> list[int]:
    """The version numbers with this digest, lowest first."""
    condition = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    return sorted(int(record.version) for record in _search(client, condition))


def source(package_uri: str, digest: str, uri: str) -> str:
    """The package's address for MLflow; `Version.package_uri` comes from our own tag.

    A server refuses every local path (it could be one of its own), yet a cluster with a shared disk has no other kind
    of address: then MLflow gets the digest under a scheme that it does not resolve.
    """
    path = local_path(package_uri)
    if path is None:
        return package_uri
    return f"mmflow:///{digest}" if uri.startswith(("http://", "https://")) else path.as_uri()


def _version(record: ModelVersion, model: RegisteredModel | None) -> Version:
    """MLflow's record of a version as ours. A version that other tools registered has no digest and no metrics."""
    number, tags = int(record.version), dict(record.tags)
    aliases = model.aliases.items() if model else ()
    return Version(
        name=record.name,
        version=number,
        package_uri=tags.pop(PACKAGE_TAG, record.source or ""),
        digest=tags.pop(DIGEST_TAG, ""),
        aliases=tuple(sorted(alias for alias, target in aliases if int(target) == number)),
        metrics=json.loads(tags.pop(METRICS_TAG, "{}")),
        created=datetime.fromtimestamp(record.creation_timestamp / 1000, UTC),
        tags=tags,
    )
