"""What a file holds, judged by its extension and its first bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HEAD_BYTES = 32  # of a file; enough for every signature below

# Extensions of files that can't be used. They are named with their counts.
_UNSUPPORTED_IMAGES = re.compile(
    r"\.(heic|heif|hif|jxl|psd|psb|svgz?|eps|ai|xcf|ico|exr|hdr|tga|dcm|nii"
    r"|raw|dng|cr2|cr3|crw|nef|nrw|arw|srf|sr2|orf|rw2|raf|pef|srw|x3f)"  # RAW files of cameras
)
_DOCUMENTS = re.compile(r"\.(pdf|docx?|pptx?)")
_VIDEOS = re.compile(r"\.(mp4|mov|avi|mkv|webm|m4v|mpe?g|wmv|flv|3gp|m2?ts|ogv)")
# Files that lie beside images in large numbers; their contents are not examined.
_TEXT_AND_ARCHIVES = re.compile(
    r"\.(txt|md|csv|tsv|jsonl?|xml|ya?ml|html?|py|log|ini|cfg|toml|mat|np[yz]|pkl|h5|zip|gz|tar|db"
    r"|parquet|bak|tmp|part|crdownload)"
)
# A RAW file looks like TIFF, so only these signatures prove that an extension is wrong.
_UNMISTAKABLE = frozenset({"JPEG", "PNG"})
_SUPPORTED = frozenset({"JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"})
_UNUSABLE = (
    (_UNSUPPORTED_IMAGES, "convert them to JPEG or PNG"),
    (_DOCUMENTS, "convert their pages to JPEG or PNG"),
    (_VIDEOS, "save frames of the videos as JPEG or PNG"),
)
# The first bytes of each format, as regular expressions.
_SIGNATURES: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM.{4}\0{4}", re.DOTALL)),
    ("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+")),
    ("PPM", re.compile(rb"P[1-6fF]\s[#\d-]")),
    ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    ("AVIF", re.compile(rb".{4}ftypavi[fs]", re.DOTALL)),
    ("HEIC", re.compile(rb".{4}ftyp(?:hei[cmsxv]|hev[cmsx]|mif1|msf1)", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("Photoshop (PSD)", re.compile(rb"8BPS")),
    ("PDF", re.compile(rb"%PDF-")),
    ("video", re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)),
)


def sniff_format(head: bytes) -> str:
    """Return the format that the first bytes of a file belong to, "" if it is unknown."""
    return next((name for name, signature in _SIGNATURES if signature.match(head)), "")


def unsupported_format(head: bytes) -> str:
    """Return the format of a file that can't be decoded; "" if it can, or if it is unknown."""
    kind = sniff_format(head)
    return "" if kind in _SUPPORTED else kind


def extension(name: str) -> str:
    """Return the extension of a file name in lower case, with its dot; "" if it has none."""
    return os.path.splitext(name)[1].lower()


def is_text_or_archive(suffix: str) -> bool:
    """Return whether files with this extension hold no image, such as lists and annotations."""
    return _TEXT_AND_ARCHIVES.fullmatch(suffix) is not None


def needs_conversion(suffix: str) -> bool:
    """Return whether files with this extension hold images in a format that is not supported."""
    return any(extensions.fullmatch(suffix) for extensions, _ in _UNUSABLE)


def holds_image(path: str) -> bool:
    """Return whether a file without the extension of an image holds one that can be decoded.

    Raises:
        OSError: the file can't be read.
    """
    suffix = extension(path)
    if is_text_or_archive(suffix):
        return False
    with open(path, "rb") as file:
        kind = sniff_format(file.read(HEAD_BYTES))
    return kind in (_UNMISTAKABLE if needs_conversion(suffix) else _SUPPORTED)


def describe_ignored(counts: Mapping[str, int]) -> list[str]:
    """Say which files are not used and what to do about them, in one sentence for each reason.

    Args:
        counts: number of files by extension.
    """
    sentences = []
    others = dict(counts)
    for extensions, remedy in _UNUSABLE:
        found = {suffix: others.pop(suffix) for suffix in counts if extensions.fullmatch(suffix)}
        if found:
            files = "file is" if sum(found.values()) == 1 else "files are"
            sentences.append(f"{_list_counts(found)} {files} not supported: {remedy}")
    if others:
        total = sum(others.values())
        files = "file that is not an image" if total == 1 else "files that are not images"
        sentences.append(f"ignored {total:,} {files}: {_list_counts(others)}")
    return sentences


def _list_counts(counts: Mapping[str, int]) -> str:
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {suffix or 'without extension'}" for suffix, count in by_count[:5]]
    return ", ".join(shown) + (" and others" if len(by_count) > len(shown) else "")
