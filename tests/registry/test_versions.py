"""Registering is idempotent, the champion's moves have a history, and there is a way back."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmflow.core.errors import TrackingError
from mmflow.registry import versions
from mmflow.registry.tracking import connect


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A migrated database to copy: MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(template, tmp_path) -> str:
    return f"sqlite:///{shutil.copy(template, tmp_path / 'mlflow.db')}"


def register(uri: str, digest: str, **fields) -> int:
    return versions.register(
        "clip", f"/packages/{digest}", digest=digest, uri=uri, **{"metrics": {}, "tags": {}} | fields
    )


def promote(uri: str, digests: str, reason: str = "better") -> int:
    """Register and promote a version for each digest (a letter); the last one's number."""
    for digest in digests:
        number = register(uri, digest)
        versions.set_alias("clip", "champion", number, reason, uri=uri)
    return number


def champion(uri: str) -> int | None:
    found = versions.champion("clip", uri=uri)
    return found and found.version


def rollbacks(uri: str, count: int) -> list[int]:
    return [versions.rollback("clip", "no", uri=uri).version for _ in range(count)]


def test_version_reads_back_what_was_registered(uri):
    tags = {"dataset": "f00d", "teacher": "beef"}
    number = register(uri, "a", metrics={"unseen/R@1": 0.25, "broken": math.nan}, tags=tags)
    assert versions.champion("clip", uri=uri) is None
    versions.set_alias("clip", "champion", number, "first", uri=uri)
    found = versions.champion("clip", uri=uri)
    assert (found.version, found.package_uri, found.digest) == (1, "/packages/a", "a")
    assert (found.aliases, found.tags) == (("champion",), tags)
    assert found.metrics["unseen/R@1"] == 0.25
    assert math.isnan(found.metrics["broken"])
    assert versions.list_versions("clip", uri=uri)[0].digest == "a"


def test_same_digest_is_the_same_version_even_from_two_jobs_at_once(uri):
    assert promote(uri, "aa") == 1
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: register(uri, "b"), range(8)))
    assert len(set(numbers)) == 1
    assert [version.digest for version in versions.list_versions("clip", uri=uri)] == ["a", "b"]


def test_three_promotions_are_remembered_and_roll_back_one_by_one(uri):
    for digest in "abc":
        promote(uri, digest, f"because {digest}")
    promote(uri, "c", "submitted twice")
    past = versions.history("clip", uri=uri)
    expected = [(1, None, "because a"), (2, 1, "because b"), (3, 2, "because c")]
    assert [(change.version, change.previous, change.reason) for change in past] == expected
    assert [change.time for change in past] == sorted(change.time for change in past)
    back = versions.rollback("clip", "c sees snakes everywhere", uri=uri)
    assert (back.version, back.aliases, champion(uri)) == (2, ("champion",), 2)
    assert rollbacks(uri, 1) == [1]
    with pytest.raises(TrackingError, match="no champion before version 1"):
        versions.rollback("clip", "a as well", uri=uri)
    assert champion(uri) == 1
    past = versions.history("clip", uri=uri)
    assert [(change.version, change.rollback) for change in past[3:]] == [(2, True), (1, True)]
    promote(uri, "d")  # after rollbacks, the way back leads to the champion before, not to those taken back
    assert rollbacks(uri, 1) == [1]


def test_rollback_after_the_same_version_was_champion_twice(uri):
    promote(uri, "abac")
    assert rollbacks(uri, 3) == [1, 2, 1]
    promote(uri, "ba")
    connect(uri).delete_model_version("clip", "2")
    with pytest.raises(TrackingError, match="no champion before version 1"):
        rollbacks(uri, 1)


def test_promotion_killed_before_the_alias_moved_does_not_mislead_rollback(uri, monkeypatch):
    promote(uri, "ab")
    from mlflow.tracking import MlflowClient

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(uri, "c")
    assert champion(uri) == 2
    assert promote(uri, "c") == 3
    assert rollbacks(uri, 2) == [2, 1]


def test_alias_moved_by_hand_in_mlflow_counts(uri):
    promote(uri, "abc")
    connect(uri).set_registered_model_alias("clip", "champion", "1")
    connect(uri).delete_model_version("clip", "2")
    promote(uri, "d")
    assert versions.history("clip", uri=uri)[-1].previous == 1
    assert rollbacks(uri, 1) == [1]


def test_what_is_not_there_is_empty_or_one_line(uri):
    assert versions.champion("nobody", uri=uri) is None
    assert versions.list_versions("nobody", uri=uri) == versions.history("nobody", uri=uri) == ()
    promote(uri, "a")
    for refused in (
        lambda: versions.rollback("nobody", "why not", uri=uri),
        lambda: versions.set_alias("clip", "champion", 7, "typo", uri=uri),
        lambda: versions.set_alias("nobody", "champion", 1, "typo", uri=uri),
    ):
        with pytest.raises(TrackingError) as raised:
            refused()
        assert "\n" not in str(raised.value)
    assert champion(uri) == 1


def test_a_long_reason_fits_and_other_aliases_have_their_own_history(uri):
    number = promote(uri, "a", "因" * 10_000)
    versions.set_alias("clip", "champion-x", number, "other", uri=uri)
    (change,) = versions.history("clip", uri=uri)
    assert change.reason == "因" * 2000
    assert len(versions.history("clip", "champion-x", uri=uri)) == 1
    tags = connect(uri).get_registered_model("clip").tags
    assert max(len(value) for value in tags.values()) < 5000
    assert json.loads(next(iter(tags.values())))["version"] == number


def test_a_server_gets_a_source_that_it_admits(tmp_path):
    """A server refuses local paths; the package's own address must still read back."""
    server = "http://mlflow:5000"
    assert versions.source(str(tmp_path), "aa", server) == "mmflow:///aa"
    assert versions.source("s3://b/p", "aa", server) == "s3://b/p"
    assert versions.source(str(tmp_path), "aa", "sqlite:///x.db") == tmp_path.as_uri()
    from mlflow.server.handlers import _validate_source_run

    _validate_source_run("mmflow:///aa", None)
