"""1: the text, its pieces, their ids."""

from markupsafe import Markup

from npllama.explore.figures.text import pieces_strip
from npllama.explore.labels import SPACE, count
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.tokenizer import Tokenizer


def section(run: Record) -> Section:
    n, size = len(run.ids), run.config.vocab_size
    return Section(
        slug="text",
        title="Text, pieces, ids",
        idea=(
            say(
                "A model multiplies matrices, and a text is not a matrix. The tokenizer cuts the "
                "text into <em>pieces</em> from a fixed vocabulary and replaces each piece by its "
                "number, the <em>id</em>. A piece with its id is a <em>token</em>."
            ),
            say(
                "A frequent word is one piece, and a rare word is several. Letters alone would "
                "make texts many tokens long, and whole words alone would need an endless "
                "vocabulary. A character that the vocabulary lacks is spelled in bytes, so every "
                "text has ids. The mark {space} stands for a space. {bos} is the token that "
                "begins a text.",
                space=piece(SPACE),
                bos=piece(run.piece(run.config.bos_id)),
            ),
        ),
        equations=(
            r"\text{text} \;\mapsto\; (i_0, \dots, i_{N-1}), \qquad i_t \in \{0, \dots, V - 1\}",
        ),
        functions=(
            Function(
                Tokenizer.encode_prompt,
                ("test_a_prompt_has_bos_and_eos_as_asked_and_an_empty_one_bos_alone",),
                "Sennrich et al. 2016 (byte-pair encoding); Kudo & Richardson 2018 (SentencePiece)",
            ),
            Function(
                Tokenizer.encode,
                ("test_ids_and_text_are_sentencepieces_whatever_it_does_with_spaces",),
                "Kudo & Richardson 2018 (SentencePiece)",
            ),
        ),
        shapes=(shape("ids", "N", n),),
        parts=(
            Picture(
                pieces_strip(run.window_text or "", run.pieces, list(run.ids[run.start :])),
                say(
                    "{what} cut into pieces, with the id of each piece below it.",
                    what=f"The last {len(run.pieces)} tokens," if run.start else "The text is",
                ),
            ),
        ),
        see=(
            *_see(run),
            say(
                "The vocabulary of this model has {v} pieces. With more pieces a text needs fewer "
                "tokens, and the embedding needs more rows.",
                v=f"{size:,}",
            ),
        ),
    )


def divided_word(pieces: list[str]) -> list[str]:
    """The pieces of the first word of letters that is divided; empty if there is none."""
    word: list[str] = []
    for text in [*pieces, SPACE]:
        if text.startswith(SPACE):
            if len(word) > 1:
                return word
            word = [text] if text.removeprefix(SPACE).isalpha() else []
        elif word and text.isalpha():
            word.append(text)
        else:  # punctuation ends the word
            if len(word) > 1:
                return word
            word = []
    return []


def _see(run: Record) -> tuple[Markup, ...]:
    if not run.has_tokenizer:
        return (
            say(
                "This model has no tokenizer, so the page shows ids without pieces. Put the "
                "checkpoint's <code>tokenizer.model</code> or <code>tokenizer.json</code> into "
                "the model directory to see the pieces."
            ),
        )
    seen = []
    if run.prompt:
        has_bos = run.ids[0] == run.config.bos_id
        seen.append(
            say(
                "The prompt of {characters} became {tokens}{begin}.",
                characters=count(len(run.prompt), "character"),
                tokens=count(len(run.ids), "token"),
                begin=", including the one that begins the text" if has_bos else "",
            )
        )
    else:
        seen.append(say("The prompt is {n}.", n=count(len(run.ids), "token")))
    if word := divided_word(run.pieces):
        seen.append(
            say(
                "The word {word} is {n} pieces: {pieces}.",
                word=piece("".join(word).removeprefix(SPACE)),
                n=len(word),
                pieces=Markup(" ").join(map(piece, word)),
            )
        )
    return tuple(seen)
