"""What is measured inside of the peers' environment, which has no mmflow: `python peers_programs.py NAME JSON`."""

import json
import sys
import time


def faiss_range_search(hashes: str, queries: int, radius: int, threads: int) -> dict[str, float]:
    """Pairs within the radius between the first `queries` hashes and all, by faiss's exhaustive binary index."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(threads)
    codes = np.load(hashes).view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryFlat(64)
    index.add(codes)
    began = time.perf_counter()
    # faiss's radius is exclusive.
    limits, _, labels = index.range_search(codes[:queries], radius + 1)
    seconds = time.perf_counter() - began
    own = np.repeat(np.arange(queries), np.diff(limits).astype(np.int64))
    return {"seconds": seconds, "pairs": int((labels > own).sum())}


if __name__ == "__main__":
    print(json.dumps({"faiss_range_search": faiss_range_search}[sys.argv[1]](**json.loads(sys.argv[2]))))
