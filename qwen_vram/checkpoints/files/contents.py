"""Recognition of files whose contents are not of the kind that their name says."""

from __future__ import annotations

from pathlib import Path

# Bytes at the beginning of a file that are read to recognize it.
BEGINNING = 512

GGUF = (
    "is GGUF, the format of llama.cpp, which this library does not read; use the 16-bit checkpoint that it was made "
    "from (its name without '-GGUF')"
)
# Source: the specification of Git LFS, "The Pointer".
_POINTER = b"version https://git-lfs.github.com/spec/"
# Source: PKWARE's APPNOTE 4.3.7; pickle protocols 2 to 5. torch.save writes one of the two.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def beginning_of(path: Path) -> bytes:
    """Return the first bytes of a file, at most `BEGINNING`; empty if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(BEGINNING)
    except OSError:
        return b""


def mistaken(beginning: bytes) -> str:
    """Return what a file with these first bytes is, instead of weights or JSON; empty if unknown.

    The text is the end of a sentence that begins with the name of the file.

    >>> mistaken(b"<!DOCTYPE html>")[:37]
    'is a web page (HTML), not the file it'
    """
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if beginning.startswith(_POINTER):
        return (
            "is a Git LFS pointer, not the file itself; run in its folder: git lfs install && git lfs pull (or get the "
            "checkpoint with: hf download)"
        )
    if text.startswith(_PAGES):
        return (
            "is a web page (HTML), not the file itself: the server answered with a login, an error or a preview; get "
            "the file with: hf download, after hf auth login if the repository is gated"
        )
    if beginning.startswith(b"GGUF"):
        return GGUF
    if beginning.startswith(_PICKLES):
        return (
            "is a file of torch.save (a pickle), whatever its name says, and pickles can run code when they are "
            "opened; save the model again with: model.save_pretrained(folder)"
        )
    if not beginning:
        return "is empty: a download or a copy stopped before it began; download the file again"
    if not beginning.strip(b"\0"):
        return (
            "holds zeros only: the space was reserved, and the download stopped before it arrived; resume the download"
        )
    return ""
