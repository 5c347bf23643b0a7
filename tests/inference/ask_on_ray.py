"""A driver with a Ray of its own: `python -m tests.inference.ask_on_ray STORE PACKAGE DATASET LOG KEY` computes
embeddings and a log, and waits at a row until it is let go."""

from __future__ import annotations

import sys

from mmflow.cluster.local import ensure_ray
from mmflow.dataset.opened import open_dataset
from mmflow.inference.runner import Pool
from mmflow.inference.tasks.embed import ImageEmbeddings
from tests.inference.asking import Logged, ask


def main() -> None:
    store, package, dataset, log, key = sys.argv[1:]
    ensure_ray(num_cpus=2)
    results = (ImageEmbeddings(), Logged(log=log, waits_at=key))
    ask(store, package, open_dataset(dataset), *results, pool=Pool(num_workers=2))


if __name__ == "__main__":
    main()
