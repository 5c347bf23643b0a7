"""The commit protocol: whole or absent, built once, locked by one live process, identified by content alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.artifacts import MANIFEST, Stage, commit, content_hash, exclusive, read_artifact
from mmflow.core.errors import BusyArtifactError, CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import (
    file_sha256,
    join,
    local_path,
    publish,
    read_bytes,
    read_json,
    suffixed,
    write_bytes,
    write_json,
)


@contextmanager
def process_within(block: str, uri: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has entered `with block:` and stays there until it is killed."""
    program = f"""
        import sys, time
        from mmflow.core.artifacts import exclusive
        from mmflow.core.storage import publish
        with {block} as stream:
            if stream is not None:
                stream.write(b"half of the bytes")
                stream.flush()
            print("within", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "within\n"
            yield process
        finally:
            process.kill()


# --- publish --------------------------------------------------------------------------------------------------------


def test_publish_shows_the_file_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    with publish(str(target)) as stream:
        stream.write(b"bytes")
        stream.flush()
        assert not target.exists()
        staging = os.listdir(target.parent)  # beside the target, so that the rename stays on one disk
    assert len(staging) == 1
    assert target.read_bytes() == b"bytes"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == ["file"]


def fail_within(uri: str) -> None:
    with publish(uri) as stream:
        stream.write(b"half")
        raise ZeroDivisionError


@pytest.mark.parametrize("before", [None, b"old"])
def test_publish_changes_nothing_when_the_block_raises(before: bytes | None, tmp_path: Path) -> None:
    target = tmp_path / "file"
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(ZeroDivisionError):
        fail_within(str(target))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


def test_publish_killed_within_the_block_shows_nothing_under_the_final_name(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with process_within("publish(sys.argv[1])", str(target)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    write_bytes(str(target), b"whole")  # the staging file that was left does not matter
    assert target.read_bytes() == b"whole"


# --- URIs, JSON and hashes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://bucket/a", ("b", "c"), "s3://bucket/a/b/c"),
        ("s3://bucket/a/", ("b",), "s3://bucket/a/b"),
        (
            "s3://bucket/a?endpoint_override=h:9&scheme=http",
            ("b",),
            "s3://bucket/a/b?endpoint_override=h:9&scheme=http",
        ),
        ("/data/a", ("b",), "/data/a/b"),
        ("/data/what?/a", ("b",), "/data/what?/a/b"),  # in a path, a question mark is a letter like any other
        ("/", ("b",), "/b"),
    ],
)
def test_join_keeps_the_query_at_the_end(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert join(uri, *parts) == joined


def test_a_suffix_goes_to_the_name(tmp_path: Path) -> None:
    assert suffixed("s3://bucket/a?scheme=http", ".sent") == "s3://bucket/a.sent?scheme=http"
    assert suffixed("/data/what?", ".sent") == "/data/what?.sent"


def test_local_path_knows_files_from_stores(tmp_path: Path) -> None:
    assert local_path(f"file://{tmp_path}") == tmp_path
    assert local_path("relative") == Path.cwd() / "relative"
    assert local_path("~/x") == Path.home() / "x"
    assert local_path("s3://bucket/x") is None


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="absent: no such file"):
        read_bytes(str(tmp_path / "absent"))
    (tmp_path / "broken").write_text('{"a": ')
    with pytest.raises(CorruptArtifactError, match="broken: not valid JSON"):
        read_json(str(tmp_path / "broken"))
    with pytest.raises(MisuseError, match="ftp://host/x: not a storage URI"):
        read_bytes("ftp://host/x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(value=json_values)
def test_content_hash_survives_key_order_and_a_round_trip(value: Any) -> None:
    assert content_hash(reordered(value)) == content_hash(value) == content_hash(json.loads(json.dumps(value)))


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(str(tmp_path / "file")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- artifacts and stages -------------------------------------------------------------------------------------------


def test_read_artifact_says_what_is_wrong(tmp_path: Path) -> None:
    uri = str(tmp_path / "artifact")
    with pytest.raises(MissingArtifactError, match=r"artifact: no manifest\.json"):
        read_artifact(uri)
    for manifest in ({"format": 2, "kind": "dataset"}, ["format"]):
        write_json(join(uri, MANIFEST), manifest)
        with pytest.raises(CorruptArtifactError, match="not of format 1"):
            read_artifact(uri)
    write_bytes(join(uri, MANIFEST), b'{"format": 1, "ki')
    with pytest.raises(CorruptArtifactError, match="not valid JSON"):
        read_artifact(uri)
    commit(uri, "dataset", {"fingerprint": "abc"})
    assert read_artifact(uri, "dataset").fingerprint == "abc"
    with pytest.raises(MisuseError, match="this is a dataset, a training is needed"):
        read_artifact(uri, "training")


def never(uri: str) -> dict[str, Any]:
    raise AssertionError("built though it should not be")


SETTINGS = {"side": 96, "captions": {"least": 2, "most": 9}}


def stage(**changes: Any) -> Stage:
    fields: dict[str, Any] = {"name": "shard", "kind": "dataset", "version": 1, "settings": SETTINGS, "build": never}
    return Stage(**(fields | {"inputs": {"corpus": "abc", "extra": "def"}} | changes))


def test_identity_depends_on_content_alone() -> None:
    first = stage()
    reordered_fields = {"captions": {"most": 9, "least": 2}, "side": 96}
    same = stage(settings=reordered_fields, inputs={"extra": "def", "corpus": "abc"}, build=lambda uri: {})
    assert same.identity == first.identity
    assert len(first.identity) == 16
    assert first.directory("s3://there/work") == f"s3://there/work/shard/{first.identity}"
    program = "from tests.core.test_artifacts import stage; print(stage().identity)"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    root = Path(__file__).parents[2]
    elsewhere = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=root, env=environment)
    assert elsewhere.strip() == first.identity


@pytest.mark.parametrize(
    "change",
    [
        {"name": "pretrain"},
        {"version": 2},
        {"settings": SETTINGS | {"side": 97}},
        {"settings": SETTINGS | {"captions": {"least": 2, "most": 10}}},
        {"inputs": {"corpus": "abc", "extra": "xyz"}},
        {"inputs": {"corpus": "abc", "other": "def"}},
        {"inputs": {}},
    ],
)
def test_identity_changes_with_each_part(change: dict[str, Any]) -> None:
    assert stage(**change).identity != stage().identity


def test_run_builds_once_and_then_returns_what_was_committed(tmp_path: Path) -> None:
    calls, seen = [], []

    def build(uri: str) -> dict[str, Any]:
        calls.append(uri)
        seen.extend(os.listdir(uri))
        return {"fingerprint": "f", "rows": 7}

    built = stage(build=build)
    first, second = built.run(str(tmp_path)), built.run(str(tmp_path))
    assert calls == [built.directory(str(tmp_path))]
    assert MANIFEST not in seen, "the manifest is published after all else"
    assert (first.built, second.built) == (True, False)
    assert second.manifest == first.manifest == read_json(join(first.uri, MANIFEST))
    assert first.manifest["identity"] == built.identity
    assert (first.manifest["inputs"], first.manifest["rows"]) == ({"corpus": "abc", "extra": "def"}, 7)
    assert second.build == first.build
    assert second.build["seconds"] >= 0
    assert second.build["peak_memory_bytes"] > 1 << 20


def test_failed_build_commits_nothing_and_a_rerun_continues_from_its_files(tmp_path: Path) -> None:
    def build(uri: str) -> dict[str, Any]:
        data = Path(uri) / "shard"
        if not data.exists():
            write_bytes(str(data), b"finished before the failure")
            raise OSError("disk full")
        return {"fingerprint": data.read_text()}

    failing = stage(build=build)
    with pytest.raises(OSError, match="disk full"):
        failing.run(str(tmp_path))
    assert failing.committed(str(tmp_path)) is None
    rerun = failing.run(str(tmp_path))
    assert (rerun.built, rerun.fingerprint) == (True, "finished before the failure")
    with pytest.raises(MisuseError, match="this is a dataset, a training is needed"):
        stage(kind="training").run(str(tmp_path))


# --- exclusive ------------------------------------------------------------------------------------------------------


def test_second_live_process_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    uri = stage().directory(str(tmp_path))
    with process_within("exclusive(sys.argv[1])", uri) as process:
        with pytest.raises(BusyArtifactError, match=f"process {process.pid} on .* is building this"):
            stage().run(str(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(ZeroDivisionError), exclusive(uri):
            raise ZeroDivisionError
        with exclusive(uri):  # released when the block before raised
            pass
    with exclusive("s3://no-such-bucket-anywhere/artifact"):  # an object store has no locks
        pass


def test_stage_committed_between_the_look_and_the_lock_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def slow(uri: str) -> Iterator[None]:
        commit(uri, "dataset", {"fingerprint": "theirs"})  # the other process finishes while this one waits
        yield

    monkeypatch.setattr("mmflow.core.artifacts.exclusive", slow)
    assert stage().run(str(tmp_path)).fingerprint == "theirs"
