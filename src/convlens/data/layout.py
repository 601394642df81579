"""What folders and lists of images have in common: names of splits and classes, and problems."""

from __future__ import annotations

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convlens.errors import DataError, UsageError, closest_match, did_you_mean

SPLITS = ("train", "val", "test")
# Words for the splits. A name may also have the neutral words, digits and separators:
# `training_set`, `Test1`, `valImages`.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "eval": "val",
    "evaluation": "val",
    "dev": "val",
    "development": "val",
    "holdout": "val",
    "heldout": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    # German (`Trainingsdaten`), French, Spanish, Italian and Portuguese, without accents.
    "trainings": "train",
    "validierung": "val",
    "validierungs": "val",
    "evaluierung": "val",
    "evaluierungs": "val",
    "entrainement": "train",
    "apprentissage": "train",
    "entrenamiento": "train",
    "validacion": "val",
    "evaluacion": "val",
    "prueba": "test",
    "pruebas": "test",
    "addestramento": "train",
    "allenamento": "train",
    "convalida": "val",
    "validazione": "val",
    "valutazione": "val",
    "prova": "test",
    "treino": "train",
    "treinamento": "train",
    "validacao": "val",
    "avaliacao": "val",
    "teste": "test",
    "testes": "test",
}
# Validation, or testing beside another validation split: Food-11 has `training`, `validation`
# and `evaluation`.
_MAYBE_TEST_WORDS = frozenset(
    {
        "holdout",
        "heldout",
        "eval",
        "evaluation",
        "evaluierung",
        "evaluierungs",
        "evaluacion",
        "valutazione",
        "avaliacao",
    }
)
_NEUTRAL_WORD = re.compile(
    r"(data)?sets?|data|splits?|part|subset|samples?|folder|dir|files|the|v|new|final|full|small|mini"
    r"|original|raw|resized|cropped|processed"
    r"|images?|imgs?|pictures?|photos?|jpe?gs?|pngs?"
    r"|daten(satz|sets?)?|satz|menge|bilder|jeu|donnees|datos|imagenes|conjunto|dati|insieme"
    r"|immagini|dados|imagens|fotos?"
)
# `jeu de test`, `datos de prueba`; not `train_de`, which may be German.
_NOUN_AND_PREPOSITION = re.compile(
    r"\b(jeu|images|donnees|datos|imagenes|conjunto|dati|insieme|immagini|dados|imagens|fotos)"
    r" (de|del|d|des|di|da|do)\b"
)
_ANNOTATION_WORD = re.compile(
    r"annot(ation)?s?|labels?|lists?|masks?|trimaps?|segmentations?|ground|truth|gt|box(es)?|bbox(es)?"
    r"|meta(data)?|xmls?|jsons?|csvs?"
)
_HOLD_OUT = re.compile(r"h[oe]ld[ _.-]?out", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
# A word in camel case, or several letters of the same case.
_HUMP = re.compile(r"[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z][^\W\d_A-Z]*")
_UNLABELED_WORD = re.compile(r"pred(ict(ions?)?|s)?|unlabell?ed|submissions?|inference")
LAYOUT_HELP = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"
LIST_HELP = "name a list of the images: a CSV file with the columns path,label"
MIN_CLASS_FILES = 2  # files of each class that is read from the names of files
# `cat.0`, `american_bulldog_12`, `dog (3)`: words, a separator, a number.
_LABELED_NAME = re.compile(r"([^\W\d_]+(?:[ ._-][^\W\d_]+)*)[ ._(-]+\d+\)?")
_NUMBERED_NAME = re.compile(r"(\d+)[ ._-]+\d+")
# Words that cameras and programs put before the number of an image.
_CAMERA_WORD = re.compile(
    r"(img|dsc[nf]?|pict?|pxl|image|photo|picture|frame|scan|file|sample|screen ?shot|untitled"
    r"|bild|vid(eo)?|mvi|gopr|dji|snapshot|download|unnamed|train|val|test|x|y|copy)s?"
)
# Text files that are not lists of labeled images although they may look like one.
OTHER_TEXT_FILES = re.compile(
    r"readme|licen[sc]e|requirements|submission|^(classes|labels)\.txt$"
    r"|(^|[_. -])(b|bounding[_ -]?)?box(es)?\.txt$"
)
MAX_EXAMPLES = 5  # items that a message lists before it counts the others


@dataclass(frozen=True)
class Problem:
    """Something that may be wrong with a source. Without `items` there is no problem."""

    message: str
    items: Sequence[str]
    fix: str = ""


def raise_problems(problems: Iterable[Problem], where: Path, fix: str = LAYOUT_HELP) -> None:
    """Raise one error for all problems.

    Args:
        problems: those without items are ignored.
        where: the source.
        fix: what the user can do, unless a problem says so; the last one that does decides.

    Raises:
        DataError: at least one problem has items.
    """
    actual = [problem for problem in problems if problem.items]
    if actual:
        raise DataError(
            "; ".join(f"{problem.message}: {list_examples(problem.items)}" for problem in actual),
            where=str(where),
            fix=next((problem.fix for problem in reversed(actual) if problem.fix), fix),
        )


def list_examples(items: Sequence[str]) -> str:
    """Return the first items, and how many more there are."""
    more = len(items) - MAX_EXAMPLES
    return ", ".join(items[:MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class SplitName:
    """A name with the word for a split.

    Attributes:
        split: `train`, `val` or `test`.
        rest: the other words, in order: `("seg",)` for `seg_train`; empty for `train_set1`.
        may_be_test: the word is `holdout` or `evaluation`, which is a test split beside a
            validation split.
        is_union: the word is `trainval`, which is the training split unless another name is.
    """

    split: str
    rest: tuple[str, ...] = ()
    may_be_test: bool = False
    is_union: bool = False


def parse_split_name(name: str) -> SplitName | None:
    """Find the word for a split in a name; None if there is none, or there are several.

    A name with other words (`seg_train`, but also `train station`) is the name of a split only
    among others that support it; see `match_split_names`.
    """
    words = [word for word in split_words(name) if not _NEUTRAL_WORD.fullmatch(word)]
    found = [word for word in words if word in SPLIT_WORDS]
    if len({SPLIT_WORDS[word] for word in found}) != 1:
        return None
    rest = tuple(word for word in words if word not in SPLIT_WORDS)
    word = found[0]
    return SplitName(SPLIT_WORDS[word], rest, word in _MAYBE_TEST_WORDS, word == "trainval")


def split_words(name: str) -> list[str]:
    """Return the words of a name in lower case, divided at separators, digits and camel case.

    Accents are left out. The neutral words are also cut off the end of a word for a split:
    `trainset` is `train set`.
    """
    words = list[str]()
    name = _without_accents(name)
    name = _HOLD_OUT.sub(lambda match: match[0][:4].casefold() + "out", name)
    for word in _WORD.findall(name):
        # `TRAINset` has no camel case; `seg` and `Train` in `segTrain` are words.
        whole = _cut_neutral_word(word.casefold())
        humps = _HUMP.findall(word)
        words += whole if whole[0] in SPLIT_WORDS else map(str.casefold, humps)
    text = re.sub(r"\btrain (and )?val\b", "trainval", " ".join(words))
    text = _NOUN_AND_PREPOSITION.sub(r"\1", text)
    return [part for word in text.split() for part in _cut_neutral_word(word)]


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def _cut_neutral_word(word: str) -> list[str]:
    for split in SPLIT_WORDS:
        if word.startswith(split) and _NEUTRAL_WORD.fullmatch(word, len(split)):
            return [split, word[len(split) :]]
    return [word]


def split_from_name(name: str) -> str | None:
    """Return `train`, `val` or `test` for any of their usual spellings, else None.

    Names with other words count only among others: see `match_split_names`.
    """
    parsed = parse_split_name(name)
    return parsed.split if parsed and not parsed.rest else None


def match_split_names(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each name that stands for one, judged by all names together.

    - A name of nothing but a word for a split (`train`, `Training_set`, `test1`) stands for it.
    - Otherwise, names with other words stand for splits if the same words occur with two splits:
      `seg_train` and `seg_test`, but not `train station` and `test tube`; or if there is only one
      name.
    - `holdout` and `evaluation` are the validation split, or the test split if another name is the
      former.
    - `trainval` is the training split, unless another name is: then it holds what two others hold.
    """
    names = list(names)
    parsed = {name: found for name in names if (found := parse_split_name(name))}
    splits_of_rest: dict[tuple[str, ...], set[str]] = {}
    for found in parsed.values():
        splits_of_rest.setdefault(found.rest, set()).add(found.split)
    is_only_name = len(set(names)) == 1
    matched = {
        name: found
        for name, found in parsed.items()
        if not found.rest or len(splits_of_rest[found.rest]) > 1 or is_only_name
    }
    exact = {name: found for name, found in matched.items() if not found.rest}
    matched = exact or matched
    if any(found.split == "train" and not found.is_union for found in matched.values()):
        matched = {name: found for name, found in matched.items() if not found.is_union}
    plain = {found.split for found in matched.values() if not found.may_be_test}
    held_out = "test" if "val" in plain and "test" not in plain else "val"
    return {name: held_out if found.may_be_test else found.split for name, found in matched.items()}


def is_neutral_name(name: str) -> bool:
    """Return whether a name says nothing about what is inside, like `images` or `data`."""
    return all(map(_NEUTRAL_WORD.fullmatch, split_words(name)))


def is_annotation_name(name: str) -> bool:
    """Return whether a name is that of annotations beside images, such as `labels` or `gt_test`."""
    words = [word for word in split_words(name) if word not in SPLIT_WORDS]
    if "segmentation" in words:  # `SegmentationClass` and `SegmentationObject` of Pascal VOC
        words = [word for word in words if word not in ("class", "object")]
    has_word = any(map(_ANNOTATION_WORD.fullmatch, words))
    return has_word and all(
        _ANNOTATION_WORD.fullmatch(word) or _NEUTRAL_WORD.fullmatch(word) for word in words
    )


def name_without_split(name: str) -> str:
    """Return a name without its word for a split: `cats` for `cats_train`, `A` for `trainA`."""
    separators = " _-.()"
    for part in itertools.chain(_WORD.finditer(name), _HUMP.finditer(name)):
        if _cut_neutral_word(_without_accents(part[0]).casefold())[0] in SPLIT_WORDS:
            before, after = name[: part.start()].rstrip(separators), name[part.end() :]
            return f"{before} {after.lstrip(separators)}".strip(separators)
    return name


def is_unlabeled_name(name: str) -> bool:
    """Return whether a name is that of images to predict, like `seg_pred`."""
    return any(map(_UNLABELED_WORD.fullmatch, split_words(name)))


def normalize_name(name: str) -> str:
    """Return a class name in composed Unicode (NFC), without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def group_by_label(names: Iterable[str]) -> dict[str, list[str]] | None:
    """Return file names by the label in front of their number: `cat.0.jpg`, `dog_1.jpg`, `3_7.jpg`.

    Returns:
        None if a name has no such label, or only the word of a camera or a program (`IMG_1.jpg`);
        or if some labels are numbers and others are not.
    """
    files: dict[str, list[str]] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        match = _LABELED_NAME.fullmatch(stem) or _NUMBERED_NAME.fullmatch(stem)
        if match is None or _CAMERA_WORD.fullmatch(match[1].casefold()):
            return None
        files.setdefault(normalize_name(match[1]), []).append(name)
    return files if len({label.isdecimal() for label in files}) < 2 else None


def labels_from_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return file names by label if these are certainly the classes, else nothing.

    There must be at least two labels with two files each, and no labels that differ only in case.
    Labels that are numbers must be all numbers from 0 or 1 on.
    """
    files = group_by_label(names) or {}
    is_complete = len(files) > 1 and min(map(len, files.values())) >= MIN_CLASS_FILES
    is_unique = len({label.casefold() for label in files}) == len(files)
    are_words = not any(map(str.isdecimal, files))
    return files if is_complete and is_unique and (are_words or _are_numbered(files)) else {}


def _are_numbered(files: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the first numbers in the names `3_7.jpg` can only be those of classes.

    They must be fewer than the second numbers: in `2019_1.jpg`, the first one may be a year, and
    in `1_2.jpg` to `9_2.jpg` the second one may be the class.
    """
    numbers = sorted(map(int, files))
    seconds = {int(re.findall(r"\d+", name)[1]) for group in files.values() for name in group}
    are_all = numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))
    return are_all and len(numbers) < len(seconds)


@dataclass(frozen=True)
class ClassChoice:
    """Which classes of a data set are used: the keys `data.classes`, `without` and `min_images`.

    Attributes:
        only: the classes to use; empty for all.
        without: classes to leave out.
        min_images: a class with fewer training images is left out.
    """

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    min_images: int = 0

    def keep(self, names: Sequence[str]) -> list[str]:
        """Return those of `names` that `only` and `without` keep, in their order."""
        only, without = self._resolve(self.only, names), self._resolve(self.without, names)
        return [name for name in names if (name in only or not only) and name not in without]

    def check(self, names: Sequence[str], where: str) -> None:
        """Check that the classes exist that are chosen or left out.

        Args:
            names: all classes of the set.
            where: name of the set, for the error.

        Raises:
            UsageError: at least one does not exist; suggests similar ones.
        """
        only, without = self._resolve(self.only, names), self._resolve(self.without, names)
        problems, similar = [], list[str]()
        for key, resolved in (("data.classes", only), ("data.without", without)):
            unknown = [name for name in resolved if name not in names]
            if unknown:
                problems.append(f"{key} names classes that do not exist: {list_examples(unknown)}")
                similar += [closest_match(name, names) for name in unknown]
                for name in unknown:
                    parts = [normalize_name(part) for part in name.split(",")]
                    if set(parts) <= set(names):  # a list without brackets
                        similar = [list_override(key, parts)]
        if problems:
            question = did_you_mean(dict.fromkeys(filter(None, similar)))
            raise UsageError(
                "; ".join(problems),
                where=where,
                fix=question or f"the classes are: {list_examples(names)}",
            )

    @staticmethod
    def _resolve(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
        """Return the chosen classes by their exact names; YAML reads `00012` as the number 12."""
        resolved = []
        for name in map(normalize_name, chosen):
            equal = [n for n in names if name.isdecimal() and n.isdecimal() and int(n) == int(name)]
            resolved.append(equal[0] if name not in names and len(equal) == 1 else name)
        return resolved


def list_override(key: str, names: Iterable[str]) -> str:
    """Return the override that sets a key to names, quoted for YAML and for a shell if needed."""
    is_plain = re.compile(r"(?!(yes|no|on|off|true|false|null|y|n)$)[^\W\d][\w.-]*", re.IGNORECASE)
    texts = [n if is_plain.fullmatch(n) else json.dumps(n, ensure_ascii=False) for n in names]
    override = f"{key}=[{','.join(texts)}]"
    return f"'{override}'" if '"' in override else override


def printable(text: str) -> str:
    """Return `text` with escapes for the surrogates that stand for undecodable file name bytes."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()
