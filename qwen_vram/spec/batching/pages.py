"""Pages of a paged KV cache, which the requests of a batch share.

A page holds a fixed number of tokens of one request in every layer. A request has whole pages, from its start to its
end, for its prompt and all of its new tokens. It never waits for memory after it has begun.
"""

from __future__ import annotations

# Tokens of a page: whole blocks of decode attention. A request leaves half a page unused on average.
PAGE = 64


def pages_of(tokens: int) -> int:
    """Return the pages of one request with `tokens` tokens.

    >>> pages_of(1), pages_of(64), pages_of(65)
    (1, 1, 2)
    """
    return -(-tokens // PAGE)


def pool_pages(requests: int, context_len: int) -> int:
    """Return all pages of a pool for `requests` requests of `context_len` tokens.

    One more page takes the keys and values of a decode step's unused rows.
    """
    return requests * pages_of(context_len) + 1


def pool_tokens(requests: int, context_len: int) -> int:
    """Return the tokens that a pool has memory for.

    >>> pool_tokens(8, 1000)
    8256
    """
    return pool_pages(requests, context_len) * PAGE
