"""The shard stage: what tells one dataset from another before it is built, what is fetched first, and what it grows on.

Sources are listed once a run, because what they hold decides about the dataset; a corpus that an artifact holds is
known by its fingerprint and listed only when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pyarrow import fs

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import RecipeError
from mmflow.core.listing import name_below, parent
from mmflow.core.progress import Report
from mmflow.core.storage import filesystem, join
from mmflow.dataset.build import build_dataset
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.grow import find_base, parts_of, read_parts, write_parts
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.sources.config import SourceConfig
from mmflow.sources.records import Unit
from mmflow.sources.sources import list_units

FETCHED = "fetched"  # the workspace's store of images that are URLs, which all its recipes share


def inputs_of_sources(sources: Sequence[SourceConfig], workspace: str) -> dict[str, str]:
    """Fingerprints of the sources' content and of what was fetched for them."""
    from mmflow.fetch.remote_images import known_images

    identity = _identity(listed(sources)[1])
    known = known_images(join(workspace, FETCHED), identity)
    return {"sources": identity} | ({"fetched": known} if known else {})


def inputs_of_evaluation(settings: ShardConfig) -> dict[str, str]:
    """Fingerprints of the datasets that nothing may be like. Raises RecipeError where pixels could not be compared."""
    fingerprints = {}
    for number, uri in enumerate(settings.duplicates.against):
        dataset = open_dataset(uri)
        if settings.duplicates.radius is None and not same_pixels(dataset, settings):
            raise RecipeError(
                f"shard.duplicates.against.{number}: {uri} was built with other settings of images, so equal pictures "
                "have other pixels there; set shard.duplicates.radius, or build it with the same ones"
            )
        fingerprints[f"evaluation {number}"] = dataset.fingerprint
    return fingerprints


def listed(sources: Sequence[SourceConfig]) -> tuple[Sequence[Unit], Sequence[str]]:
    """The sources' units and what tells each from any other; read once a run, however often it is asked for."""
    return _listed(json.dumps([source.model_dump(mode="json") for source in sources]))


@lru_cache(maxsize=4)
def _listed(sources_json: str) -> tuple[Sequence[Unit], Sequence[str]]:
    sources = [SourceConfig.model_validate(fields) for fields in json.loads(sources_json)]
    units = list_units(sources)
    return units, parts_of(units, sources)


def _identity(parts: Sequence[str]) -> str:
    return content_hash(sorted(parts))


def same_pixels(dataset: Dataset, settings: ShardConfig) -> bool:
    """Whether the images of a dataset were made as these settings make them."""
    made = dataset.manifest.get("settings", {}).get("image", {})
    ours = settings.image.model_dump(mode="json")
    return all(made.get(name) == ours[name] for name in ("side", "resize", "background"))


def fetch(
    sources: Sequence[SourceConfig],
    workspace: str,
    settings: ShardConfig,
    start_ray: Callable[[], None],
    report: Report,
) -> None:
    """Fetch the images of the sources that are URLs, where any are not settled; only then is Ray started."""
    from mmflow.fetch.remote_images import fetch_images, is_settled, may_have_urls

    _listed.cache_clear()  # what is there when a run begins is what counts, to its end
    units, parts = listed(sources)
    store, identity = join(workspace, FETCHED), _identity(parts)
    if may_have_urls(units) and not is_settled(store, identity, settings.fetch):
        start_ray()
        fetch_images(store, sources, units, identity, settings.fetch, report)


def build(
    uri: str,
    *,
    sources: Sequence[SourceConfig],
    settings: ShardConfig,
    fetched: str | None,
    inputs: Mapping[str, str],
    progress: Callable[[int, int, str], None],
) -> Mapping[str, Any]:
    """Build the dataset at `uri`, from the shards of a sibling where that has some of the same sources' parts.

    `inputs` are the stage's, but for the sources. Returns the manifest's fields. Ray must be initialised.
    """
    units, parts = listed(sources)
    base = find_base(_siblings(uri), settings, set(parts), inputs) if settings.grow else None
    known = read_parts(base.uri) if base else frozenset()
    fields = build_dataset(
        uri,
        sources=sources,
        units=[unit for unit, part in zip(units, parts, strict=True) if part not in known],
        settings=settings,
        fetched=fetched,
        base=base,
        progress=progress,
    )
    write_parts(uri, parts)
    return fields


def _siblings(uri: str) -> list[str]:
    above = parent(uri)
    system, path = filesystem(above)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    siblings = [join(above, info.base_name) for info in found if info.type == fs.FileType.Directory]
    return [each for each in siblings if each != join(above, name_below(uri, above))]
