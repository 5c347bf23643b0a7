"""Exact ranks between captions and pictures from their embeddings: every similarity is computed once, in tiles, and
counted for the caption and for the picture. Memory grows with the number of captions and pictures, not with its square.

Ties and NaN count against the model as in `learning/retrieval.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.learning.nearest import Nearest
from mmflow.learning.retrieval import QueryRanks, ranks_of_several
from mmflow.learning.tiles import Blocks, Buffer, Embeddings, similarity_tile

# Shapes: A captions, N pictures, W the width of the embeddings; T captions and P pictures of a tile, R right pairs of a
# tile, D captions of distinct pictures; K nearest; Q queries, which are captions or pictures.

FEW = 64  # captions of a picture that are compared one by one: more are found sooner in a sorted column of the tile


@dataclass(frozen=True)
class Share:
    """A worker's part of the tiles, when several workers have the same embeddings and share the work."""

    number: int = 0
    of: int = 1
    sum: Callable[[Tensor], Tensor] = lambda part: part
    """The sum of all workers' tensors."""


WHOLE = Share()


@dataclass(frozen=True)
class BothWays:
    """Where captions find their picture, and pictures their captions."""

    picture_of_text_A: NDArray[np.int64]
    pictures_before_A: NDArray[np.int64]
    """How many wrong pictures come before a caption's own."""
    texts_before_A: NDArray[np.int64]
    """How many wrong captions come before a caption when its picture looks for it."""
    nearest_AK: NDArray[np.int64]
    """Each caption's nearest pictures, the best first."""
    scores_AK: NDArray[np.float32]
    """Their similarities."""

    @property
    def text_to_image(self) -> QueryRanks:
        """Ranks of captions that look for their picture, in their order."""
        ranks_A = 1 + self.pictures_before_A
        return QueryRanks(ranks_A, 1 / ranks_A)

    @property
    def image_to_text(self) -> QueryRanks:
        """Ranks of pictures that look for one of their captions, in their order."""
        return ranks_of_several(self.texts_before_A, self.picture_of_text_A)


@torch.no_grad()
def ranks_both_ways(
    texts_AW: Embeddings,
    images_NW: Embeddings,
    picture_of_text_A: NDArray[np.integer],
    *,
    nearest: int = 0,
    rounding: float = 0.0,
    share: Share = WHOLE,
    tile: int | None = None,
    device: torch.device | str | None = None,
) -> BothWays:
    """Ranks of captions among pictures and of pictures among captions, by scalar products in float32.

    A wrong candidate counts as a tie up to `rounding` below the right one. The `nearest` pictures of each caption come
    from the same pass. A tile has at most `tile` captions and pictures; the device is that of the captions by default.
    Raises ValueError if a picture has no caption.
    """
    owner_A = np.asarray(picture_of_text_A, dtype=np.int64)
    captions_of_N = np.bincount(owner_A, minlength=len(images_NW))
    if not captions_of_N.all():
        raise ValueError(f"picture {captions_of_N.argmin()} has no caption: leave it out")
    order_A = np.argsort(owner_A, kind="stable")
    texts = Blocks(texts_AW, tile=tile, device=device, order_R=order_A, at_least=share.of)
    images = Blocks(images_NW, tile=tile, device=texts.device)
    tiles = _Tiles(texts, images, owner_A[order_A], captions_of_N)
    own_blocks = range(share.number, len(texts), share.of)
    right_A = share.sum(tiles.right_scores(own_blocks)) - rounding
    right_A[right_A.isnan()] = -torch.inf  # nothing is below it either
    parts = tiles.compare(own_blocks, right_A, nearest)
    pictures_A, texts_A, nearest_AK, scores_AK = (share.sum(part).cpu().numpy() for part in parts)
    place_A = np.argsort(order_A)
    return BothWays(
        picture_of_text_A=owner_A,
        pictures_before_A=(pictures_A - 1)[place_A],  # without the right one itself
        texts_before_A=(texts_A - _right_not_below(right_A.cpu().numpy(), tiles.owner_A))[place_A],
        nearest_AK=nearest_AK[place_A],
        scores_AK=scores_AK[place_A],
    )


class _Tiles:
    """All similarities, tile by tile. Captions are sorted by picture, so that few tiles hold right pairs."""

    def __init__(
        self, texts: Blocks, images: Blocks, owner_A: NDArray[np.int64], captions_of_N: NDArray[np.int64]
    ) -> None:
        self.owner_A = owner_A  # the picture of each caption, ascending
        self._texts, self._images, self._captions_of_N = texts, images, captions_of_N
        self._first_N = np.cumsum(captions_of_N) - captions_of_N  # each picture's first caption
        self._scores, self._flags = Buffer(texts.device), Buffer(texts.device)

    def right_scores(self, text_blocks: range) -> Tensor:
        """(A,) float32: the similarity of each caption and its picture; 0 outside the blocks.

        A tile's product is repeated in `compare`: a row's own scalar product would be rounded otherwise, and would not
        tie with equal pictures.
        """
        right_A = torch.zeros(len(self.owner_A), device=self._texts.device)
        for text_block in text_blocks:
            text_TW = self._texts[text_block]
            start, end = self._texts.bounds[text_block]
            for image_block in np.unique(self.owner_A[start:end] // self._images.size).tolist():
                captions, places_R = self._right_pairs(text_block, image_block)
                right_A[captions] = self._tile(text_TW, text_block, image_block)[places_R]
        return right_A

    def compare(self, text_blocks: range, right_A: Tensor, nearest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (A,) and captions (A,) that are not below each right pair, the right ones among them; places and
        scores (A, K) of each caption's nearest pictures. They have the parts of these blocks, and 0 elsewhere."""
        pictures_A = torch.zeros(len(right_A), dtype=torch.int64, device=right_A.device)
        texts_A = torch.zeros_like(pictures_A)
        num_nearest = min(nearest, len(self._captions_of_N))
        nearest_AK = pictures_A.new_zeros(len(right_A), num_nearest)
        scores_AK = right_A.new_zeros(len(right_A), num_nearest)
        few = [list(self._few(image_block)) for image_block in range(len(self._images))]
        many = [list(self._many(image_block)) for image_block in range(len(self._images))]
        for text_block in text_blocks:
            text_TW, rows = self._texts[text_block], slice(*self._texts.bounds[text_block])
            best = Nearest(rows.stop - rows.start, nearest, right_A.device)
            for image_block in range(len(self._images)):
                scores_TP = self._tile(text_TW, text_block, image_block)
                best.add(scores_TP)
                captions, places_R = self._right_pairs(text_block, image_block)
                scores_TP[places_R] = right_A[captions]
                pictures_A[rows] += self._num_not_below(scores_TP, right_A[rows, None], axis=1)
                for captions_D, columns_D in few[image_block]:
                    texts_A[captions_D] += self._num_not_below(scores_TP[:, columns_D], right_A[captions_D], axis=0)
                for captions, column in many[image_block]:
                    texts_A[captions] += _num_not_below_several(scores_TP[:, column], right_A[captions])
            nearest_AK[rows], scores_AK[rows] = best.places_QK, best.scores_QK
        return pictures_A, texts_A, nearest_AK, scores_AK

    def _tile(self, text_TW: Tensor, text_block: int, image_block: int) -> Tensor:
        """(T, P) similarities, valid until the next call."""
        scores = similarity_tile(text_TW, self._images[image_block], self._scores)
        (text_start, text_end), (start, end) = self._texts.bounds[text_block], self._images.bounds[image_block]
        return scores[: text_end - text_start, : end - start]

    def _right_pairs(self, text_block: int, image_block: int) -> tuple[slice, tuple[Tensor, Tensor]]:
        """The captions whose picture is in the same tile, and the rows and columns (R,) of these pairs in it."""
        (text_start, text_end), (start, end) = self._texts.bounds[text_block], self._images.bounds[image_block]
        low, high = text_start + np.searchsorted(self.owner_A[text_start:text_end], [start, end])
        rows_R, columns_R = np.arange(low, high) - text_start, self.owner_A[low:high] - start
        return slice(low, high), (self._indices(rows_R), self._indices(columns_R))

    def _few(self, image_block: int) -> Iterator[tuple[Tensor, Tensor | slice]]:
        """Captions of distinct pictures of a block and their columns in the tile: the first caption of every picture,
        then the second, …; without the pictures that have many."""
        start, end = self._images.bounds[image_block]
        counts_P, first_P = self._captions_of_N[start:end], self._first_N[start:end]
        counts_P = np.where(counts_P <= FEW, counts_P, 0)
        for number in range(counts_P.max(initial=0)):
            columns_D = np.flatnonzero(counts_P > number)
            is_whole = len(columns_D) == len(counts_P)  # then a slice spares a copy of the tile
            yield self._indices(first_P[columns_D] + number), slice(None) if is_whole else self._indices(columns_D)

    def _many(self, image_block: int) -> Iterator[tuple[slice, int]]:
        """All captions of each picture of a block that has many, and its column in the tile."""
        start, end = self._images.bounds[image_block]
        for column in np.flatnonzero(self._captions_of_N[start:end] > FEW).tolist():
            first = self._first_N[start + column]
            yield slice(first, first + self._captions_of_N[start + column]), column

    def _num_not_below(self, scores: Tensor, right: Tensor, axis: int) -> Tensor:
        """Along an axis the number of scores that are not below the right ones, NaN among them."""
        # Flags are floats: their sum is several times as fast as that of booleans, and exact up to 2^24.
        flags = torch.lt(scores, right, out=self._flags.view(*scores.shape))
        return scores.shape[axis] - flags.sum(axis).long()

    def _indices(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self._texts.device)


def _num_not_below_several(scores_T: Tensor, right_D: Tensor) -> Tensor:
    """(D,): the number of scores that are not below each right one, NaN among them."""
    scores_T = scores_T.masked_fill(scores_T.isnan(), torch.inf)  # the search would go past NaN
    return len(scores_T) - torch.searchsorted(scores_T.sort().values, right_D)


def _right_not_below(right_A: NDArray[np.float32], owner_A: NDArray[np.int64]) -> NDArray[np.int64]:
    """(A,): the number of captions of the same picture that are not below each, itself among them."""
    order_A = np.lexsort((right_A, owner_A))
    scores_A, places_A = right_A[order_A], np.arange(len(order_A))
    is_new_A = np.ones(len(order_A), dtype=np.bool_)  # the first of equals
    is_new_A[1:] = (scores_A[1:] != scores_A[:-1]) | (owner_A[1:] != owner_A[:-1])
    not_below_A = np.empty(len(order_A), dtype=np.int64)
    ends_A = np.searchsorted(owner_A, owner_A, side="right")
    not_below_A[order_A] = ends_A - np.maximum.accumulate(np.where(is_new_A, places_A, 0))
    return not_below_A


# --- another order of the nearest ------------------------------------------------------------------------------------


def reranked(
    found: BothWays,
    pictures_AK: NDArray[np.integer],
    picture_scores_AK: NDArray[np.floating],
    texts_NK: NDArray[np.integer],
    text_scores_NK: NDArray[np.floating],
) -> BothWays:
    """Ranks after the nearest pictures of each caption, and the nearest captions of each picture, were put in the order
    of other scores. The other candidates come after them in their old order. A right one with NaN comes last."""
    owner_A = found.picture_of_text_A
    num_texts, num_pictures = len(owner_A), len(texts_NK)
    texts_AK = np.broadcast_to(np.arange(num_texts)[:, None], pictures_AK.shape)
    wrong_A = np.full(num_texts, num_pictures - 1)
    is_right_AK = pictures_AK == owner_A[:, None]
    is_right_NK = owner_A[texts_NK] == np.arange(num_pictures)[:, None]
    wrong_N = num_texts - np.bincount(owner_A)
    return replace(
        found,
        pictures_before_A=_reranked(found.pictures_before_A, texts_AK, is_right_AK, picture_scores_AK, wrong_A),
        texts_before_A=_reranked(found.texts_before_A, texts_NK, is_right_NK, text_scores_NK, wrong_N),
    )


def _reranked(
    before_A: NDArray[np.int64],
    texts_QK: NDArray[np.integer],
    is_right_QK: NDArray[np.bool_],
    scores_QK: NDArray[np.floating],
    wrong_Q: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The wrong candidates before each caption's right pair, where that is among the chosen pairs (Q, K)."""
    before_A = before_A.copy()
    for texts_Q, is_right_Q, scores_Q in zip(texts_QK.T, is_right_QK.T, scores_QK.T, strict=True):
        before_Q = (~is_right_QK & ~(scores_QK < scores_Q[:, None])).sum(axis=1)
        before_Q[np.isnan(scores_Q)] = wrong_Q[np.isnan(scores_Q)]
        before_A[texts_Q[is_right_Q]] = before_Q[is_right_Q]
    return before_A
