"""Pages, docstrings and comments are in plain technical English."""

import re

import pytest

from tests.hygiene import prose

FOLDERS = sorted({prose.folder_of(path) for path, _ in prose.module_openings()})


@pytest.mark.parametrize("page", prose.PAGES, ids=prose.shown)
def test_no_sentence_on_a_page_is_too_long(page):
    assert not [text for block in prose.markdown_blocks(page.read_text()) for text in prose.long_sentences(block)]


@pytest.mark.parametrize("page", prose.PAGES, ids=prose.shown)
def test_no_page_uses_a_banned_term(page):
    assert not [text for block in prose.markdown_blocks(page.read_text()) for text in prose.banned_words(block)]


@pytest.mark.parametrize("page", prose.PAGES, ids=prose.shown)
def test_conditions_open_with_if(page):
    blocks = prose.markdown_blocks(page.read_text())
    assert not [text for block in blocks for text in prose.conditions_with_where(block)]


@pytest.mark.parametrize("page", prose.PAGES, ids=prose.shown)
def test_links_to_a_section_name_one_that_exists(page):
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target).read_text() if target else page.read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, section


def test_the_readme_links_every_page():
    readme = (prose.ROOT / "README.md").read_text()
    assert not [page.name for page in (prose.ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in readme]


def test_the_changelog_is_by_keep_a_changelog():
    headings = re.findall(r"^(##|###) (.+)$", (prose.ROOT / "CHANGELOG.md").read_text(), re.M)
    kinds = [title for level, title in headings if level == "###"]
    assert headings[0] == ("##", "[Unreleased]")
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for level, title in headings[1:]:
        assert level == "###" or re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title), title


def test_the_examples_are_in_plain_english():
    assert not prose.package_violations(prose.ROOT / "examples")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_package_is_in_plain_english(folder):
    assert not [
        (rule, path, text) for rule, path, text in prose.package_violations() if prose.folder_of(path) == folder
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_first_line_of_each_module_is_a_short_phrase(folder):
    openings = {path: first for path, first in prose.module_openings() if prose.folder_of(path) == folder}
    assert openings
    bad = {path: first for path, first in openings.items() if len(first) > prose.MAX_OPENING or first[-1:] != "."}
    assert not bad


THIRTY = " ".join(["word"] * 30)


@pytest.mark.parametrize("text", [f"{THIRTY} more.", f"A.\n\n| one | {THIRTY} more |", f"- {THIRTY}\n  more"])
def test_a_sentence_of_31_words_is_found(text):
    assert [found for block in prose.markdown_blocks(text) for found in prose.long_sentences(block)]


@pytest.mark.parametrize(
    "text",
    [
        f"{THIRTY}. {THIRTY}.",
        f"```\n{THIRTY} more\n```",
        f"{THIRTY[:-5]} `{THIRTY}`",
        f"- {THIRTY}\n- {THIRTY}",
        f"| {THIRTY} | {THIRTY} |",
        f"    {THIRTY} more",
    ],
)
def test_sentences_of_30_words_and_code_pass(text):
    assert not [found for block in prose.markdown_blocks(text) for found in prose.long_sentences(block)]


def test_every_term_of_the_glossarys_table_is_found():
    assert len(prose.BANNED) > 20
    for term in prose.BANNED:
        assert list(prose.banned_words(f"It is a {term.capitalize()} of it.")), term
        assert not list(prose.banned_words(f"It is `{term}`, and x{term.replace(' ', '')}y."))


def test_an_opening_is_found(tmp_path):
    docstring = '"""Fit the room that is\n    left.\n\n    >>> way\n    """'
    comment = f"# {THIRTY}\n    # more"
    (tmp_path / "module.py").write_text(
        f'"""Whether it opens so."""\n\n\ndef fit() -> None:\n    {docstring}\n    {comment}\n'
    )
    found = {rule: text for rule, _, text in prose.package_violations(tmp_path)}
    assert found.keys() == {"opening", "docstring: banned", "comment: length"}
    assert found["opening"] == "Whether it opens so."
