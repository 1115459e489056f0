"""How much of one set of prompts is in another: exactly, and by n-grams of words.

A text is shared if at least half of its n-grams occur anywhere in the other set; a text of fewer
than n words is one gram. Words are runs of letters and digits, in lower case; every other mark but
blanks is a word of its own. n = 8 and the half are TULU 3's (arXiv:2411.15124), who ask for the
half within one row of the other set. Where a language puts no blanks between words, a gram spans
sentences, and only long copies are found.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

N = 8
SHARED = 0.5
_PRIME = np.uint64(1_099_511_628_211)


def shared(texts: Sequence[str], others: Iterable[str]) -> list[bool]:
    """For each text, whether it is in `others`, by n-grams.

    Memory: 16 bytes per n-gram of `texts`; `others` go by one at a time.
    """
    if not texts:
        return []
    each = [grams(text) for text in texts]
    table, places = np.unique(np.concatenate(each), return_inverse=True)
    found = np.zeros(len(table), dtype=bool)
    for other in others:
        hashes = grams(other)
        at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
        found[at[table[at] == hashes]] = True
    starts = np.cumsum([0] + [len(g) for g in each[:-1]])
    shares = np.add.reduceat(found[places].astype(float), starts) / [len(g) for g in each]
    return [bool(share >= SHARED) for share in shares]


def grams(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of each n-gram, at least one; the hashes hold within one process."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    hashes = np.array([hash(word) & (2**64 - 1) for word in words] or [0], dtype=np.uint64)
    width = min(N, len(hashes))
    grams = np.full(len(hashes) - width + 1, width, dtype=np.uint64)
    for k in range(width):
        grams = grams * _PRIME + hashes[k : len(hashes) - width + 1 + k]
    return grams
