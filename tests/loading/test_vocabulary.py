"""What a stage learns of its data: texts without a picture being read, classes in a settled order, and clear errors."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, RecipeError
from mmflow.dataset.index import read_index
from mmflow.dataset.manifest import index_uri, tar_uri
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.loading.config import LoaderConfig
from mmflow.loading.tokens import Texts, Vocabulary, learn_vocabulary, read_tokenizer, train_tokenizer
from tests.dataset.handmade import Handmade, write_dataset


def dataset_of(directory: Path, *metadata: dict[str, Any]) -> Dataset:
    samples = [
        Handmade(key=f"key-{number}", captions=[{"language": "en", "text": f"words {number}"}], metadata=each)
        for number, each in enumerate(metadata)
    ]
    return write_dataset(directory / "dataset", [("train", samples)])


def learn(dataset: Dataset, **loader: Any) -> Vocabulary:
    config = LoaderConfig.model_validate(loader)
    return learn_vocabulary([Texts("pretrain.loader", [Reader(dataset, "train", frames=False)], config)], 200)


def questions(*pairs: tuple[str, list[str]]) -> dict[str, Any]:
    return {"questions": [{"question": question, "answers": answers} for question, answers in pairs]}


def flip(dataset: Dataset, member: str, row: int) -> None:
    entry = read_index(index_uri(dataset.uri, "00000")).to_pylist()[row]
    path = Path(tar_uri(dataset.uri, "00000"))
    data = bytearray(path.read_bytes())
    data[entry[f"{member}_offset"]] ^= 1
    path.write_bytes(data)


def test_labels_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"classes": {"kind": "b"}}, {"classes": {"kind": "a"}}, {}, {"classes": {"kind": 3}})
    assert learn(dataset, label="kind").classes == ("a", "b")
    assert learn(dataset).classes == ()


def test_classes_are_learnt_where_no_sample_has_a_caption(tmp_path: Path) -> None:
    samples = [Handmade(key=f"key-{kind}", captions=[], metadata={"classes": {"kind": kind}}) for kind in "ba"]
    found = learn(write_dataset(tmp_path / "dataset", [("train", samples)]), label="kind")
    assert found.classes == ("a", "b")
    assert read_tokenizer(found.tokenizer_json).get_vocab_size() == 5  # the special tokens alone


def test_answers_are_classes_from_the_commonest(tmp_path: Path) -> None:
    dataset = dataset_of(
        tmp_path, questions(("what", ["dog"]), ("why", [])), questions(("who", ["cat", "yes"]), ("is it", ["yes"]))
    )
    found = learn(dataset, text="questions")
    assert found.classes == ("yes", "cat", "dog")
    encoded = read_tokenizer(found.tokenizer_json).encode("what cat")
    assert "[UNK]" not in encoded.tokens  # questions and answers are read, captions are not
    assert "[UNK]" in read_tokenizer(found.tokenizer_json).encode("words").tokens


@pytest.mark.parametrize(
    ("metadata", "loader", "said"),
    [
        (
            {},
            {"label": "kind"},
            r"^pretrain.loader.label: no sample of split 'train' has a class of that name; its meta",
        ),
        ({}, {"text": "questions"}, r"^loader.text: questions, but sample key-0 has none; its metadata needs"),
        (
            {"questions": [{"question": "q", "answers": [{"answer": "yes"}]}]},
            {"text": "questions"},
            r"^loader.text: sample key-0 has .* for answers; write a list of texts",
        ),
        ({"questions": ["q"]}, {"text": "questions"}, r"^loader.text: sample key-0 has 'q' for a question; write"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, metadata: Any, loader: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        learn(dataset_of(tmp_path, metadata), **loader)


def test_pictures_are_not_read(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {}, {})
    whole = learn(dataset)
    flip(dataset, "image", 1)
    assert learn(dataset) == whole


def test_a_damaged_text_stops_or_is_passed_over_as_the_recipe_says(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"classes": {"kind": "a"}}, {"classes": {"kind": "b"}})
    flip(dataset, "json", 0)
    with pytest.raises(CorruptArtifactError, match=r"json of row 0 \(key-0\) is not what was written"):
        learn(dataset, label="kind")
    assert learn(dataset, label="kind", on_corrupt="skip").classes == ("b",)


def test_a_tokenizer_reads_the_name_of_a_special_token_as_text_in_every_process() -> None:
    tokenizer = read_tokenizer(train_tokenizer(["a mask", "b"], 100).to_str())
    copied: Tokenizer = ForkingPickler.loads(ForkingPickler.dumps(tokenizer))
    for each in (tokenizer, copied):
        assert each.token_to_id("[MASK]") not in each.encode("a [MASK] b").ids
