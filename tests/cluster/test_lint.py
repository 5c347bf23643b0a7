"""Each rule reports its own fault and no other; cluster.yaml has none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmflow.cluster.lint import check_cluster
from mmflow.core.errors import MisuseError

OURS = Path(__file__).parents[2] / "cluster.yaml"
Config = dict[str, Any]


def lint(config: object, folder: Path) -> list[str]:
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    return check_cluster(str(path))


def put(*keys: str, to: object) -> Callable[[Config], None]:
    """An edit that sets config[key][key]… to a value."""

    def edit(config: Config) -> None:
        for key in keys[:-1]:
            config = config.setdefault(key, {})
        config[keys[-1]] = to

    return edit


def drop(*keys: str) -> Callable[[Config], None]:
    """An edit that removes config[key][key]…"""

    def edit(config: Config) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return edit


def open_dashboard_without_token(config: Config) -> None:
    config["docker"]["run_options"].remove("--env RAY_AUTH_MODE=token")
    config["head_start_ray_commands"] = ["ray start --head --dashboard-host=0.0.0.0"]


def token_of_the_head_only(config: Config) -> None:
    config["docker"]["run_options"].remove("--env RAY_AUTH_MODE=token")
    config["docker"]["head_run_options"] = ["-e RAY_AUTH_MODE=token"]


def token_in_another_shell(config: Config) -> None:
    token_of_the_head_only(config)
    config["worker_start_ray_commands"].insert(0, "export RAY_AUTH_MODE=token")


def no_docker_and_default_setup(config: Config) -> None:
    for key in ("docker", "setup_commands", "head_setup_commands"):
        del config[key]
    for node in config["available_node_types"].values():
        node.pop("docker", None)


def tasks_on_the_head(config: Config) -> None:
    config["available_node_types"]["head"]["resources"] = {}
    config["head_start_ray_commands"] = ["ray start --head --port=6379"]


TYPES = "available_node_types"
AWS_KEY = "AKIA" + "ABCDEFGHIJKLMNOP"  # in two parts, so that no scanner takes this file for a leak
WORLD = [{"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
NO_TOKEN = "no RAY_AUTH_MODE=token for the "
SETUP, IMAGE = "setup_commands", ("docker", "image")
FAULTS: list[tuple[Callable[[Config], None], list[str]]] = [
    (put("max_wokers", to=3), ["Ray refuses this: Additional properties are not allowed ('max_wokers'"]),
    (put("idle_timeout_minutes", to="ten"), ["idle_timeout_minutes: Ray refuses this: 'ten' is not of type 'number'"]),
    (put("head_node_type", to="haed"), ["Ray refuses this: `head_node_type` must be one of"]),
    (put("provider", "type", to="awz"), ["Ray refuses this: Unsupported node provider: awz"]),
    (put(TYPES, "data", "min_workers", to=17), [f"{TYPES}.data.min_workers: 17 is above max_workers 16; lower it"]),
    (put("max_workers", to=-1), ["max_workers: Ray refuses this: -1", "max_workers: -1, but"]),
    (put("provider", "regoin", to="x"), ["provider.regoin: Ray's aws provider never reads this; did you mean region?"]),
    (put("provider", "colour", to="x"), ["provider.colour: Ray's aws provider never reads this; remove it; known are"]),
    (drop(TYPES, "data", "node_config", "InstanceType"), [f"{TYPES}.data.node_config.InstanceType: missing"]),
    (drop(TYPES, "data", "node_config", "ImageId"), [f"{TYPES}.data.node_config.ImageId: not set"]),
    (put(*IMAGE, to="rayproject/ray:latest-py311"), ["docker.image: rayproject/ray:latest-py311 is not pinned"]),
    (put(*IMAGE, to="host:5000/ray"), ["docker.image: host:5000/ray is not pinned; use a release's tag"]),
    (put(*IMAGE, to="rayproject/ray:2.59.0-py311"), ["docker: one cluster, several versions of Ray (docker"]),
    (put(SETUP, to=["pip install -U 'ray[default]'"]), ["setup_commands: `pip install -U 'ray[default]'`"]),
    (token_of_the_head_only, [f"docker.run_options: {NO_TOKEN}worker"]),
    (token_in_another_shell, [f"docker.run_options: {NO_TOKEN}worker"]),
    (
        open_dashboard_without_token,
        [f"{NO_TOKEN}head", f"{NO_TOKEN}worker", "--dashboard-host=0.0.0.0 without a token"],
    ),
    (no_docker_and_default_setup, ["setup_commands: not set", f"{NO_TOKEN}head", f"{NO_TOKEN}worker"]),
    (
        put("provider", "security_group", to={"IpPermissions": WORLD}),
        ["IpPermissions.0: ports 8265–8265 are open to 0"],
    ),
    (drop(TYPES, "train", "node_config", "SecurityGroupIds"), [f"{TYPES}.train.node_config.SecurityGroupIds: missing"]),
    (
        put("provider", "aws_credentials", to={"id": AWS_KEY}),
        ["aws_credentials.id: holds what looks like a secret (AKIA"],
    ),
    (put(SETUP, to=["export HF_TOKEN=abcdef123"]), ["setup_commands.0: holds what looks like a secret (abcd…)"]),
    (put(SETUP, to=["git clone https://ada:hunter2@git/x"]), ["setup_commands.0: holds what looks like a secret"]),
    (put("file_mounts", "/home/ray/.aws", to="~/.aws"), ["file_mounts./home/ray/.aws: ~/.aws looks like a secret"]),
    (put("file_mounts", "/t", to="~/.ray/auth_token"), ["file_mounts./t: ~/.ray/auth_token looks like a secret"]),
    (tasks_on_the_head, [f"warning: {TYPES}.head.resources.CPU: tasks may run on the head"]),
    (drop("idle_timeout_minutes"), ["idle_timeout_minutes: not set"]),
]


def test_our_cluster_file_is_sound() -> None:
    assert check_cluster(str(OURS)) == []


@pytest.mark.parametrize(("edit", "expected"), FAULTS, ids=[expected[0][:60] for _, expected in FAULTS])
def test_a_fault_is_reported_and_nothing_else(
    edit: Callable[[Config], None], expected: list[str], tmp_path: Path
) -> None:
    config = copy.deepcopy(yaml.safe_load(OURS.read_text()))
    edit(config)
    messages = lint(config, tmp_path)
    assert len(messages) == len(expected), messages
    for message, part in zip(messages, expected, strict=True):
        assert part in message
        assert "\n" not in message
        assert not any(secret in message for secret in ("hunter2", AWS_KEY)), "a secret is not repeated"


@pytest.mark.parametrize(
    "edit",
    [
        put(*IMAGE, to="rayproject/ray@sha256:" + "0" * 64),
        put(*IMAGE, to="registry.example:5000/mmflow:1.4.2"),
        put(SETUP, to=["pip install 'ray[default]==2.60.0'", "pip install -c pins.txt ray", "pip install raydp"]),
        put(SETUP, to=["export HF_TOKEN=$(cat /run/hf)", "export RAY_AUTH_TOKEN_PATH=/run/token"]),
        put("head_start_ray_commands", to=["ray start --head --num-cpus=0 --dashboard-host=0.0.0.0"]),
    ],
)
def test_sound_variant_is_silent(edit: Callable[[Config], None], tmp_path: Path) -> None:
    config = yaml.safe_load(OURS.read_text())
    edit(config)
    assert lint(config, tmp_path) == []


def test_minimum_above_the_global_maximum_is_reported_once_with_the_numbers(tmp_path: Path) -> None:
    config = yaml.safe_load(OURS.read_text())
    config["max_workers"] = 10
    config[TYPES]["data"]["min_workers"] = config[TYPES]["train"]["min_workers"] = 8
    assert lint(config, tmp_path) == [
        "max_workers: 10, but the node types' min_workers add up to 16; raise it to 16 or more"
    ]


def test_local_and_gcp_clusters_have_keys_of_their_own(tmp_path: Path) -> None:
    docker = {"image": "rayproject/ray:2.60.0", "container_name": "ray", "run_options": ["-e RAY_AUTH_MODE=token"]}
    local = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    config: Config = {"cluster_name": "office", "docker": docker, "provider": local}
    assert lint(config, tmp_path) == []
    config["provider"]["head_ipp"] = "10.0.0.1"
    assert lint(config, tmp_path) == ["provider.head_ipp: Ray's local provider never reads this; did you mean head_ip?"]
    config["provider"] = {"type": "gcp", "region": "us-west1", "InstanceType": "n2-standard-8"}
    assert any(message.startswith("provider.InstanceType: Ray's gcp provider") for message in lint(config, tmp_path))


@pytest.mark.parametrize("content", ["a: [", "", "[]", "provider: aws", "provider: {type: 3}", "provider: {type: aws}"])
def test_what_is_no_cluster_file_is_reported_without_a_traceback(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert check_cluster(str(path))
    path.write_text("cluster_name: x\nprovider: {type: aws, region: r}\navailable_node_types: [1]\ndocker: 3\n")
    assert "Ray refuses this" in check_cluster(str(path))[0]


def test_missing_file_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="No such file or directory; give a Ray cluster launcher file"):
        check_cluster(str(tmp_path / "none.yaml"))
