"""The common form of all data sets: images, and pairs of sides that belong together.

An adapter reads the tables of a data set and returns a `Listing` without opening images. Prepare then reads the images
from their `Place` and checks them, shard by shard. A crop or an edit of an image is an image of its own (`Derived`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from fuselip_core.data.places import Derived, Place
from fuselip_core.data.spool import Spool
from fuselip_core.errors import FuselipError

CLOSED_ANSWERS = frozenset({"yes", "no"})

REMEDY = "download it there, or name its folder (--root of `fuselip data prepare`, else prepare.root)"
SPLITS = ("train", "dev", "valid", "test")  # dev: held out of train for model selection
SPLIT_OF = {name: name for name in SPLITS} | {
    "training": "train",
    "val": "valid",
    "validate": "valid",
    "validation": "valid",
    "testing": "test",
}

# Captions without content, such as unfilled form fields of teaching files and exports.
_PLACEHOLDER = re.compile(
    r"replace this\b.*|in progress|tbd|to ?do|to be (?:added|done)|n/?a|nil|null|none|nan|undefined|placeholder"
    r"|(?:insert|add|enter|type|your) (?:the |a |your )?(?:caption|description|text)(?: here)?"
    r"|(?:no|missing|without) (?:caption|description)(?: available| provided)?|caption|description|untitled"
    r"|description of the image(?: or findings)?|lorem ipsum\b.*|[\W_]+",
    re.IGNORECASE | re.DOTALL,
)


class DataError(FuselipError):
    """A data set cannot be read at all; the message says where it was expected and in which form."""


class _Storable:
    """Base class whose strings can always be stored as UTF-8.

    Invalid UTF-8 in file names and lone surrogates in JSON reach Python as characters that UTF-8 cannot encode. They
    are replaced by their escape sequences, so that different names stay different.
    """

    __slots__: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, str) and not value.isascii():
                object.__setattr__(self, name, value.encode(errors="backslashreplace").decode())


@dataclass(frozen=True, slots=True)
class ImageEntry(_Storable):
    """One image. case: the patient, study or article, which must not be in two splits."""

    image_id: str
    split: str
    case: str
    place: Place | Derived
    modality: str | None = None
    concepts: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None


@dataclass(frozen=True, slots=True)
class MadeImage(_Storable):
    """An image derived from the image `source` by `edit` (JSON of transforms.edit_to_json) on reading; has no file."""

    image_id: str
    source: str
    edit: str


@dataclass(frozen=True, slots=True)
class Side(_Storable):
    """An image (by its id), a text, or both."""

    image: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Pair(_Storable):
    """Two sides that belong together. A recipe can keep the pairs of a group together in a batch."""

    pair_id: str
    split: str
    kind: str
    group: str
    case: str
    query: Side
    target: Side
    answer_type: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(side.image for side in (self.query, self.target) if side.image is not None)


@dataclass(frozen=True, slots=True)
class Candidates(_Storable):
    """A multiple-choice question: which of `options` belongs to `query`? `answer`: index of the right one.

    task: the benchmark and its part, such as "sugarcrepe/add_att".
    """

    candidates_id: str
    split: str
    task: str
    query: Side
    options: tuple[Side, ...]
    answer: int

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(side.image for side in (self.query, *self.options) if side.image is not None)


@dataclass(frozen=True, slots=True)
class SetAside(_Storable):
    """A sample that is not used. reason: words with underscores, counted in the manifest."""

    id: str
    split: str
    reason: str
    detail: str = ""


@dataclass
class Listing:
    """A whole data set except for the images' bytes, in a stable order; pairs and candidates use only listed images.

    concept_names: names of its concept codes, if the data set has no table of them.
    own_splits: the adapter drew the splits, so copies may also be removed from the validation split.
    """

    images: Spool[ImageEntry] = field(default_factory=Spool)
    pairs: Spool[Pair] = field(default_factory=Spool)
    candidates: Spool[Candidates] = field(default_factory=Spool)
    set_aside: Spool[SetAside] = field(default_factory=Spool)
    notes: list[str] = field(default_factory=list)
    concept_names: dict[str, str] = field(default_factory=dict)
    own_splits: bool = False

    def bad_rows(self, path: Path, split: str = "train") -> Callable[[int, str], None]:
        """A callback for `read_table` that sets bad rows of the table `path` aside, named by their line number."""

        def set_aside(line: int, fault: str) -> None:
            self.set_aside.append(SetAside(f"{path.name}:{line}", split, "bad_row", f"line {line}: {fault}"))

        return set_aside


def caption_pair(image: ImageEntry, caption: str) -> Pair:
    """Image → caption."""
    sides = Side(image=image.image_id), Side(text=caption)
    return Pair(f"{image.image_id}/caption", image.split, "caption", image.image_id, image.case, *sides)


def question_pair(image: ImageEntry, name: str, question: str, answer: str, answer_type: str | None = None) -> Pair:
    """Image and question → answer. name: unique among the questions of a data set.

    answer_type: "closed" or "open"; by default, yes and no are closed.
    """
    answer_type = answer_type or ("closed" if answer in CLOSED_ANSWERS else "open")
    sides = Side(image=image.image_id, text=question), Side(text=answer)
    return Pair(name, image.split, "vqa", image.image_id, image.case, *sides, answer_type=answer_type)


def one_line(text: str) -> str:
    """The text with all white space reduced to single spaces."""
    return " ".join(text.split())


def fault_of_caption(caption: str, min_words: int) -> str | None:
    """The fault of a caption (empty_caption, placeholder_caption, short_caption); None if it is usable."""
    if not caption.strip():
        return "empty_caption"
    if _PLACEHOLDER.fullmatch(caption.strip().rstrip(".!…")) or not any(map(str.isalnum, caption)):
        return "placeholder_caption"
    return "short_caption" if len(caption.split()) < min_words else None


def require_folder(root: Path, what: str) -> None:
    """Raises DataError if `root` is not a folder or is empty."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root} with {what}; {REMEDY}")
    if not any(root.iterdir()):
        raise DataError(f"the folder {root} is empty but should contain {what}; {REMEDY}")


def require_columns(columns: Sequence[str] | None, needed: Sequence[str], path: Path) -> None:
    """Raises DataError for missing columns."""
    missing = [name for name in needed if name not in (columns or ())]
    if missing:
        raise DataError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} (it has "
            f"{', '.join(columns or ()) or 'none'}); compare it with the published file"
        )


def split_of_path(path: PurePath, default: str = "train") -> str:
    """The split by a word such as train or val in a file's name or in the name of the nearest folder above it."""
    for part in (path.stem, *(folder.name for folder in path.parents)):
        words = re.split(r"[-_. ]", part.lower())
        if split := next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None):
            return split
    return default


def answer_text(answer: object) -> str:
    """The answer as a string in lower case on one line."""
    return one_line("" if answer is None else str(answer)).lower()


def fault_of_question(question: str, answer: str) -> str | None:
    return "empty_question" if not question else "empty_answer" if not answer else None
