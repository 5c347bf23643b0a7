"""`mmflow search`: the rows of scores that are nearest to a text or a picture, as a table, JSON or a page."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmflow.core.errors import MmflowError

if TYPE_CHECKING:
    from mmflow.dataset.reader import Sample
    from mmflow.inference.search import Hit

NOTHING = "-"


def search(
    scores: Annotated[
        str, typer.Argument(metavar="SCORES", help="Scores, or a workspace with some: a directory or URI.")
    ],
    query: Annotated[str, typer.Argument(metavar="TEXT|PICTURE", help="Words, or the path or URI of a picture.")],
    side: Annotated[Literal["pictures", "captions"], typer.Option("--in", help="What is searched.")] = "pictures",
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    page: Annotated[
        str | None, typer.Option("--page", metavar="FILE", help="Write an HTML page with pictures there.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="DIRECTORY", help="Search with an index kept there, for millions of rows."),
    ] = None,
) -> None:
    """Find the pictures or captions of scored datasets that are most similar to a text or a picture.

    Every row is compared. With --index, an eighth of them: the first search builds the index, later ones read it, and
    one of a dataset that has grown adds what is new.
    """
    from mmflow.core.progress import progress
    from mmflow.inference import search as exact
    from mmflow.inference.scores import open_scores
    from mmflow.inference.search_index import WORTHWHILE_ROWS, open_index

    asked = exact.read_query(query)
    opened = open_scores(scores)
    query_W = exact.embed_query(opened, asked, width := opened.width(side))
    began = time.monotonic()
    with progress("search") as report:
        if index is None:
            best = exact.search(opened, side, query_W, top, report)
        else:
            best = open_index(index, opened, side, width, report).search(query_W, top)
    seconds = time.monotonic() - began
    if index is None and opened.rows > WORTHWHILE_ROWS:
        _note(
            f"compared {opened.rows:,} rows in {seconds:.0f} s; --index DIRECTORY builds an index once, then is faster"
        )
    hits = exact.hits_of(opened, best)
    samples = exact.read_samples(opened, hits)
    for problem in dict.fromkeys(str(sample) for sample in samples if isinstance(sample, MmflowError)):
        _note(problem)
    if page is not None:
        from mmflow.report.search_page import write_page

        write_page(page, opened, asked, side, hits, samples)
        _note(page) if as_json else print(page)
    if as_json:
        found = [_fields(hit, sample) for hit, sample in zip(hits, samples, strict=True)]
        facts = {"scores": opened.uri, "query": query, "in": side, "rows": opened.rows, "exact": index is None}
        print(json.dumps(facts | {"found": found}, ensure_ascii=False, indent=2))
    elif page is None:
        _print_table(hits, samples, several=len(opened.datasets) > 1)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fields(hit: Hit, sample: Sample | MmflowError) -> dict[str, Any]:
    from dataclasses import asdict

    captions = [] if isinstance(sample, MmflowError) else [caption.text for caption in sample.captions]
    return asdict(hit) | {"captions": captions}


def _print_table(hits: Sequence[Hit], samples: Sequence[Sample | MmflowError], *, several: bool) -> None:
    """Aligned on a terminal; elsewhere with tabs."""
    heads = ["rank", "score", *(["dataset"] if several else []), "split", "key", "caption"]
    rows = []
    for hit, sample in zip(hits, samples, strict=True):
        captions = () if isinstance(sample, MmflowError) else sample.captions
        caption = captions[0].text if captions else NOTHING
        source = [hit.dataset] if several else []
        rows.append([str(hit.rank), f"{hit.score:.3f}", *source, hit.split, hit.key, caption])
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in [heads, *rows]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head in ("rank", "score") else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
