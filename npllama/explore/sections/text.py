"""1: the text, its pieces, their ids."""

from npllama.explore.figures.text import pieces_strip
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, count, piece, say, shape
from npllama.tokenizer import Tokenizer


def section(run: Record) -> Section:
    n, size = len(run.ids), run.config.vocab_size
    return Section(
        slug="text",
        title="Text, pieces, ids",
        idea=(
            say(
                "A model multiplies matrices, and a text is not a matrix. The tokenizer first "
                "cuts the text into <em>pieces</em> from a fixed vocabulary and replaces each "
                "piece by its number, the <em>id</em>. One piece and its id are a "
                "<em>token</em>."
            ),
            say(
                "A frequent word is one piece. A rare word is several. A character that the "
                "vocabulary lacks is spelled byte by byte, so every text has ids. The mark "
                "{space} stands for a space; {bos} is the token that begins a text.",
                space=piece("▁"),
                bos=piece(run.piece(run.config.bos_id)),
            ),
        ),
        equations=(
            r"\text{text} \;\mapsto\; (i_1, \dots, i_N), \qquad i_n \in \{0, \dots, V - 1\}",
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
                    "{what} cut into pieces; below each piece is its id.",
                    what=f"The last {len(run.pieces)} tokens," if run.start else "The text is",
                ),
            ),
        ),
        see=(
            *_see(run),
            say(
                "This vocabulary has {v} pieces, LLaMA-2's own has 32,000. With more pieces a text "
                "needs fewer tokens, and the embedding more rows.",
                v=f"{size:,}",
            ),
        ),
    )


def _see(run: Record) -> tuple:
    n = len(run.ids)
    if not run.has_tokenizer:
        return (
            say(
                "This model has no tokenizer, so the page shows ids and no pieces. Put the "
                "checkpoint's <code>tokenizer.model</code> or <code>tokenizer.json</code> into "
                "the model directory to see them."
            ),
        )
    if not run.prompt:
        return (say("The prompt is {n}.", n=count(n, "token")),)
    return (
        say(
            "The prompt of {characters} became {tokens}: {each:.1f} characters per token.",
            characters=count(len(run.prompt), "character"),
            tokens=count(n, "token"),
            each=len(run.prompt) / n,
        ),
    )
