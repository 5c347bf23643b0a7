"""The commit protocol: whole or absent, built once, held by one live process, told apart by content alone."""

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
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.artifacts import MANIFEST, Artifact, Stage, commit, content_hash, exclusive, read_artifact
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
        with {block} as held:
            if held is not None:
                held.write(b"half of the bytes")
                held.flush()
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
    assert target.read_bytes() == b"bytes"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == ["file"]


def fail_within(uri: str) -> None:
    with publish(uri) as stream:
        stream.write(b"half")
        raise ZeroDivisionError


def test_publish_leaves_nothing_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_within(str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []


def test_publish_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        fail_within(str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_publish_killed_within_the_block_shows_nothing_under_the_final_name(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with process_within("publish(sys.argv[1])", str(target)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    write_bytes(str(target), b"whole")  # and what it left beside is in nobody's way
    assert target.read_bytes() == b"whole"


# --- URIs and JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://bucket/a", ("b", "c"), "s3://bucket/a/b/c"),
        ("s3://bucket/a/", ("b",), "s3://bucket/a/b"),
        (
            "s3://bucket/a?endpoint_override=host:9000&scheme=http",
            ("b",),
            "s3://bucket/a/b?endpoint_override=host:9000&scheme=http",
        ),
        ("/data/a", ("b",), "/data/a/b"),
        ("/data/what?/a", ("b",), "/data/what?/a/b"),  # a question mark is a letter like any other in a path
        ("/", ("b",), "/b"),
    ],
)
def test_join_keeps_the_query_at_the_end(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert join(uri, *parts) == joined


def test_a_suffix_is_the_name_s() -> None:
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
    return [reordered(each) for each in value] if isinstance(value, list) else value


@given(value=json_values)
def test_content_hash_survives_key_order_and_a_round_trip(value: Any) -> None:
    assert content_hash(reordered(value)) == content_hash(value) == content_hash(json.loads(json.dumps(value)))


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(str(tmp_path / "file")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- artifacts ------------------------------------------------------------------------------------------------------


def test_read_artifact_returns_what_was_committed(tmp_path: Path) -> None:
    commit(str(tmp_path), "dataset", {"fingerprint": "abc", "totals": {"samples": 3}})
    found = read_artifact(str(tmp_path), "dataset")
    assert (found.fingerprint, found.manifest["totals"], found.built) == ("abc", {"samples": 3}, False)
    assert found.file("shards", "00000.tar") == f"{tmp_path}/shards/00000.tar"


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
    with pytest.raises(MisuseError, match="this is a dataset, a training is needed"):
        read_artifact(uri, "training")


# --- stages ---------------------------------------------------------------------------------------------------------


def build_nothing(uri: str) -> dict[str, Any]:
    return {"fingerprint": "none"}


def stage(**changes: Any) -> Stage:
    fields: dict[str, Any] = {
        "name": "shard",
        "kind": "dataset",
        "version": 1,
        "settings": {"side": 96, "captions": {"least": 2, "most": 9}},
        "inputs": {"corpus": "abc", "extra": "def"},
        "build": build_nothing,
    }
    return Stage(**(fields | changes))


def test_identity_depends_on_content_alone() -> None:
    first = stage()
    same = stage(
        settings={"captions": {"most": 9, "least": 2}, "side": 96},
        inputs={"extra": "def", "corpus": "abc"},
        build=lambda uri: {"fingerprint": "another function"},
    )
    assert same.identity == first.identity
    assert len(first.identity) == 16
    assert {first.directory(each).removeprefix(each) for each in ("/here", "s3://there/work")} == {
        f"/shard/{first.identity}"
    }


def test_identity_is_the_same_in_another_process() -> None:
    program = "from tests.core.test_artifacts import stage; print(stage().identity)"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    assert said.stdout.strip() == stage().identity


@pytest.mark.parametrize(
    "change",
    [
        {"name": "pretrain"},
        {"version": 2},
        {"settings": {"side": 97, "captions": {"least": 2, "most": 9}}},
        {"settings": {"side": 96, "captions": {"least": 2, "most": 10}}},
        {"inputs": {"corpus": "abc", "extra": "xyz"}},
        {"inputs": {"corpus": "abc", "other": "def"}},
        {"inputs": {}},
    ],
)
def test_identity_changes_with_each_part(change: dict[str, Any]) -> None:
    assert stage(**change).identity != stage().identity


def test_run_builds_once_and_then_returns_what_was_committed(tmp_path: Path) -> None:
    calls = []

    def build(uri: str) -> dict[str, Any]:
        calls.append(uri)
        write_bytes(join(uri, "data"), b"1")
        return {"fingerprint": "f", "rows": 7}

    one = stage(build=build)
    first, second = one.run(str(tmp_path)), one.run(str(tmp_path))
    assert calls == [one.directory(str(tmp_path))]
    assert (first.built, second.built) == (True, False)
    assert second.manifest == first.manifest == read_json(join(first.uri, MANIFEST))
    assert first.manifest == {
        "format": 1,
        "kind": "dataset",
        "identity": one.identity,
        "inputs": {"corpus": "abc", "extra": "def"},
        "fingerprint": "f",
        "rows": 7,
    }
    assert first.build["seconds"] >= 0


def test_manifest_is_published_after_all_else(tmp_path: Path) -> None:
    seen = []

    def build(uri: str) -> dict[str, Any]:
        seen.extend(os.listdir(uri))
        return {"fingerprint": "f"}

    stage(build=build).run(str(tmp_path))
    assert MANIFEST not in seen


def test_build_that_raises_commits_nothing_and_a_rerun_goes_on_from_what_it_left(tmp_path: Path) -> None:
    def build(uri: str) -> dict[str, Any]:
        data = Path(uri) / "shard"
        if not data.exists():
            write_bytes(str(data), b"finished before the failure")
            raise OSError("disk full")
        return {"fingerprint": data.read_text()}

    one = stage(build=build)
    with pytest.raises(OSError, match="disk full"):
        one.run(str(tmp_path))
    with pytest.raises(MissingArtifactError):
        read_artifact(one.directory(str(tmp_path)))
    rerun: Artifact = one.run(str(tmp_path))
    assert (rerun.built, rerun.fingerprint) == (True, "finished before the failure")


def test_stage_of_another_kind_in_its_place_is_refused(tmp_path: Path) -> None:
    stage().run(str(tmp_path))
    with pytest.raises(MisuseError, match="this is a dataset, a training is needed"):
        stage(kind="training").run(str(tmp_path))


# --- exclusive ------------------------------------------------------------------------------------------------------


def enter(uri: str) -> None:
    with exclusive(uri):
        pass


def test_second_live_process_is_told_who_holds_it_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path / "artifact")
    with process_within("exclusive(sys.argv[1])", uri) as process:
        with pytest.raises(BusyArtifactError, match=f"process {process.pid} on .* is building this"):
            enter(uri)
        process.send_signal(signal.SIGKILL)
        process.wait()
        enter(uri)


def test_exclusive_is_given_back_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(str(tmp_path)):
        raise ZeroDivisionError
    enter(str(tmp_path))


def test_exclusive_of_an_object_store_touches_nothing() -> None:
    enter("s3://no-such-bucket-anywhere/artifact")


def test_run_while_another_process_builds_is_refused_without_building(tmp_path: Path) -> None:
    def build(uri: str) -> dict[str, Any]:
        raise AssertionError("built twice at once")

    one = stage(build=build)
    with process_within("exclusive(sys.argv[1])", one.directory(str(tmp_path))), pytest.raises(BusyArtifactError):
        one.run(str(tmp_path))


def test_stage_committed_between_the_look_and_the_lock_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(uri: str) -> dict[str, Any]:
        raise AssertionError("built again")

    one = stage(build=build)

    @contextmanager
    def slow(uri: str) -> Iterator[None]:
        commit(uri, "dataset", {"fingerprint": "theirs"})  # the other process finishes while this one waits
        yield

    monkeypatch.setattr("mmflow.core.artifacts.exclusive", slow)
    assert one.run(str(tmp_path)).fingerprint == "theirs"


def staged(stream: IO[bytes]) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{stream.fileno()}"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_publish_stages_beside_the_target_so_that_the_rename_stays_on_one_disk(tmp_path: Path) -> None:
    with publish(str(tmp_path / "file")) as stream:
        assert staged(stream).parent == tmp_path
