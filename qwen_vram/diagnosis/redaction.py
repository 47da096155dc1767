"""Removal of names, paths and tokens from a text that is to be published."""

from __future__ import annotations

import getpass
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

# Variables whose value is a secret.
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.I)
# Tokens by their form: of Hugging Face, OpenAI and others, GitHub, and in the credentials of an address.
_FORMS = re.compile(
    r"\b(hf|api_org)_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}|\bgh[pousr]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}"
    r"|(?<=://)[^/\s@]+(?=@)"
)
# Folders below which the next part of a path is a user's name.
_HOMES = re.compile(r"(/home|/Users|/mnt/[a-z]/Users|[A-Za-z]:\\Users)[/\\][^/\\\s'\":,;)]+", re.I)
# Shorter secrets and names are parts of other words.
_SHORTEST = 4


def redacted(text: str) -> str:
    """Return a text without host names, user names, tokens and folders of users.

    Each is replaced by a word in angle brackets. Secrets are the values of variables such as `HF_TOKEN`, and words in
    the form of a token.
    """
    for value in _secrets():
        text = text.replace(value, "<token>")
    text = _FORMS.sub("<token>", text)
    for home in _home_folders():
        text = text.replace(home, "<home>")
    text = _HOMES.sub("<home>", text)
    for word, shown in (*((name, "<host>") for name in _hosts()), *((name, "<user>") for name in _users())):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", shown, text, flags=re.I)
    return text


def _secrets() -> list[str]:
    """The values of secret variables, the longest first."""
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


def _home_folders() -> list[str]:
    named = {os.environ.get("HOME", ""), os.environ.get("USERPROFILE", ""), os.path.expanduser("~")}
    folders = named | {str(Path(one).resolve()) for one in named if one}
    return sorted((one for one in folders if len(one) > 1), key=len, reverse=True)


def _hosts() -> list[str]:
    names = {socket.gethostname(), os.environ.get("HOSTNAME", "")}
    names |= {name.partition(".")[0] for name in names}
    return sorted((one for one in names if one and one != "localhost"), key=len, reverse=True)


def _users() -> list[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with suppress(KeyError, OSError, ImportError):  # no entry for this user, as in some containers
        names.add(getpass.getuser())
    return sorted(filter(None, names), key=len, reverse=True)
