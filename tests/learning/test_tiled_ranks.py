"""Ranks in tiles against those of the whole matrix of similarities, with ties, NaN and several captions a picture."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmflow.learning.nearest import nearest_in_tiles
from mmflow.learning.retrieval import QueryRanks, rank_one, rank_several
from mmflow.learning.tiled_ranks import FEW, BothWays, Share, ranks_both_ways, reranked

NAN, INF = float("nan"), float("inf")


def owners(random: np.random.Generator, num_pictures: int, num_more: int, skewed: bool = False) -> NDArray[np.int64]:
    """The picture of each caption, shuffled: one caption each, and more of random pictures or of the first one."""
    more = random.integers(1 if skewed else num_pictures, size=num_more)
    owner = np.concatenate([np.arange(num_pictures), more])
    random.shuffle(owner)
    return owner


def whole_numbers(random: np.random.Generator, num_rows: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Embeddings whose products are exact in any order of addition, and often equal."""
    return random.integers(-2, 3, size=(num_rows, 4)).astype(dtype)


def assert_ranks(found: QueryRanks, expected: QueryRanks) -> None:
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert found.precision == pytest.approx(expected.precision, rel=1e-12)


def assert_equal(found: BothWays, similarity: NDArray[Any], owner: NDArray[np.int64]) -> None:
    assert_ranks(found.text_to_image, rank_one(similarity, owner))
    assert_ranks(found.image_to_text, rank_several(similarity.T, owner))


@given(
    seed=st.integers(0, 2**32),
    num_pictures=st.integers(1, 70),
    num_more=st.integers(0, 150),
    skewed=st.booleans(),
    tile=st.sampled_from([16, 32, 50, None]),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_ranks_equal_those_of_the_whole_matrix(
    seed: int, num_pictures: int, num_more: int, skewed: bool, tile: int | None, dtype: Any
) -> None:
    random = np.random.default_rng(seed)
    owner = owners(random, num_pictures, num_more, skewed)
    texts, images = whole_numbers(random, len(owner), dtype), whole_numbers(random, num_pictures, dtype)
    for rows in (texts, images):  # infinities make some products NaN, and others infinite
        rows[random.random(rows.shape) < random.choice([0, 0.02, 0.3])] = random.choice([NAN, INF, -INF])
    with np.errstate(invalid="ignore"):
        similarity = texts.astype(np.float32) @ images.astype(np.float32).T
    found = ranks_both_ways(texts, images, owner, tile=tile, nearest=3)
    assert_equal(found, similarity, owner)
    chosen = np.argsort(-similarity, axis=1, kind="stable")[:, :3]
    assert found.nearest_AK.tolist() == chosen.tolist()
    assert np.array_equal(found.scores_AK, np.take_along_axis(similarity, chosen, axis=1), equal_nan=True)


@pytest.mark.parametrize("num_captions", [FEW, FEW + 1, 3 * FEW])
@pytest.mark.parametrize("embeddings", [np.asarray, torch.from_numpy])
def test_a_picture_may_have_many_captions(num_captions: int, embeddings: Any) -> None:
    random = np.random.default_rng(num_captions)
    owner = owners(random, 20, num_captions - 1, skewed=True)
    texts, images = whole_numbers(random, len(owner)), whole_numbers(random, 20)
    found = ranks_both_ways(embeddings(texts), embeddings(images), owner, tile=48)
    assert_equal(found, texts @ images.T, owner)


@pytest.mark.parametrize("tile", [16, 37, 64, 1000])
@pytest.mark.parametrize("width", [7, 100, 512])
@pytest.mark.parametrize("num_rows", [6, 14, 150])
def test_equal_embeddings_tie_wherever_they_stand(tile: int, width: int, num_rows: int) -> None:
    """Products that are rounded by their place in a tile would rank a collapsed model anywhere."""
    random = np.random.default_rng(width)
    collapsed = np.tile(random.normal(size=(1, width)).astype(np.float32), (num_rows, 1))
    found = ranks_both_ways(collapsed, collapsed, np.arange(num_rows), tile=tile)
    assert set(found.text_to_image.ranks) == set(found.image_to_text.ranks) == {num_rows}
    twice = np.tile(random.normal(size=(num_rows // 2, width)).astype(np.float32), (2, 1))
    texts = random.normal(size=twice.shape).astype(np.float32)
    ranks = ranks_both_ways(texts, twice, np.arange(num_rows), tile=tile).text_to_image.ranks
    assert (ranks % 2 == 0).all()  # the equal picture counts each time
    assert len(set(ranks)) > 1


def test_wrong_candidates_tie_within_rounding() -> None:
    random = np.random.default_rng(3)
    owner = owners(random, 30, 60)
    texts, images = whole_numbers(random, 90), whole_numbers(random, 30)
    similarity = texts @ images.T
    found = ranks_both_ways(texts, images, owner, tile=32, rounding=1.5, nearest=1)
    assert found.scores_AK[:, 0].tolist() == similarity.max(axis=1).tolist()
    similarity[np.arange(90), owner] -= 1.5
    assert_equal(found, similarity, owner)


@pytest.mark.parametrize("num_workers", [2, 5])
def test_workers_share_the_tiles(num_workers: int) -> None:
    random = np.random.default_rng(4)
    owner = owners(random, 30, 40)
    texts, images = whole_numbers(random, 70), whole_numbers(random, 30)
    barrier = threading.Barrier(num_workers, timeout=60)
    parts: list[torch.Tensor] = [torch.empty(0)] * num_workers

    def work(number: int) -> BothWays:
        def summed(part: torch.Tensor) -> torch.Tensor:
            parts[number] = part
            barrier.wait()
            whole = torch.stack(parts).sum(0)
            barrier.wait()
            return whole

        return ranks_both_ways(texts, images, owner, nearest=2, share=Share(number, num_workers, summed))

    alone = ranks_both_ways(texts, images, owner, nearest=2)
    with ThreadPoolExecutor(num_workers) as workers:
        for found in workers.map(work, range(num_workers)):
            for name, values in vars(alone).items():
                assert getattr(found, name).tolist() == values.tolist(), name


def test_nothing_has_no_ranks() -> None:
    found = ranks_both_ways(np.ones((0, 4)), np.ones((0, 4)), np.zeros(0, np.int64))
    assert len(found.text_to_image.ranks) == len(found.image_to_text.ranks) == 0


def test_a_picture_without_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="picture 1 has no caption"):
        ranks_both_ways(np.ones((2, 4)), np.ones((3, 4)), np.array([0, 2]))


def nearest(similarity_QC: NDArray[np.floating], count: int, axis: int) -> NDArray[np.bool_]:
    """(Q, C): True for the `count` greatest along an axis: 1 for each query's candidates, 0 for each candidate's
    queries. The first of equals comes first."""
    nearest_QC = np.zeros(similarity_QC.shape, dtype=np.bool_)
    kept = range(min(count, similarity_QC.shape[axis]))
    places = np.argsort(-similarity_QC, axis=axis, kind="stable").take(kept, axis=axis)
    np.put_along_axis(nearest_QC, places, True, axis=axis)
    return nearest_QC


def reordered(
    similarity_QC: NDArray[np.floating], scores_QC: NDArray[np.floating], chosen_QC: NDArray[np.bool_]
) -> NDArray[np.floating]:
    """The similarities with scores in place of the chosen ones, lifted above all others: the chosen come first in the
    order of their scores, then the others in the order of their similarity."""
    reordered_QC = similarity_QC.copy()
    scores = scores_QC[chosen_QC]
    if len(scores):
        lift = np.fmax.reduce(similarity_QC, axis=None) + 1 - np.fmin.reduce(scores)
        reordered_QC[chosen_QC] = scores + lift  # a NaN stays NaN, which ranks last
    return reordered_QC


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_reranking_equals_the_reordered_matrix(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    owner = owners(random, 12, 20)
    texts, images = whole_numbers(random, 32), whole_numbers(random, 12)
    similarity = texts @ images.T
    odds = random.integers(0, 4, similarity.shape).astype(np.float64)
    odds[random.random(odds.shape) < 0.1] = NAN
    pictures, _ = nearest_in_tiles(texts, [images], count)
    captions, _ = nearest_in_tiles(images, [texts], count)
    found = reranked(
        ranks_both_ways(texts, images, owner),
        pictures,
        np.take_along_axis(odds, pictures, axis=1),
        captions,
        np.take_along_axis(odds.T, captions, axis=1),
    )
    by_text, by_image = (nearest(similarity, count, axis) for axis in (1, 0))
    to_image = reordered(similarity.astype(np.float64), odds, by_text)
    to_text = reordered(similarity.astype(np.float64), odds, by_image)
    assert_ranks(found.text_to_image, rank_one(to_image, owner))
    assert_ranks(found.image_to_text, rank_several(to_text.T, owner))


MEMORY = """
import numpy as np
from mmflow.learning.tiled_ranks import ranks_both_ways

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

texts, images = np.random.default_rng(0).normal(size=(2, 20_000, 8)).astype(np.float16)
owner = np.arange(20_000) % SHARERS
ranks_both_ways(texts[:1000], images[:1000], np.arange(1000), nearest=5)
before = peak()
ranks_both_ways(texts, images[:SHARERS], owner, nearest=5)
print(peak() - before)
"""


@pytest.mark.parametrize("num_pictures", [20_000, 20])
def test_memory_does_not_grow_with_the_square(num_pictures: int) -> None:
    """The whole matrix would be 1.6 GB; the comparison of all captions of 20 pictures with each other as well."""
    script = MEMORY.replace("SHARERS", str(num_pictures))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100 * 1024  # KiB
