"""Documents -> token ids that the model has."""

from typing import Any

import torch
from torch import Tensor

from sliderquant.calibration.records import Conversation, Document
from sliderquant.calibration.text import Text
from sliderquant.errors import InputError

__all__ = ["Tokens", "check_tokens", "tokenize", "vocabulary_of"]


def vocabulary_of(source: Any) -> int:
    """Rows of the embedding of a `ModelSource`: the model takes the ids below."""
    embedding = source.shapes.get(f"{source.family.embedding}.weight")
    return int(source.config.vocab_size if embedding is None else embedding[0][0])


def check_tokens(ids: Tensor, vocabulary: int | None, tokenizer: Any, what: str) -> None:
    """Raises InputError, which starts with `what`, when ids have no row in an embedding of `vocabulary` rows."""
    if vocabulary is None or ids.numel() == 0:
        return
    beyond = ids[ids >= vocabulary]
    if beyond.numel() == 0:
        return
    first = int(beyond[0])
    size = len(tokenizer)
    raise InputError(
        f"{what}: token {first} ({tokenizer.convert_ids_to_tokens(first)!r}) is beyond the model's vocabulary of "
        f"{vocabulary}, whose ids end at {vocabulary - 1}: the tokenizer has {size} tokens, and the embedding was not "
        f"resized when they were added; use the tokenizer that the model was saved with, or call "
        f"resize_token_embeddings({max(size, first + 1)}) in transformers and save the model again"
    )


def tokenize(document: Document, tokenizer: Any) -> Tensor:
    """Token ids int64 `[tokens]` of a whole document, with the tokenizer's defaults; of a conversation, by its chat
    template.

    Raises:
        InputError: there is no chat template, or it does not take these messages.
    """
    if isinstance(document, str):
        return tokenizer(document, return_tensors="pt", verbose=False).input_ids[0].to(torch.int64)
    return _by_template(document, tokenizer)


def _by_template(conversation: Conversation, tokenizer: Any) -> Tensor:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "holds messages, and the model's tokenizer has no chat template to make text of them: use a model with "
            'one, or write each conversation as one string, {"text": "..."}'
        )
    tools = None if conversation.tools is None else list(conversation.tools)
    try:
        ids = tokenizer.apply_chat_template(
            list(conversation.messages), tools=tools, tokenize=True, return_dict=False, verbose=False
        )
    except Exception as error:  # a template is a program of its own
        raise InputError(f"the model's chat template refuses these messages: {' '.join(str(error).split())}") from error
    return torch.tensor(ids, dtype=torch.int64)


class Tokens:
    """The token ids of a text's documents. Each document is tokenized when it is first asked for, and never again."""

    def __init__(self, text: Text, tokenizer: Any, vocabulary: int | None = None) -> None:
        self.text, self.tokenizer, self.vocabulary = text, tokenizer, vocabulary
        self._known: dict[int, Tensor] = {}

    def of(self, index: int) -> Tensor:
        """Of one document, int64 `[tokens]`.

        Raises:
            InputError: it cannot be tokenized, or has tokens that the model does not have.
        """
        if index in self._known:
            return self._known[index]
        what = f"text {self.text.name!r}" + ("" if self.text.running else f": document {index}")
        try:
            ids = tokenize(self.text.documents[index], self.tokenizer)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error.__cause__
        check_tokens(ids, self.vocabulary, self.tokenizer, what)
        self._known[index] = ids
        return ids

    def joined(self) -> Tensor:
        """Of all documents one after the other, int64 `[tokens]`, with the tokenizer's end-of-text token between them
        where it has one."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        if not isinstance(end, int) or (self.vocabulary is not None and end >= self.vocabulary):
            end = None
        parts: list[Tensor] = []
        for index, document in enumerate(self.text.documents):
            # A chat template marks the end itself.
            if end is not None and parts and isinstance(document, str) and int(parts[-1][-1]) != end:
                parts.append(torch.tensor([end]))
            ids = self.of(index)
            if len(ids):
                parts.append(ids)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
