import random

import pytest
import torch

from sliderquant.calibration.blocks import consecutive_blocks, document_blocks, random_blocks, sample
from sliderquant.calibration.records import Conversation
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
    for row in (random_blocks(documents, Bytes(), samples=1, seqlen=6, seed=seed)[0].tolist() for seed in range(40)):
        crop = "".join(map(chr, row))
        assert crop in "0123456789" or crop in "abcdefghij"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text("short.txt", ("abc",), running=True), r"'short.txt': 3 tokens are shorter than one block of 5"),
        (Text("short.jsonl", ("ab", "de"), running=False), r"'short.jsonl': its 2 documents have 4 tokens together"),
        (Text("no.txt", ("",), running=True), r"'no.txt': 0 tokens are shorter"),
    ],
)
def test_too_short_is_an_error(text, message):
    with pytest.raises(InputError, match=message):
        random_blocks(text, Bytes(), samples=2, seqlen=5, seed=0)


def test_the_c4_protocol_draws_a_document_and_then_its_crop():
    """Documents that are too short are drawn and left, and drawn again, as the published code does."""
    documents = Text("d", ("0123456789", "abc", "abcdefghij", "exac"), running=False)
    for seed, count in ((0, 256), (2, 4)):  # of more, they cover less than half, and calibration joins them
        generator = random.Random(seed)
        want = []
        while len(want) < count:
            document = documents.documents[generator.randrange(4)]
            if len(document) > 4:
                start = generator.randint(0, len(document) - 4 - 1)
                want.append(document[start : start + 4])
        blocks = document_blocks(documents, Bytes(), 4) if seed == 0 else sample(documents, Bytes(), count, 4, seed)
        assert ["".join(map(chr, row)) for row in blocks.tokens.tolist()] == want
        assert blocks.notes == ()


class Counted(Bytes):
    """Tokenizes no text twice."""

    def __init__(self):
        self.seen = []

    def __call__(self, text, **arguments):
        assert text not in self.seen
        self.seen.append(text)
        return super().__call__(text, **arguments)


def test_each_document_is_tokenized_once_at_most():
    documents = Text("d", (*(f"{i:03}" for i in range(200)), "0123456789"), running=False)
    assert sample(documents, Counted(), 20, 6, 0).tokens.shape == (20, 6)
    assert sample(documents, Counted(), 20, 12, 0).tokens.shape == (20, 12)


def test_short_documents_are_joined_and_this_is_said_once():
    documents = Text("d", ("abc", "", "de", "fg|", "hi"), running=False)
    tokenizer = Bytes()
    tokenizer.eos_token_id = ord("|")
    blocks = document_blocks(documents, tokenizer, 4)
    assert ["".join(map(chr, row)) for row in blocks.tokens.tolist()] == ["abc|", "de|f", "g|hi"]
    (note,) = blocks.notes
    assert "none of its 5 documents is longer than one block of 4 tokens: all are joined" in note
    drawn = sample(documents, tokenizer, 30, 5, seed=1)
    assert all("".join(map(chr, row)) in "abc|de|fg|hi" for row in drawn.tokens.tolist())
    assert len(drawn.notes) == 1
    assert torch.equal(drawn.tokens, sample(documents, tokenizer, 30, 5, seed=1).tokens)
    # A token that the model does not have is not put in.
    assert document_blocks(Text("d", ("ab", "cd"), running=False), tokenizer, 4, 120).tokens.shape == (1, 4)


def test_one_long_document_does_not_stand_for_all():
    """Chats are shorter than a sample, but for one."""
    short = tuple(chr(200 + index) * 30 for index in range(50))
    documents = Text("d", (*short, ALPHABET), running=False)
    drawn = sample(documents, Bytes(), 8, 32, seed=0)
    assert drawn.distinct > 100
    (note,) = drawn.notes
    assert "only 1 of its 51 documents is longer than one block of 32 tokens, too few for 8 blocks: all are" in note
    # Few samples are covered by it, and where there are only long ones, nothing is gained by joining.
    assert sample(documents, Bytes(), 1, 32, seed=0).notes == ()
    assert sample(Text("d", (ALPHABET, ""), running=False), Bytes(), 100, 32, seed=0).notes == ()


@pytest.mark.parametrize(("samples", "seqlen"), [(1, 5), (3, 40), (200, 7), (50, 100)])
def test_places_that_samples_cover_count_once(samples, seqlen):
    text = Text("t", (ALPHABET,), running=True)
    blocks = sample(text, Bytes(), samples, seqlen, seed=3)
    assert blocks.distinct == len({token for row in blocks.tokens.tolist() for token in row})  # all characters differ


class Named(Bytes):
    def __len__(self):
        return 200

    def convert_ids_to_tokens(self, index):
        return chr(index)


@pytest.mark.parametrize("running", [True, False])
def test_tokens_beyond_the_vocabulary_are_named(running):
    text = Text("t.txt", ("abcdefghijklz" * 3,), running)
    message = (
        r"'t.txt'.*: token 122 \('z'\) is beyond the model's vocabulary of 122, whose ids end at 121: the tokenizer"
    )
    for take in (
        lambda limit: sample(text, Named(), 2, 4, 0, limit),
        lambda limit: (consecutive_blocks if running else document_blocks)(text, Named(), 4, limit),
    ):
        assert take(123).tokens.shape[1] == 4
        with pytest.raises(InputError, match=message):
            take(122)


class Chats(Bytes):
    chat_template = "a template"

    def apply_chat_template(self, messages, tools, tokenize, return_dict, verbose):
        assert (tokenize, return_dict, tools) == (True, False, None)
        if messages[0]["role"] == "system":
            raise ValueError("no system messages, please")
        return [ord(c) for message in messages for c in f"<{message['role'][0]}{message['content']}>"]


def test_conversations_go_through_the_chat_template():
    chat = Conversation(({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}))
    assert (chat.strip(), len(chat)) == ("hellohi", 7)
    blocks = sample(Text("c", (chat,), running=False), Chats(), 20, 6, 0)
    assert all("".join(map(chr, row)) in "<uhello><ahi>" for row in blocks.tokens.tolist())
    with pytest.raises(InputError, match=r"text 'c': document 0: .* has no chat template"):
        sample(Text("c", (chat,), running=False), Bytes(), 2, 6, 0)
    refused = Conversation(({"role": "system", "content": "x"},))
    with pytest.raises(InputError, match=r"document 0: .*template refuses these messages: no system messages, please"):
        sample(Text("c", (refused,), running=False), Chats(), 2, 6, 0)


def test_consecutive_blocks_drop_the_tail():
    blocks = consecutive_blocks(Text("t", ("abcdefgh",), running=True), Bytes(), 3).tokens
    assert ["".join(map(chr, row)) for row in blocks.tolist()] == ["abc", "def"]
    with pytest.raises(InputError, match="'t': 2 tokens are shorter than one block of 3"):
        consecutive_blocks(Text("t", ("ab",), running=True), Bytes(), 3)
