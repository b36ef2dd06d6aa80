"""Exercise 5: learn a tokenizer.

Task. Fill in `merge`, which replaces a pair in one word, from the left; then `learn`, which counts
all pairs of neighbours, merges the most frequent one everywhere, and goes on with the result. Of
equally frequent pairs the smallest (a, b) wins. Merge i makes the id 256 + i.

Why. The list of merges *is* the tokenizer: if ties are broken differently, the same text has other
ids, and a model trained on the first ids can't read the second. Each word is a sequence of its own,
because a merge must not join two words: else "the dog" becomes a token, and "the cat" another one.

Tests. `merge` on overlaps; `learn` on small words full of ties, and on a text, against bpe.py.

Hint. itertools.pairwise gives neighbours, and "aaa" holds (a, a) twice; min() with the key
(-count, pair) breaks ties. When no pair is left, stop early.

Run:    pytest tests/exercises/test_5_bpe.py
Answer: bpe.py, section 1, `learn_plainly`, on str; `learn_merges` in section 3 is the fast way.
"""

from hypothesis import given
from hypothesis import strategies as st

import bpe

A, B, X = b"abx"


def merge(ids, pair, new_id):
    """The list ids with each pair in it replaced by new_id."""
    raise NotImplementedError("fill in merge: the task stands at the top of this file")


def learn(words, n_merges):
    """Up to n_merges pairs (a, b), in order. words: {the bytes of a word: how often it occurs}."""
    raise NotImplementedError("fill in learn: the task stands at the top of this file")


def test_one_merge():
    assert merge([A, B, X, A, B], (A, B), 256) == [256, X, 256]
    assert merge([X], (A, B), 256) == [X]


def test_a_merge_takes_overlapping_pairs_from_the_left():
    assert merge([A, A, A], (A, A), 256) == [256, A]
    assert merge([A, A, A, A], (A, A), 256) == [256, 256], "a byte is in one pair only"


def test_three_merges():
    merges = learn({b"aaab": 2, b"ab": 3}, 3)
    assert merges[0] == (A, B), "ab occurs 2 + 3 times, aa 2 * 2 times"
    assert merges == [(A, B), (A, A), (257, 256)], "a|a|ab is left after ab, then aa|ab"


def test_ties_go_to_the_smallest_pair():
    assert learn({b"xa": 1, b"ab": 1}, 9) == [(A, B), (X, A)], "once each: (a, b) < (x, a)"


def test_it_equals_bpe_on_a_text():
    text = "she sells sea shells by the sea shore, and the shells she sells are sea shells"
    words = {word.encode(): count for word, count in bpe.count_words([text]).items()}
    assert learn(words, 30) == bpe.Tokenizer.train([text], 257 + 30).merges


@given(st.dictionaries(st.text("ab", min_size=1, max_size=9), st.integers(1, 3), max_size=5))
def test_it_equals_bpe_where_everything_overlaps(counts):
    words = {word.encode(): count for word, count in counts.items()}
    assert learn(words, 8) == bpe.learn_merges(counts, 8)
