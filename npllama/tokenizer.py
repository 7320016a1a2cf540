"""Text to ids and back: sentencepiece, and decoding as the ids arrive."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from npllama.errors import InputError, TokenizerError
from npllama.small_file import MAX_TOKENIZER, read_small_file

_SPACE = "\u2581"  # how a piece writes a space
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A sentencepiece model with Llama's ids: BOS 1, EOS 2, unknown 0, byte b at b + 3.

    Args:
        path: a tokenizer.model file.

    Raises:
        TokenizerError: there is no such file, or it is not a sentencepiece model.

    Control tokens are inserted by id and never found in text: "<s>" in a prompt is three
    ordinary characters.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            model = read_small_file(Path(path), MAX_TOKENIZER)
        except FileNotFoundError:
            raise TokenizerError(
                f"{path} does not exist: text needs the model's tokenizer.model; "
                "without it, pass token ids"
            ) from None
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        self._start(model, str(path))

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """From the contents of a tokenizer.model."""
        tokenizer = cls.__new__(cls)
        tokenizer._start(model, "the tokenizer")
        return tokenizer

    def _start(self, model: bytes, name: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError  # which sentencepiece takes for "nothing to load"
            processor.LoadFromSerializedProto(model)
            processor.id_to_piece(list(range(processor.vocab_size())))  # each is UTF-8
            processor.decode([processor.unk_id()])  # there is one, and its text is UTF-8
        except (RuntimeError, UnicodeDecodeError, IndexError):
            raise TokenizerError(
                f"{name} is not a sentencepiece model: expected the tokenizer.model that "
                "came with the checkpoint"
            ) from None
        space = processor.piece_to_id(_SPACE)
        decoded = [processor.decode([space] * n) for n in (1, 2)]
        if processor.id_to_piece(space) == _SPACE and decoded != ["", " "]:
            raise TokenizerError(
                f"{name} treats spaces otherwise than Llama's tokenizers (a dummy prefix, and all "
                "white space kept): expected the tokenizer.model of a LLaMA-2"
            )
        self.processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if self.bos_id < 0:
            raise TokenizerError(f"{name} has no BOS token: expected a Llama tokenizer")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, BOS first; the empty text is BOS alone.

        Raises:
            InputError: text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text is not valid UTF-8: pass it in UTF-8") from None
        try:
            ids = self.processor.encode(text)
        except UnicodeDecodeError:
            raise self._damaged() from None
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens have none, invalid UTF-8 is one U+FFFD a byte.

        Raises:
            InputError: an id that the tokenizer does not have.
        """
        for id_ in ids:
            self._check(id_)
        try:
            return self.processor.decode([int(id_) for id_ in ids])
        except UnicodeDecodeError:
            raise self._damaged() from None

    def piece(self, id_: int) -> str:
        """The vocabulary's entry for one id, as it is written there."""
        self._check(id_)
        return self.processor.id_to_piece(int(id_))

    def _damaged(self) -> TokenizerError:
        return TokenizerError("the tokenizer.model is damaged: get the file again")

    def _check(self, id_: int) -> None:
        if not 0 <= id_ < self.vocab_size:
            raise InputError(
                f"token id {id_} is not in the tokenizer's vocabulary of {self.vocab_size}"
            )


class StreamDecoder:
    """Decodes ids as they arrive: what `push` and at last `flush` return, joined, is
    `tokenizer.decode` of all the ids.

    Bytes of one character may arrive over several ids; they are held until they are a
    character or cannot become one. Each push costs the same, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._processor = tokenizer.processor
        self._bytes = b""  # of a character not yet whole
        self._at_start = True  # no text yet: the first piece loses its leading space

    def push(self, id_: int) -> str:
        """The text that this id makes certain; may be empty."""
        self._tokenizer._check(id_)
        id_ = int(id_)
        if self._processor.is_byte(id_):
            self._bytes += bytes([int(self._processor.id_to_piece(id_)[3:5], 16)])  # <0xHH>
            return self._started(self._whole_characters())
        text = self._started(self.flush())
        if self._processor.is_control(id_):
            return text
        if self._processor.is_unknown(id_):
            return text + self._started(self._processor.decode([id_]))
        piece = self._processor.id_to_piece(id_)
        if self._at_start and piece.startswith(_SPACE):
            piece = piece[1:]
            self._at_start = False
        return text + self._started(piece.replace(_SPACE, " "))

    def flush(self) -> str:
        """The end of the text: bytes still held can no longer become a character."""
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
                text += _REPLACEMENT  # one a byte, as sentencepiece does
                self._bytes = self._bytes[1:]
        return text


def _utf8_length(first: int) -> int:
    """Bytes of the character that begins with `first`; 1 where none can."""
    if 0xC2 <= first < 0xE0:
        return 2
    if 0xE0 <= first < 0xF0:
        return 3
    return 4 if 0xF0 <= first < 0xF5 else 1
