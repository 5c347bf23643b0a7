"""What is wrong with a Ray cluster launcher file, told before `ray up` spends money or opens a port.

Ray's own schema accepts misspelt provider keys, a missing instance type, a minimum above its maximum and a dashboard
that runs anyone's code; the rules here do not. Each rule is a function from the file's content to messages.
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

COMMON_KEYS = ["type", "module", "use_internal_ips", "cache_stopped_nodes", "disable_node_updaters"]
COMMON_KEYS += [
    "disable_launch_config_check",
    "foreground_node_launch",
    "worker_liveness_check",
    "use_external_head_ip",
]
PROVIDER_KEYS = {  # what ray/autoscaler/_private/<provider>/ of 2.60 reads
    "aws": ("region", "availability_zone", "security_group", "cloudwatch", "aws_credentials"),
    "gcp": ("region", "availability_zone", "project_id", "gcp_credentials"),
    "local": ("head_ip", "worker_ips", "external_head_ip", "coordinator_address"),
}
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
ASSIGNED = re.compile(r"\b(\w+)=[\"']?([^\s\"'$`;&|]{6,})")  # NAME=literal; a $VARIABLE or $(command) holds no secret
SECRET_FILES = re.compile(
    r"auth_token$|\.aws(/|$)|\.netrc$|\.pem$|id_(rsa|ed25519)$|\.ssh(/|$)|(^|/)\.env$|credentials"
)


def check_cluster(path: str) -> list[str]:
    """What should change in a launcher file, one line each: key, value seen, what to do. Empty where it is sound.

    A line that starts with `warning:` is advice; any other keeps the cluster from starting, or from being safe.
    Offline: no cloud is asked. Raises MisuseError where there is no file.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise MisuseError(f"{path}: {error.strerror}; give a Ray cluster launcher file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return [
            f"{path}: line {mark.line + 1 if mark else '?'}: not YAML ({getattr(error, 'problem', error)}); mend it"
        ]
    provider = config.get("provider") if isinstance(config, dict) else None
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        return ["provider.type: missing; name the cloud: aws, gcp, local, …"]
    complete, schema = _by_ray(config)
    try:
        ours = [message for rule in RULES for message in rule(config, complete)]
    except (AttributeError, TypeError):  # a value of another type than the rules read, of which the schema has spoken
        ours = []
    return ([schema] if schema else []) + ours


def _by_ray(config: Config) -> tuple[Config, str]:
    """The file with Ray's defaults filled in, and the first complaint of Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = config
    try:
        complete = prepare_config(copy.deepcopy(config))
        validate_config(complete)
    except Exception as error:  # asserts, KeyErrors and jsonschema's own: Ray's check promises no type
        place = ".".join(str(key) for key in getattr(error, "absolute_path", ())) or "file"
        said = str(getattr(error, "message", error)).strip().split("\n")[0]
        if "sum of `min_workers`" in said:
            return complete, ""  # our own rule says it with the numbers
        return complete, f"{place}: Ray refuses this: {said}; see docs.ray.io, cluster YAML configuration options"
    return complete, ""


def _node_types(config: Config) -> dict[str, Config]:
    return dict(config.get("available_node_types") or {})


def _commands(config: Config, *keys: str) -> list[str]:
    return [str(command) for key in keys for command in config.get(key) or []]


def worker_counts(config: Config, complete: Config) -> Iterator[str]:
    """Numbers of workers that no autoscaler can satisfy."""
    total = 0
    for name, node in _node_types(config).items():
        low, high = node.get("min_workers", 0), node.get("max_workers")
        total += low
        if high is not None and low > high:
            place = f"available_node_types.{name}.min_workers"
            yield f"{place}: {low} is above max_workers {high}; lower it, or raise max_workers"
    limit = complete.get("max_workers")
    if limit is not None and total > limit:
        yield f"max_workers: {limit}, but the node types' min_workers add up to {total}; raise it to {total} or more"


def provider_keys(config: Config, complete: Config) -> Iterator[str]:
    """Keys that Ray ignores in silence, so that what they were to set never happens."""
    kind = config["provider"]["type"]
    known = (*COMMON_KEYS, *PROVIDER_KEYS.get(kind, ()))
    for key in config["provider"] if kind in PROVIDER_KEYS else ():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"remove it; known are {', '.join(known)}"
            yield f"provider.{key}: Ray's {kind} provider never reads this; {advice}"


def instance_types(config: Config, complete: Config) -> Iterator[str]:
    """Node types without a machine, which fail only when the first node is asked for."""
    key = INSTANCE_KEYS.get(config["provider"]["type"])
    for name, node in _node_types(config).items():
        if key and not (node.get("node_config") or {}).get(key):
            yield f"available_node_types.{name}.node_config.{key}: missing; name the machine type of these nodes"


def pinned_versions(config: Config, complete: Config) -> Iterator[str]:
    """Images and Rays that change by themselves, until head and workers differ and refuse each other."""
    docker = config.get("docker") or {}
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for name, node in _node_types(config).items():
        if image := (node.get("docker") or {}).get("worker_image"):
            images[f"available_node_types.{name}.docker.worker_image"] = image
        machine = node.get("node_config") or {}
        if config["provider"]["type"] == "aws" and machine.get("ImageId", "latest_dlami").lower() == "latest_dlami":
            place = f"available_node_types.{name}.node_config.ImageId"
            yield f"{place}: not set, so Ray starts its built-in AMI of Ubuntu 18.04; name a current AMI"
    releases: dict[str, str] = {}
    for place, image in images.items():
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and not RELEASE.search(tag):
            yield f"{place}: {image} is not pinned; use a release's tag, such as rayproject/ray:2.60.0-py311"
        elif "rayproject/ray" in image and (release := RELEASE.search(tag)):
            releases[place] = release.group()
    if len(set(releases.values())) > 1:
        seen = ", ".join(f"{place} {release}" for place, release in releases.items())
        yield f"docker: one cluster, several versions of Ray ({seen}); give all images the same"
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
        # A command has its own shell: what it exports lasts only where it starts Ray itself or writes a profile.
        starts = [line for line in _commands(complete, f"{kind}_start_ray_commands") if "ray start" in line]
        setup = _commands(complete, f"{kind}_setup_commands")
        profiles = [line for line in setup if re.search(r"\.(bashrc|profile|bash_profile)", line)]
        if not any(TOKEN.search(line) for line in [*environment, *starts, *profiles]):
            safe = False
            option = "docker.run_options" if docker else f"{kind}_start_ray_commands"
            yield f"{option}: no RAY_AUTH_MODE=token for the {kind}, so whoever reaches it runs code there; set it"
    for line in _commands(complete, "head_start_ray_commands"):
        host = re.search(r"--dashboard-host[= ](\S+)", line)
        if host and host.group(1) in ("0.0.0.0", "::") and not safe:
            yield (
                f"head_start_ray_commands: --dashboard-host={host.group(1)} without a token on every node; use"
                " --dashboard-host=127.0.0.1 and `ray dashboard`, or set RAY_AUTH_MODE=token"
            )


def security_groups(config: Config, complete: Config) -> Iterator[str]:
    """Ports open to the internet, by the file's rules or by Ray's default."""
    provider = config["provider"]
    for number, rule in enumerate((provider.get("security_group") or {}).get("IpPermissions") or []):
        ranges = [
            each.get("CidrIp") or each.get("CidrIpv6")
            for key in ("IpRanges", "Ipv6Ranges")
            for each in rule.get(key, [])
        ]
        for seen in ranges:
            if seen in WORLD:
                place = f"provider.security_group.IpPermissions.{number}"
                ports = f"{rule.get('FromPort', 'all')}–{rule.get('ToPort', 'all')}"
                yield f"{place}: ports {ports} are open to {seen}; name your own network's range"
    for name, node in _node_types(config).items() if provider["type"] == "aws" else ():
        machine = node.get("node_config") or {}
        if not machine.get("SecurityGroupIds") and not machine.get("NetworkInterfaces"):
            place = f"available_node_types.{name}.node_config.SecurityGroupIds"
            yield f"{place}: missing, so Ray makes a group with SSH open to 0.0.0.0/0; name a group of your own"


def secrets(config: Config, complete: Config) -> Iterator[str]:
    """Values that give access: this file is committed, and copied to every node."""
    for place, value in _strings(config):
        name = place.rpartition(".")[2]
        found = SECRET_VALUES.search(value)
        if not found and SECRET_NAME.search(name) and not value.startswith("$") and len(value) >= 6:
            found = re.match(r".+", value)
        seen = found.group() if found else next((v for k, v in ASSIGNED.findall(value) if SECRET_NAME.search(k)), "")
        if seen:
            advice = "take it out and revoke it; let the node fetch it with its own role"
            yield f"{place}: holds what looks like a secret ({seen[:4]}…); {advice}"
    for remote, local in (config.get("file_mounts") or {}).items():
        if SECRET_FILES.search(str(local)):
            yield f"file_mounts.{remote}: {local} looks like a secret, copied to every node; fetch it there instead"


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _strings(child, f"{place}.{key}".lstrip("."))
    if isinstance(value, str):
        yield place, value


def head_and_idle(config: Config, complete: Config) -> Iterator[str]:
    """A head that tasks can bring down, and nodes that nobody stops paying for."""
    name = config.get("head_node_type", "")
    head = _node_types(config).get(name, {})
    starts = " ".join(_commands(config, "head_start_ray_commands"))
    if head and (head.get("resources") or {}).get("CPU") != 0 and not re.search(r"--num-cpus[= ]0\b", starts):
        place = f"available_node_types.{name}.resources.CPU"
        yield f"warning: {place}: tasks may run on the head, and its loss ends every job; set CPU: 0"
    if not config.get("idle_timeout_minutes") and config["provider"]["type"] != "local":
        seen = config.get("idle_timeout_minutes", "not set")
        yield f"idle_timeout_minutes: {seen}; say when idle nodes are given back, e.g. 10"


RULES: tuple[Callable[[Config, Config], Iterator[str]], ...] = (
    worker_counts,
    provider_keys,
    instance_types,
    pinned_versions,
    token_and_dashboard,
    security_groups,
    secrets,
    head_and_idle,
)
