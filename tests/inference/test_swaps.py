"""Swaps in English captions: by hand, and None wherever a swap would say the same or cannot be told."""

from __future__ import annotations

import pytest

from mmflow.inference.swaps import ATTRIBUTES, MEANINGS, NO_NOUNS, swapped_attributes, swapped_objects


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a red kite over a blue house", "a blue kite over a red house"),
        ("Red apples and green pears.", "Green apples and red pears."),
        ("an orange cat on a blue sofa", "a blue cat on an orange sofa"),
        ("A small dog beside an enormous cat", "An enormous dog beside a small cat"),
        ("two dogs chase three cats", "three dogs chase two cats"),
        ("a big red ball and a small blue ball", "a small red ball and a big blue ball"),
        ("a red and white boat near a blue pier", "a red and blue boat near a white pier"),
        ("a red apple, a red pear and a green plum", "a green apple, a red pear and a red plum"),
        ("an old man reads to young children", "a young man reads to old children"),
    ],
)
def test_attributes_by_hand(caption: str, swapped: str) -> None:
    assert swapped_attributes(caption) == swapped


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a red kite over a house",
        "a red kite over a tall house",  # of two kinds
        "a big dog and a large cat",  # mean the same
        "a red ball and a blue ball",  # the same balls
        "a black and white cat",  # the same cat
        "the door is red and the roof is green",  # no noun after them
        "a red-haired man in a blue coat",
        "a big, bad dog and small, wet cats",
        "the White House and the Red Sea",
        "ein roter Drachen und ein blaues Haus",
        "红色的苹果和绿色的梨",
    ],
)
def test_captions_without_attributes_to_swap(caption: str) -> None:
    assert swapped_attributes(caption) is None


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a cat under a table", "a table under a cat"),
        ("A cat under the red table.", "The red table under a cat."),
        ("an apple on top of a box, in the rain", "a box on top of an apple, in the rain"),
        ("photo of a boy in front of the old car", "photo of the old car in front of a boy"),
        ("the lamp to the left of a chair with a cushion", "a chair to the left of the lamp with a cushion"),
    ],
)
def test_objects_by_hand(caption: str, swapped: str) -> None:
    assert swapped_objects(caption) == swapped


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat with a dog",  # is a dog with a cat
        "a cat near the dog",
        "a cat on the cat",
        "a dog sits on a couch",
        "a fire truck on a road",
        "a ladder on a fire truck",
        "a cat on a white background",
        "a cat on the left",
        "cats on tables",
        "a cat, on a table",
        "The Cat On The Table",
    ],
)
def test_captions_without_objects_to_swap(caption: str) -> None:
    assert swapped_objects(caption) is None


def test_each_attribute_is_listed_once_and_describes_something() -> None:
    listed = [word for groups in ATTRIBUTES.values() for word in groups.replace(",", "").split()]
    assert len(listed) == len(set(listed)) == len(MEANINGS)
    assert not NO_NOUNS & set(listed)
