"""Registering is idempotent, the champion's moves are remembered, and there is a way back."""

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


def promote(uri: str, digest: str, reason: str = "better") -> int:
    number = versions.register("clip", f"/packages/{digest}", digest=digest, metrics={"R@1": 0.5}, tags={}, uri=uri)
    versions.set_alias("clip", "champion", number, reason, uri=uri)
    return number


def champion(uri: str) -> int:
    found = versions.champion("clip", uri=uri)
    assert found is not None
    return found.version


def test_version_reads_back_what_was_registered(uri):
    metrics = {"unseen_variants/text_to_image/R@1": 0.25, "broken": math.nan}
    tags = {"dataset": "f00d", "teacher": "beef"}
    number = versions.register("clip", "s3://b/packages/a", digest="aa", metrics=metrics, tags=tags, uri=uri)
    assert versions.champion("clip", uri=uri) is None
    versions.set_alias("clip", "champion", number, "first", uri=uri)
    found = versions.champion("clip", uri=uri)
    assert found is not None
    assert (found.version, found.package_uri, found.digest, found.aliases) == (
        1,
        "s3://b/packages/a",
        "aa",
        ("champion",),
    )
    assert found.metrics["unseen_variants/text_to_image/R@1"] == 0.25
    assert math.isnan(found.metrics["broken"])
    assert found.tags == tags
    assert versions.list_versions("clip", uri=uri)[0].digest == "aa"


def test_same_digest_is_the_same_version_even_from_two_jobs_at_once(uri):
    assert promote(uri, "aa") == promote(uri, "aa") == 1
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: promote_free(uri, "bb"), range(8)))
    assert len(set(numbers)) == 1
    assert [version.digest for version in versions.list_versions("clip", uri=uri)] == ["aa", "bb"]


def promote_free(uri: str, digest: str) -> int:
    return versions.register("clip", "/packages/b", digest=digest, metrics={}, tags={}, uri=uri)


def test_three_promotions_are_remembered_and_roll_back_one_by_one(uri):
    for digest in ("aa", "bb", "cc"):
        promote(uri, digest, f"because {digest}")
    promote(uri, "cc", "submitted twice")
    past = versions.history("clip", uri=uri)
    assert [(change.version, change.previous, change.reason) for change in past] == [
        (1, None, "because aa"),
        (2, 1, "because bb"),
        (3, 2, "because cc"),
    ]
    assert [change.time for change in past] == sorted(change.time for change in past)
    back = versions.rollback("clip", "cc sees snakes everywhere", uri=uri)
    assert (back.version, back.aliases, champion(uri)) == (2, ("champion",), 2)
    assert versions.rollback("clip", "and bb too", uri=uri).version == 1
    with pytest.raises(TrackingError, match="no champion before version 1") as refused:
        versions.rollback("clip", "aa as well", uri=uri)
    assert "\n" not in str(refused.value)
    assert champion(uri) == 1
    past = versions.history("clip", uri=uri)
    assert [(change.version, change.rollback) for change in past[3:]] == [(2, True), (1, True)]

    promote(uri, "dd")  # after rollbacks, the way back leads to the version in office before, not to those taken back
    assert versions.rollback("clip", "dd fails", uri=uri).version == 1


def test_rollback_after_the_same_version_held_office_twice(uri):
    for digest in ("aa", "bb", "aa", "cc"):
        promote(uri, digest)
    assert [versions.rollback("clip", "no", uri=uri).version for _ in range(3)] == [1, 2, 1]


def test_promotion_killed_before_the_alias_moved_does_not_mislead_rollback(uri, monkeypatch):
    promote(uri, "aa")
    promote(uri, "bb")
    from mlflow.tracking import MlflowClient

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(uri, "cc")
    assert champion(uri) == 2
    assert promote(uri, "cc") == 3
    assert [versions.rollback("clip", "no", uri=uri).version for _ in range(2)] == [2, 1]


def test_alias_moved_by_hand_in_mlflow_counts_as_a_term_of_office(uri):
    for digest in ("aa", "bb", "cc"):
        promote(uri, digest)
    connect(uri).set_registered_model_alias("clip", "champion", "1")
    connect(uri).delete_model_version("clip", "2")
    promote(uri, "dd")
    assert versions.history("clip", uri=uri)[-1].previous == 1
    assert versions.rollback("clip", "no", uri=uri).version == 1


def test_what_is_not_there_is_empty_or_one_line(uri):
    assert versions.champion("nobody", uri=uri) is None
    assert versions.list_versions("nobody", uri=uri) == ()
    assert versions.history("nobody", uri=uri) == ()
    promote(uri, "aa")
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
    number = promote(uri, "aa", "因" * 10_000)
    versions.set_alias("clip", "champion-x", number, "other", uri=uri)
    (change,) = versions.history("clip", uri=uri)
    assert change.reason == "因" * 2000
    assert len(versions.history("clip", "champion-x", uri=uri)) == 1
    tags = connect(uri).get_registered_model("clip").tags
    assert max(len(value) for value in tags.values()) < 5000
    assert json.loads(next(iter(tags.values())))["version"] == number


def test_a_server_is_told_a_source_that_it_admits(tmp_path):
    """A server refuses local paths; the package's own place must still read back."""
    server = "http://mlflow:5000"
    assert versions.source(str(tmp_path), "aa", server) == "mmflow:///aa"
    assert versions.source("s3://b/p", "aa", server) == "s3://b/p"
    assert versions.source(str(tmp_path), "aa", "sqlite:///x.db") == tmp_path.as_uri()
    from mlflow.server.handlers import _validate_source_run

    _validate_source_run("mmflow:///aa", None)
