"""Tokens that no text makes, by their names."""

from collections.abc import Mapping

from npllama.tokenizer import Tokenizer


def special_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Name -> id of every token that no text makes: control pieces, the unknown one, and added
    tokens."""
    processor = tokenizer.processor
    pieces = range(tokenizer.vocab_size)
    ids = [id_ for id_ in pieces if processor.is_control(id_) or processor.is_unknown(id_)]
    names = {processor.id_to_piece(id_): id_ for id_ in ids}
    names |= {token.content: id_ for id_, token in tokenizer.added.items()}
    return {name: id_ for name, id_ in names.items() if name}
