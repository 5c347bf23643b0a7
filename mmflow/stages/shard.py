"""Stage `shard`: records to a dataset. Its identity depends on what the sources hold, so they are listed and their
images are fetched before it is planned. A corpus made by stage `corpus` is known by its fingerprint instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage, content_hash
from mmflow.core.errors import RecipeError, named
from mmflow.core.progress import progress
from mmflow.core.storage import filesystem, join
from mmflow.stages import Inputs, LoopStage, Manifest

if TYPE_CHECKING:
    from mmflow.dataset.config import ShardConfig
    from mmflow.recipe import Recipe
    from mmflow.sources.config import SourceConfig
    from mmflow.sources.records import Unit

FETCHED = "fetched"  # the workspace's store of images that are URLs, shared by all its recipes


def _check(recipe: Recipe) -> None:
    from mmflow.core.listing import find

    for number, source in enumerate(recipe.shard.sources):
        with named(f"shard.sources.{number}.uri"):
            find(source.uri)


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.corpora import corpora_of, sources_of
    from mmflow.dataset.grow import SOURCES, settings_of_build

    settings = recipe.shard
    sources = settings.sources
    fingerprints = _evaluated_datasets(settings)
    if recipe.corpus is not None:
        sources = sources_of(inputs["corpus"].uri, corpora_of(recipe.corpus))
        fingerprints["corpus"] = inputs["corpus"].fingerprint
    else:
        fingerprints |= {SOURCES: _identity(_listed(sources)[1]), **_fetched(sources, recipe.workspace)}

    def build(uri: str) -> Manifest:
        from mmflow.cluster.local import ensure_ray

        ensure_ray(num_cpus=1)
        fetched = join(recipe.workspace, FETCHED) if "fetched" in fingerprints else None
        others = {name: value for name, value in fingerprints.items() if name != SOURCES}
        return _build(uri, sources, settings, fetched, others)

    def tidy(uri: str) -> None:
        from mmflow.cleaning.prepare import remove_pieces

        remove_pieces(uri)

    return Stage(
        name="shard",
        kind="dataset",
        version=3,
        settings=settings_of_build(settings),
        inputs=fingerprints,
        build=build,
        tidy=tidy,
    )


def _build(
    uri: str, sources: Sequence[SourceConfig], settings: ShardConfig, fetched: str | None, inputs: Mapping[str, str]
) -> Manifest:
    """Build the dataset, from the shards of an earlier one where that has some parts of the same sources and was built
    from the same `inputs`."""
    from mmflow.dataset.build import build_dataset
    from mmflow.dataset.grow import find_base, read_parts, write_parts

    units, parts = _listed(sources)
    base = find_base(_siblings(uri), settings, set(parts), inputs) if settings.grow else None
    known = read_parts(base.uri) if base else frozenset()
    with progress("shard") as report:
        fields = build_dataset(
            uri,
            sources=sources,
            units=[unit for unit, part in zip(units, parts, strict=True) if part not in known],
            settings=settings,
            fetched=fetched,
            base=base,
            progress=report,
        )
    write_parts(uri, parts)
    return fields


def _siblings(uri: str) -> list[str]:
    """The other artifacts of this stage in the workspace."""
    from pyarrow import fs

    from mmflow.core.listing import name_below, parent

    above = parent(uri)
    system, path = filesystem(above)
    entries = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = [entry.base_name for entry in entries if entry.type == fs.FileType.Directory]
    return [join(above, name) for name in names if name != name_below(uri, above)]


# --- what it is made from -------------------------------------------------------------------------------------------


def _listed(sources: Sequence[SourceConfig]) -> tuple[Sequence[Unit], Sequence[str]]:
    """The sources' units and a fingerprint of each; listed once a run, because a listing reads every file."""
    return _listed_once(json.dumps([source.model_dump(mode="json") for source in sources]))


@lru_cache(maxsize=4)
def _listed_once(sources_json: str) -> tuple[Sequence[Unit], Sequence[str]]:
    from mmflow.dataset.grow import parts_of
    from mmflow.sources.config import SourceConfig
    from mmflow.sources.sources import list_units

    sources = [SourceConfig.model_validate(fields) for fields in json.loads(sources_json)]
    units = list_units(sources)
    return units, parts_of(units, sources)


def _identity(parts: Sequence[str]) -> str:
    return content_hash(sorted(parts))


def _fetched(sources: Sequence[SourceConfig], workspace: str) -> dict[str, str]:
    """The fingerprint of the images that were fetched for the sources, if there are any."""
    from mmflow.fetch.job import known_images

    known = known_images(join(workspace, FETCHED), _identity(_listed(sources)[1]))
    return {"fetched": known} if known else {}


def _evaluated_datasets(settings: ShardConfig) -> dict[str, str]:
    """Fingerprints of the datasets of `duplicates.against`. Raises RecipeError where pixels could not be compared."""
    from mmflow.dataset.opened import open_dataset

    fingerprints = {}
    for number, uri in enumerate(settings.duplicates.against):
        dataset = open_dataset(uri)
        theirs, ours = dataset.manifest.get("settings", {}).get("image", {}), settings.image.model_dump(mode="json")
        same_pixels = all(theirs.get(name) == ours[name] for name in ("side", "resize", "background"))
        if settings.duplicates.radius is None and not same_pixels:
            raise RecipeError(
                f"shard.duplicates.against.{number}: {uri} was built with other image settings, so equal pictures have "
                "other pixels there; set shard.duplicates.radius, or rebuild it with these settings"
            )
        fingerprints[f"evaluation {number}"] = dataset.fingerprint
    return fingerprints


def _fetch(recipe: Recipe) -> None:
    """Fetch the sources' images that are URLs, unless that is done already. Ray is started only if there is work."""
    if recipe.corpus is not None:
        return
    from mmflow.cluster.local import ensure_ray
    from mmflow.fetch.job import fetch_images, is_settled, may_have_urls

    _listed_once.cache_clear()  # a run uses the files that were there when it began
    sources, settings = recipe.shard.sources, recipe.shard.fetch
    units, parts = _listed(sources)
    store, identity = join(recipe.workspace, FETCHED), _identity(parts)
    if may_have_urls(units) and not is_settled(store, identity, settings):
        ensure_ray(num_cpus=1)
        with progress("fetch") as report:
            fetch_images(store, sources, units, identity, settings, report)


def _summary(manifest: Manifest) -> str:
    totals, shards = manifest["totals"], sum(1 for shard in manifest["shards"] if shard["samples"])
    return f"{totals['samples']:,} samples in {shards} shards, {totals['quarantined']:,} records quarantined"


SHARD = LoopStage(
    purpose="Clean a corpus and shard it into a dataset of WebDataset tars.",
    inputs=("corpus",),
    check=_check,
    prepare=_fetch,
    plan=_plan,
    summary=_summary,
)
