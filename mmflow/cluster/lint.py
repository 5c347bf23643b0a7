"""Problems of a Ray cluster launcher file, found before `ray up` spends money or opens a port.

Ray's own schema accepts misspelt provider keys, a missing instance type, a minimum above its maximum and a dashboard
that runs anyone's code. The rules here do not. Each rule is a function from the file's content to messages.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mmflow.core.errors import MisuseError

Config = dict[str, Any]

PROVIDER_KEYS = {  # what ray/autoscaler/_private/<provider>/ of 2.60 reads, beside the keys of every provider
    "aws": ("region", "availability_zone", "security_group", "cloudwatch", "aws_credentials"),
    "gcp": ("region", "availability_zone", "project_id", "gcp_credentials"),
    "local": ("head_ip", "worker_ips", "external_head_ip", "coordinator_address"),
}
COMMON_KEYS = (
    *("type", "module", "use_internal_ips", "use_external_head_ip", "cache_stopped_nodes", "disable_node_updaters"),
    *("disable_launch_config_check", "foreground_node_launch", "worker_liveness_check"),
)
INSTANCE_KEYS = {"aws": "InstanceType", "gcp": "machineType"}
WORLD = ("0.0.0.0/0", "::/0")
TOKEN = re.compile(r"\bRAY_AUTH_MODE=[\"']?token\b")
UNPINNED_RAY = re.compile(r"pip3? install\b[^;&|]*[\s\"']ray(\[[\w,-]*\])?(?=[\s\"'<>;&|]|$)")
RELEASE = re.compile(r"\d+\.\d+\.\d+")
SECRET_VALUES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{20,}|\bhf_\w{20,}|\bxox[abp]-[\w-]{10,}|\bAIza[\w-]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@$]+:[^/\s:@$]+@"
)
SECRET_NAME = re.compile(r"(?:token|secret|password|passwd|api_?key|access_?key|credentials)$", re.IGNORECASE)
ASSIGNED = re.compile(r"\b(\w+)=[\"']?([^\s\"'$`;&|]{6,})")  # NAME=literal; a $VARIABLE or $(command) is no secret
SECRET_FILES = re.compile(
    r"auth_token$|\.aws(/|$)|\.netrc$|\.pem$|id_(rsa|ed25519)$|\.ssh(/|$)|(^|/)\.env$|credentials"
)


def check_cluster(path: str) -> list[str]:
    """What should change in a launcher file, one line each: key, value seen, what to do. Empty if nothing should.

    A line that begins with `warning:` is advice; any other keeps the cluster from starting or from being safe. No cloud
    is asked. Raises MisuseError if there is no file.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise MisuseError(f"{path}: {error.strerror}; give a Ray cluster launcher file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else "?"
        return [f"{path}: line {line}: not YAML ({getattr(error, 'problem', error)}); correct it"]
    provider = config.get("provider") if isinstance(config, dict) else None
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        return ["provider.type: missing; name the cloud: aws, gcp, local, …"]
    complete, problem = _by_ray(config)
    try:
        ours = [message for rule in RULES for message in rule(config, complete)]
    except (AttributeError, TypeError):  # a value of the wrong type, which Ray's schema has reported
        ours = []
    return ([problem] if problem else []) + ours


def _by_ray(config: Config) -> tuple[Config, str]:
    """The file with Ray's defaults filled in, and the first problem that Ray's schema finds."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = config
    try:
        complete = prepare_config(copy.deepcopy(config))
        validate_config(complete)
    except Exception as error:  # asserts, KeyErrors and jsonschema's own: Ray's check promises no type
        place = ".".join(str(key) for key in getattr(error, "absolute_path", ())) or "file"
        reason = str(getattr(error, "message", error)).strip().split("\n")[0]
        if "sum of `min_workers`" in reason:
            return complete, ""  # our own rule names the numbers
        return complete, f"{place}: Ray refuses this: {reason}; see docs.ray.io, cluster YAML configuration options"
    return complete, ""


def _node_types(config: Config) -> Iterator[tuple[str, Config, Config]]:
    """The key of each node type, its settings, and its node_config."""
    for name, node in (config.get("available_node_types") or {}).items():
        yield f"available_node_types.{name}", node, node.get("node_config") or {}


def _commands(config: Config, *keys: str) -> list[str]:
    return [str(command) for key in keys for command in config.get(key) or []]


def worker_counts(config: Config, complete: Config) -> Iterator[str]:
    """Numbers of workers that no autoscaler can satisfy."""
    total = 0
    for key, node, _ in _node_types(config):
        low, high = node.get("min_workers", 0), node.get("max_workers")
        total += low
        if high is not None and low > high:
            yield f"{key}.min_workers: {low} is above max_workers {high}; lower it, or raise max_workers"
    limit = complete.get("max_workers")
    if limit is not None and total > limit:
        yield f"max_workers: {limit}, but the node types' min_workers add up to {total}; raise it to {total} or more"


def provider_keys(config: Config, complete: Config) -> Iterator[str]:
    """Keys that Ray silently ignores."""
    kind = config["provider"]["type"]
    known = (*COMMON_KEYS, *PROVIDER_KEYS.get(kind, ()))
    for key in config["provider"] if kind in PROVIDER_KEYS else ():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"remove it; known are {', '.join(known)}"
            yield f"provider.{key}: Ray's {kind} provider never reads this; {advice}"


def machines(config: Config, complete: Config) -> Iterator[str]:
    """Node types without a machine, which fail only at the first node, or with an outdated or open default."""
    kind = config["provider"]["type"]
    for key, _, machine in _node_types(config):
        instance = INSTANCE_KEYS.get(kind)
        if instance and not machine.get(instance):
            yield f"{key}.node_config.{instance}: missing; name the machine type of these nodes"
        if kind == "aws" and machine.get("ImageId", "latest_dlami").lower() == "latest_dlami":
            yield f"{key}.node_config.ImageId: not set, so Ray starts its AMI of Ubuntu 18.04; name a current AMI"
        if kind == "aws" and not machine.get("SecurityGroupIds") and not machine.get("NetworkInterfaces"):
            missing = f"{key}.node_config.SecurityGroupIds: missing"
            yield f"{missing}, so Ray makes a group with SSH open to 0.0.0.0/0; name a group of your own"


def pinned_versions(config: Config, complete: Config) -> Iterator[str]:
    """Images and Ray versions that change by themselves, until head and workers differ and refuse each other."""
    docker = config.get("docker") or {}
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for key, node, _ in _node_types(config):
        if image := (node.get("docker") or {}).get("worker_image"):
            images[f"{key}.docker.worker_image"] = image
    releases: dict[str, str] = {}
    for key, image in images.items():
        release = RELEASE.search(image.rpartition("/")[2].partition(":")[2])
        if "@sha256:" not in image and not release:
            yield f"{key}: {image} is not pinned; use a release's tag, such as rayproject/ray:2.60.0-py311"
        elif release and "rayproject/ray" in image:
            releases[key] = release.group()
    if len(set(releases.values())) > 1:
        listed = ", ".join(f"{key} {release}" for key, release in releases.items())
        yield f"docker: one cluster, several versions of Ray ({listed}); give all images the same"
    setup = _commands(complete, "setup_commands", "head_setup_commands", "worker_setup_commands")
    for command in dict.fromkeys(setup):
        if "ray-wheels/latest" in command and not images:
            yield "setup_commands: not set, so Ray's default installs a nightly build; pin an image or ray==2.60.0"
        elif UNPINNED_RAY.search(command) and not re.search(r"(-c|--constraint)[ =]", command):
            yield f"setup_commands: `{command}` takes the newest Ray; pin it (ray==2.60.0) or pass --constraint"


def token_and_dashboard(config: Config, complete: Config) -> Iterator[str]:
    """Ray runs any code that reaches its ports, unless every node asks for a token (CVE-2023-48022)."""
    docker = config.get("docker") or {}
    safe = True
    for kind in ("head", "worker"):
        environment = _commands(docker, "run_options", f"{kind}_run_options")
        # Each command has a shell of its own: an export there counts only if it starts Ray itself or writes a profile.
        starts = [line for line in _commands(complete, f"{kind}_start_ray_commands") if "ray start" in line]
        setup = _commands(complete, f"{kind}_setup_commands")
        profiles = [line for line in setup if re.search(r"\.(bashrc|profile|bash_profile)", line)]
        if not any(TOKEN.search(line) for line in [*environment, *starts, *profiles]):
            safe = False
            option = "docker.run_options" if docker else f"{kind}_start_ray_commands"
            yield f"{option}: no RAY_AUTH_MODE=token for the {kind}, so anyone who reaches it runs code there; set it"
    for line in _commands(complete, "head_start_ray_commands"):
        host = re.search(r"--dashboard-host[= ](0\.0\.0\.0|::)(?=\s|$)", line)
        if host and not safe:
            yield (
                f"head_start_ray_commands: --dashboard-host={host[1]} without a token on every node; use"
                " --dashboard-host=127.0.0.1 and `ray dashboard`, or set RAY_AUTH_MODE=token"
            )


def open_ports(config: Config, complete: Config) -> Iterator[str]:
    """Rules of the file that open ports to the internet."""
    group = config["provider"].get("security_group") or {}
    for number, rule in enumerate(group.get("IpPermissions") or []):
        for entry in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]:
            source = entry.get("CidrIp") or entry.get("CidrIpv6")
            if source in WORLD:
                key = f"provider.security_group.IpPermissions.{number}"
                ports = f"{rule.get('FromPort', 'all')}–{rule.get('ToPort', 'all')}"
                yield f"{key}: ports {ports} are open to {source}; name your own network's range"


def secrets(config: Config, complete: Config) -> Iterator[str]:
    """Values that give access: this file is committed, and copied to every node."""
    for key, value in _strings(config):
        match = SECRET_VALUES.search(value)
        secret = match.group() if match else ""
        if not secret and SECRET_NAME.search(key.rpartition(".")[2]) and not value.startswith("$") and len(value) >= 6:
            secret = value
        if not secret:
            secret = next((text for name, text in ASSIGNED.findall(value) if SECRET_NAME.search(name)), "")
        if secret:
            advice = "take it out and revoke it; let the node fetch it with its own role"
            yield f"{key}: holds what looks like a secret ({secret[:4]}…); {advice}"
    for remote, local in (config.get("file_mounts") or {}).items():
        if SECRET_FILES.search(str(local)):
            yield f"file_mounts.{remote}: {local} looks like a secret, copied to every node; fetch it there instead"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, child in items:
        yield from _strings(child, f"{key}.{part}".lstrip("."))
    if isinstance(value, str):
        yield key, value


def head_and_idle(config: Config, complete: Config) -> Iterator[str]:
    """A head that tasks can bring down, and idle nodes that keep costing money."""
    starts = " ".join(_commands(config, "head_start_ray_commands"))
    for key, node, _ in _node_types(config):
        if key != f"available_node_types.{config.get('head_node_type')}" or re.search(r"--num-cpus[= ]0\b", starts):
            continue
        if (node.get("resources") or {}).get("CPU") != 0:
            yield f"warning: {key}.resources.CPU: tasks may run on the head, and its loss ends every job; set CPU: 0"
    if not config.get("idle_timeout_minutes") and config["provider"]["type"] != "local":
        minutes = config.get("idle_timeout_minutes", "not set")
        yield f"idle_timeout_minutes: {minutes}; set after how many minutes an idle node is released, e.g. 10"


RULES: tuple[Callable[[Config, Config], Iterator[str]], ...] = (
    worker_counts,
    provider_keys,
    machines,
    pinned_versions,
    token_and_dashboard,
    open_ports,
    secrets,
    head_and_idle,
)
