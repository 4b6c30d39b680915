import random

import pytest
import torch

from sliderquant.calibration.blocks import consecutive_blocks, document_crops, random_blocks
from sliderquant.calibration.text import Text
from sliderquant.errors import InputError


class Bytes:
    """A tokenizer with one token a character."""

    def __call__(self, text, return_tensors, verbose):
        assert (return_tensors, verbose) == ("pt", False)
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) for c in text]], dtype=torch.int64)})()


ALPHABET = "".join(map(chr, range(65, 165)))


def test_random_blocks_are_crops_of_the_text_and_follow_the_seed():
    text = Text("t", (ALPHABET,), running=True)
    blocks = random_blocks(text, Bytes(), samples=50, seqlen=7, seed=2)
    assert blocks.shape == (50, 7)
    assert all("".join(map(chr, row)) in ALPHABET for row in blocks.tolist())
    assert torch.equal(blocks, random_blocks(text, Bytes(), 50, 7, 2))
    assert not torch.equal(blocks, random_blocks(text, Bytes(), 50, 7, 3))
    starts = [random.Random(2).randint(0, 93)]
    assert blocks[0, 0] == ord(ALPHABET[starts[0]])


def test_a_text_of_exactly_one_block_works():
    assert random_blocks(Text("t", ("abcd",), running=True), Bytes(), 3, 4, 0).tolist() == [[97, 98, 99, 100]] * 3


def test_documents_are_not_joined():
    documents = Text("d", ("short", "0123456789", "x", "abcdefghij"), running=False)
    blocks = random_blocks(documents, Bytes(), samples=40, seqlen=6, seed=1)
    for row in blocks.tolist():
        crop = "".join(map(chr, row))
        assert crop in "0123456789" or crop in "abcdefghij"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text("short.txt", ("abc",), running=True), r"'short.txt': 3 tokens are shorter than one block of 5"),
        (Text("short.jsonl", ("abc", "de"), running=False), r"'short.jsonl': none of its 2 documents is longer"),
    ],
)
def test_too_short_is_an_error(text, message):
    with pytest.raises(InputError, match=message):
        random_blocks(text, Bytes(), samples=2, seqlen=5, seed=0)


def test_the_c4_protocol_draws_a_document_and_then_its_crop():
    documents = Text("d", ("0123456789", "abcdefghij"), running=False)
    generator = random.Random(0)
    want = []
    for _ in range(5):
        document = documents.documents[generator.randrange(2)]
        start = generator.randint(0, 10 - 4 - 1)
        want.append(document[start : start + 4])
    got = document_crops(documents, Bytes(), 5, 4, random.Random(0))
    assert ["".join(map(chr, row)) for row in got.tolist()] == want


def test_consecutive_blocks_drop_the_tail():
    blocks = consecutive_blocks("abcdefgh", Bytes(), 3, "t")
    assert ["".join(map(chr, row)) for row in blocks.tolist()] == ["abc", "def"]
    with pytest.raises(InputError, match="'t': 2 tokens are shorter than one block of 3"):
        consecutive_blocks("ab", Bytes(), 3, "t")
