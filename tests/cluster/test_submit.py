"""`mmflow <stage> --submit` against a real head: the same stages, the same artifacts, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mmflow.recipe import load_recipe
from mmflow.stages.loop import Loop
from tests.tiny import tiny_fields, write_recipe, write_shapes


def mmflow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmflow.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_stages_submitted_to_a_cluster_commit_to_the_shared_workspace(
    ray_head: tuple[str, str], tmp_path: Path
) -> None:
    address, token = ray_head
    records = write_shapes(tmp_path / "corpus")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_fields(tmp_path / "workspace", records))
    for stage in ("shard", "pretrain"):
        done = mmflow(stage, recipe, "--submit", address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        assert done.returncode == 0, done.stderr
        artifact = Loop(load_recipe(recipe)).committed(stage)
        assert artifact.uri in done.stdout
        assert f"submitted job {stage}-{artifact.manifest['identity']}-a1" in done.stderr
        assert token not in done.stderr + done.stdout
    again = mmflow("pretrain", recipe, "--submit", address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert again.returncode == 0
    assert "submitted" not in again.stderr
