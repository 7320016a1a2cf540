"""Encodes text as token ids with sentencepiece, and decodes ids, also as they arrive."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import sentencepiece

from npllama.errors import InputError, TokenizerError
from npllama.small_file import MAX_TOKENIZER, read_small_file
from npllama.tokenizer_json import sentencepiece_from_json

_SPACE = "\u2581"  # the character for a space inside a piece
_REPLACEMENT = "\ufffd"
_NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])
"""ModelProto.normalizer_spec.add_dummy_prefix = false. A field that follows a serialized message
replaces the same field of the message."""


class Lost(Enum):
    """Which pieces lose their leading space while the decoded text is still empty."""

    NONE = 0  # the model adds no dummy prefix
    OF_FIRST_PIECE = 1  # Llama: decoding removes the dummy prefix
    OF_EVERY_PIECE = 2  # sentencepiece's default: the model also removes extra spaces


@dataclass(frozen=True)
class AddedToken:
    """A token that fine-tuning added to the tokenizer's pieces.

    Attributes:
        content: its text.
        special: whether it is a control token, such as an end of text, which decodes to "".
    """

    content: str
    special: bool


class Tokenizer:
    """A sentencepiece model with Llama's ids: unknown 0, BOS 1, EOS 2, byte b at b + 3.

    `encode` never produces control or added tokens: "<s>" in a text is three ordinary characters.
    Callers insert these tokens by id.

    Args:
        path: a tokenizer.model file, or a tokenizer.json of Llama's kind
            (see npllama.tokenizer_json).

    Attributes:
        vocab_size: number of pieces of the sentencepiece model.
        added: id -> added token; see `for_model`.
        n_ids: number of ids that decode. An id that is neither a piece nor an added token decodes
            to "".
        add_bos, add_eos: whether `encode_prompt` puts BOS first and EOS last.

    Raises:
        TokenizerError: the file does not exist, or is not a sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            if path.suffix == ".json" and path.exists():
                model = sentencepiece_from_json(path)
            else:
                model = read_small_file(path, MAX_TOKENIZER)
        except FileNotFoundError:
            raise TokenizerError(
                f"{path} does not exist: copy tokenizer.model from where the weights came from, "
                "or pass token ids, which need no tokenizer"
            ) from None
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        self._start(model, str(path))

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """A tokenizer from the contents of a tokenizer.model file."""
        tokenizer = cls.__new__(cls)
        tokenizer._start(model, "the tokenizer")
        return tokenizer

    def _start(self, model: bytes, name: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError  # sentencepiece takes empty bytes for "nothing to load"
            processor.LoadFromSerializedProto(model)
            pieces = processor.id_to_piece(list(range(processor.vocab_size())))  # checks UTF-8
            processor.decode([processor.unk_id()])  # checks that it exists, and its UTF-8
        except (RuntimeError, UnicodeDecodeError, IndexError):
            raise TokenizerError(
                f"{name} is not a sentencepiece model: expected the tokenizer.model that "
                "came with the checkpoint"
            ) from None
        self.processor = processor
        self._continuing: sentencepiece.SentencePieceProcessor | None = None
        self.leading_spaces_lost = _leading_spaces_lost(processor, pieces)
        self.vocab_size: int = processor.vocab_size()
        self.n_ids = self.vocab_size
        self.added: Mapping[int, AddedToken] = {}
        self.add_bos, self.add_eos = True, False
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if self.bos_id < 0:
            raise TokenizerError(f"{name} has no BOS token: expected a Llama tokenizer")

    def __repr__(self) -> str:
        return (
            f"<Tokenizer of {self.vocab_size} pieces and {len(self.added)} added tokens, "
            f"BOS {self.bos_id}, EOS {self.eos_id}>"
        )

    def for_model(
        self,
        n_ids: int,
        end_ids: Collection[int] = (),
        added: Mapping[int, AddedToken] | None = None,
    ) -> "Tokenizer":
        """A copy of this tokenizer for a model with `n_ids` embedding rows, which may exceed the
        number of pieces.

        Args:
            end_ids: ids that end a text; they decode to "".
            added: id -> added token; None keeps the current ones. An entry for a control piece
                with `special` False makes that piece decode to its text. Entries for other pieces
                have no effect.
        """
        tokenizer = copy.copy(self)
        tokenizer.n_ids = max(n_ids, self.vocab_size)
        added = self.added if added is None else added
        tokenizer.added = {
            id_: AddedToken(token.content, token.special or id_ in end_ids)
            for id_, token in added.items()
            if self.vocab_size <= id_ < tokenizer.n_ids or self._is_named_control(id_, token)
        }
        return tokenizer

    def _is_named_control(self, id_: int, token: AddedToken) -> bool:
        return (
            0 <= id_ < self.vocab_size
            and id_ not in (self.bos_id, self.eos_id)
            and self.processor.is_control(id_)
            and self.processor.id_to_piece(id_) == token.content
        )

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, with BOS first unless `bos` is False. The empty text is BOS alone.

        Raises:
            InputError: the text is not valid Unicode (it has a lone surrogate).
        """
        ids = self._encode(self.processor, text)
        return [self.bos_id, *ids] if bos else ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that continues another one, without the space that `encode` puts first.

        Raises:
            InputError: text that is not valid Unicode (a lone surrogate).
        """
        if self._continuing is None:
            processor = sentencepiece.SentencePieceProcessor()
            model = self.processor.serialized_model_proto() + _NO_DUMMY_PREFIX
            processor.LoadFromSerializedProto(model)
            self._continuing = processor  # only now, because other threads may use it
        return self._encode(self._continuing, text)

    def _encode(self, processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text is not valid UTF-8: pass it in UTF-8") from None
        try:
            return processor.encode(text)
        except UnicodeDecodeError:
            raise self._damaged() from None

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with BOS and EOS as `add_bos` and `add_eos` say.

        A text that has no ids of its own, such as the empty text, always gives BOS alone.
        """
        ids = self.encode(text, bos=False)
        if not ids:
            return [self.bos_id]
        before = [self.bos_id] if self.add_bos else []
        return before + ids + ([self.eos_id] if self.add_eos and self.eos_id >= 0 else [])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`.

        Control tokens decode to "", other added tokens to their content. Each byte of invalid
        UTF-8 decodes to one U+FFFD.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        for id_ in ids:
            self._check(id_)
        try:
            if any(self.added_text(id_) is not None for id_ in ids):
                decoder = StreamDecoder(self)
                return "".join([decoder.push(id_) for id_ in ids]) + decoder.flush()
            return self.processor.decode([int(id_) for id_ in ids])
        except UnicodeDecodeError:
            raise self._damaged() from None

    def piece(self, id_: int) -> str:
        """The vocabulary's entry for one id as it is written there; "" if the id has no entry."""
        self._check(id_)
        if id_ >= self.vocab_size:
            token = self.added.get(int(id_))
            return "" if token is None else token.content
        return self.processor.id_to_piece(int(id_))

    def added_text(self, id_: int) -> str | None:
        """The text that an added token decodes to; None if the id decodes as a piece."""
        token = self.added.get(int(id_))
        if token is None:
            return None if id_ < self.vocab_size else ""
        return "" if token.special else token.content

    def _damaged(self) -> TokenizerError:
        return TokenizerError("the tokenizer.model is damaged: get the file again")

    def _check(self, id_: int) -> None:
        if not 0 <= id_ < self.n_ids:
            raise InputError(
                f"token id {id_} is not in the tokenizer's vocabulary of {self.n_ids}: expected an "
                "id from 0, below that number"
            )


class StreamDecoder:
    """Decodes ids as they arrive. The texts that `push` and finally `flush` return, joined, are
    `tokenizer.decode` of all ids.

    The bytes of one character may arrive over several ids. The decoder holds them until they are a
    character or can no longer become one. The cost per push does not depend on the text's length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._processor = tokenizer.processor
        self._bytes = b""  # of an incomplete character
        self._at_start = True  # no text yet, so the first piece may lose its leading space

    def push(self, id_: int) -> str:
        """Add an id and return the text that has become certain; it may be empty."""
        self._tokenizer._check(id_)
        id_ = int(id_)
        is_piece = id_ < self._tokenizer.vocab_size
        if is_piece and self._processor.is_byte(id_):
            self._bytes += bytes([int(self._processor.id_to_piece(id_)[3:5], 16)])  # <0xHH>
            return self._started(self._whole_characters())
        text = self._started(self.flush())
        added = self._tokenizer.added_text(id_)
        if added is not None:
            return text + self._started(added)
        if self._processor.is_control(id_):
            return text
        if self._processor.is_unknown(id_):
            return text + self._started(self._processor.decode([id_]))
        piece = self._processor.id_to_piece(id_)
        lost = self._tokenizer.leading_spaces_lost
        if self._at_start and lost is not Lost.NONE and piece.startswith(_SPACE):
            piece = piece[1:]
            self._at_start = lost is Lost.OF_EVERY_PIECE  # the text may still be empty
        return text + self._started(piece.replace(_SPACE, " "))

    @property
    def is_whole(self) -> bool:
        """Whether `push` has returned the text of all ids, and holds no bytes back."""
        return not self._bytes

    def flush(self) -> str:
        """Return the rest of the text; incomplete characters become U+FFFD."""
        return self._whole_characters(final=True)

    def _started(self, text: str) -> str:
        if text:
            self._at_start = False
        return text

    def _whole_characters(self, final: bool = False) -> str:
        text = ""
        while self._bytes:
            length = _utf8_length(self._bytes[0])
            try:
                text += self._bytes[:length].decode("utf-8")
                self._bytes = self._bytes[length:]
            except UnicodeDecodeError as error:
                if not final and error.reason == "unexpected end of data":
                    break  # the next ids may complete it
                text += _REPLACEMENT  # one per byte, as sentencepiece does
                self._bytes = self._bytes[1:]
        return text


def _utf8_length(first: int) -> int:
    """Length in bytes of the UTF-8 character that begins with `first`; 1 if it is invalid."""
    if 0xC2 <= first < 0xE0:
        return 2
    if 0xE0 <= first < 0xF0:
        return 3
    return 4 if 0xF0 <= first < 0xF5 else 1


def _leading_spaces_lost(
    processor: sentencepiece.SentencePieceProcessor, pieces: Sequence[str]
) -> Lost:
    """Find out by decoding a piece twice, because sentencepiece does not expose this setting."""
    spaced = [i for i, piece in enumerate(pieces) if piece.startswith(_SPACE)]
    spaced.sort(key=lambda i: len(pieces[i]))
    has_text = (i for i in spaced if not (processor.is_control(i) or processor.is_unknown(i)))
    # a piece that is only a space distinguishes all three; others cannot show OF_EVERY_PIECE
    id_ = next(has_text, None)
    if id_ is None:
        return Lost.NONE
    decoded = processor.decode([id_, id_])
    whole = pieces[id_].replace(_SPACE, " ")
    if decoded == whole + whole:
        return Lost.NONE
    return Lost.OF_FIRST_PIECE if decoded == whole[1:] + whole else Lost.OF_EVERY_PIECE
