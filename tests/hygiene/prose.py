"""The rules for prose, and readers of Markdown, docstrings and comments.

`python -m tests.hygiene.prose` counts the violations in the package, for each folder and each rule.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
PACKAGE = ROOT / "qwen_vram"
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(
        path for folder in ("benchmarks", "qwen_vram", "tests", "training") for path in (ROOT / folder).rglob("*.md")
    ),
)
# The hard limit; 25 is the target.
MAX_WORDS = 30
# Characters of a module docstring's first line, which is one line of the tables of modules.
MAX_OPENING = 88

_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "cf.", "vs.")
_OPENINGS = re.compile(r"(What|Whether|How|Where|Which|Who)\b")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Source|Note):$")
_CODE = "code"  # in place of a code span: one word


def banned_terms(glossary: str) -> tuple[str, ...]:
    """Terms in the second column of the table "say / do not say"."""
    table = glossary.partition("| say | do not say |")[2].partition("\n\n")[0]
    return tuple(term for row in table.splitlines()[2:] for term in re.findall(r"`([^`]+)`", row.split("|")[2]))


BANNED = banned_terms(GLOSSARY.read_text())
_BANNED = re.compile(
    r"(?<![\w-])(" + "|".join(re.escape(term).replace(r"\ ", r"\s+") for term in BANNED) + r")(?![\w-])", re.I
)


def shown(path: Path) -> str:
    """A page's path in the repository."""
    return path.relative_to(ROOT).as_posix()


def markdown_blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items, headings and table cells; code blocks and formulas are left out."""
    block: list[str] = []
    in_code = False
    for line in (*text.splitlines(), ""):
        stripped = line.strip()
        if stripped.startswith("```"):
            in_code = not in_code
        starts_anew = in_code or not stripped or re.match(r"[#|]|```|(- |\d+\. )|    ", line) is not None
        if starts_anew and block:
            yield " ".join(block)
            block = []
        if in_code or not stripped or stripped.startswith("```") or line.startswith("    "):
            continue
        if stripped.startswith("|"):
            yield from filter(None, (cell.strip() for cell in _without_code(stripped).split("|")))
        else:
            block.append(stripped.lstrip("#-> "))


def docstring_blocks(docstring: str) -> Iterator[str]:
    """Paragraphs and entries of sections; examples and formulas are left out."""
    block: list[str] = []
    section = ""
    for line in (*inspect.cleandoc(docstring).splitlines(), ""):
        indent = len(line) - len(line.lstrip())
        found = _SECTION.match(line)
        if block and (not line.strip() or found or (section and indent == 4) or re.match(r"\s*(- |>>>)", line)):
            yield " ".join(block)
            block = []
        if found:
            section = found[1]
        elif line.strip() and not indent:
            section = ""
        formula = indent >= 4 and not section and not block
        if line.strip() and not found and not section.startswith("Example") and not formula:
            if line.lstrip().startswith((">>>", "...")):
                section = "Example"
            else:
                block.append(line.strip())


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text


def comments(path: Path) -> Iterator[str]:
    """Comments, with the lines of one comment joined."""
    last, block = 0, []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:|fmt:|!)", token.string):
            if block and token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    if block:
        yield " ".join(block)


def _without_code(text: str) -> str:
    return re.sub(r"(`+).+?\1", _CODE, text)


def sentences(block: str) -> Iterator[str]:
    """The sentences of a paragraph; a code span is one word, and a link is its text."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _without_code(block))
    sentence: list[str] = []
    for word in text.split():
        sentence.append(word)
        if re.search(r"[.!?][)\"'*]*$", word) and word not in _ABBREVIATIONS:
            yield " ".join(sentence)
            sentence = []
    if sentence:
        yield " ".join(sentence)


def long_sentences(block: str) -> Iterator[str]:
    """Sentences of more than `MAX_WORDS` words."""
    for sentence in sentences(block):
        words = sum(any(letter.isalnum() for letter in word) for word in sentence.split())
        if words > MAX_WORDS:
            yield f"{words} words: {sentence}"


def banned_words(block: str) -> Iterator[str]:
    """Terms of the glossary's table that a block contains outside of code."""
    for found in _BANNED.finditer(_without_code(block)):
        yield f"{found[0]!r} in: {block}"


def conditions_with_where(block: str) -> Iterator[str]:
    """Sentences that open with "Where" for a condition; "If" is the word."""
    for sentence in sentences(block):
        if sentence.startswith("Where ") and not sentence.endswith("?"):
            yield sentence


def bad_openings(docstring: str) -> Iterator[str]:
    """The first line of a docstring that opens with a question word; a verb or a noun phrase is the rule."""
    first = inspect.cleandoc(docstring).partition("\n")[0]
    if _OPENINGS.match(first):
        yield first


@cache
def module_openings(package: Path = PACKAGE) -> tuple[tuple[str, str], ...]:
    """Path and first docstring line of every module; the line is empty if there is no docstring."""
    found = []
    for path in sorted(package.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found.append((path.relative_to(package.parent).as_posix(), docstring.partition("\n")[0]))
    return tuple(found)


def folder_of(path: str) -> str:
    """The folder under the package that a path is in, or the module beside these folders."""
    return Path(path).parts[1].removesuffix(".py")


@cache
def package_violations(package: Path = PACKAGE) -> tuple[tuple[str, str, str], ...]:
    """Rule, path and text of every violation in the docstrings and comments of a package."""
    return tuple(_violations(package))


def _violations(package: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        for docstring in docstrings(path):
            for text in bad_openings(docstring):
                yield "opening", name, text
        blocks = [block for docstring in docstrings(path) for block in docstring_blocks(docstring)]
        for kind, texts in (("docstring", blocks), ("comment", list(comments(path)))):
            for block in texts:
                for text in long_sentences(block):
                    yield f"{kind}: length", name, text
                for text in banned_words(block):
                    yield f"{kind}: banned", name, text


def main() -> None:
    """Print the number of violations for each folder and rule."""
    counts = Counter((Path(path).parent.as_posix(), rule) for rule, path, _ in package_violations())
    rules = sorted({rule for _, rule in counts})
    print("folder", *rules, sep=" | ")
    for folder in sorted({folder for folder, _ in counts}):
        print(folder, *(counts[folder, rule] for rule in rules), sep=" | ")
    print("all", *(sum(n for (_, one), n in counts.items() if one == rule) for rule in rules), sep=" | ")


if __name__ == "__main__":
    main()
