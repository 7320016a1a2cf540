"""Text, tokenizer and batches of tools/train.py: the inputs of each training step."""

import numpy as np
import pytest

from conftest import data_file
from npllama.errors import InputError
from npllama.tokenizer import Tokenizer
from training.batches import Batches
from training.stories import encode_stories, is_complete, read_stories
from training.tokenizer import train_tokenizer

STORIES = [
    "Once upon a time, there was a dog.\nIt ran to the park and found a red ball.",
    'The cat said, "No!"',
    "Tom was sad. He saw 12 birds in the",
] * 20


def write(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_bytes(train_tokenizer(STORIES, 300))


# -- stories


def test_stories_are_parted_by_lines_of_the_separator(tmp_path):
    text = "One.\nTwo.\n<|endoftext|>\nThree <|endoftext|> four.\n<|endoftext|>\n\n<|endoftext|>\n"
    assert read_stories(write(tmp_path, text)) == ["One.\nTwo.", "Three <|endoftext|> four."]


@pytest.mark.parametrize(
    "text",
    [
        "A cat.\n{s}\nA dog.",
        "A cat.\n{s}\n{s}\nA dog.\n",
        "{s}\n{s}\nA cat.\n{s}\n{s}\n{s}\n\n{s}\nA dog.\n{s}\n{s}",
        "A cat.\r\n{s}\r\n{s}\r\nA dog.\r\n",
    ],
)
def test_empty_stories_are_left_out(tmp_path, text):
    path = write(tmp_path, text.format(s="<|endoftext|>"))
    assert read_stories(path) == ["A cat.", "A dog."]


def test_a_text_without_a_separator_is_one_story(tmp_path):
    assert read_stories(write(tmp_path, "a\n\nb\n")) == ["a\n\nb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"\n<|endoftext|>\n", "holds no text"),
        (b"ab\xff\xfe", "not UTF-8 at byte 2"),
    ],
)
def test_a_text_that_is_none_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_stories(write(tmp_path, content))


def test_a_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_stories(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("story", "complete"),
    [
        ("The end.", True),
        ("The end!\n", True),
        ('"Is it?"', True),
        ("(It is.)", True),
        ("\u201cIt is.\u201d", True),
        ("He saw the", False),
        ("He saw,", False),
        ("", False),
    ],
)
def test_a_story_is_complete_where_it_ends_as_a_sentence(story, complete):
    assert is_complete(story) == complete


def test_only_a_complete_story_ends_with_eos(tokenizer):
    done, cut = encode_stories(["The cat.", "The cat"], tokenizer)
    assert done[0] == cut[0] == tokenizer.bos_id == 1
    assert done[-1] == tokenizer.eos_id == 2
    assert 2 not in cut
    assert done.dtype == np.int32
    assert tokenizer.decode(cut.tolist()) == "The cat"


# -- tokenizer


def test_the_tokenizer_is_of_llamas_kind(tokenizer):
    assert tokenizer.vocab_size == 300
    processor = tokenizer.processor
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == [
        "<unk>", "<s>", "</s>", "<0x00>", "<0xFF>",
    ]  # fmt: skip
    assert tokenizer.encode("\n")[-1] == 13
    assert tokenizer.decode(tokenizer.encode("A 🦙  and\n two")) == "A 🦙  and\n two"
    digits = [processor.id_to_piece(i) for i in tokenizer.encode("1212", bos=False)]
    assert [piece.strip("\u2581") for piece in digits if piece != "\u2581"] == ["1", "2", "1", "2"]


def test_the_same_text_trains_the_same_tokenizer():
    assert train_tokenizer(STORIES, 300) == train_tokenizer(STORIES, 300)


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_vocabulary_that_does_not_fit_the_text_is_refused(size):
    with pytest.raises(InputError, match=f"no tokenizer of {size} pieces") as error:
        train_tokenizer(STORIES, size)
    assert "\n" not in str(error.value)


def test_a_line_longer_than_sentencepiece_reads_is_cut_at_a_space():
    assert train_tokenizer([" ".join(STORIES[:3]) * 20_000], 300)
    from training.tokenizer import _parts

    line = "  two words" * 20_000 + " "
    parts = list(_parts(line))
    assert "".join(parts) == line
    assert len(parts) > 2
    assert all(len(part) <= 2**16 for part in parts)


# -- batches


def sequences(rng, lengths):
    """Sequences of distinct ids, so that each id shows where it came from."""
    ids = iter(range(3, 10**6))
    return [np.array([1, *(next(ids) for _ in range(n - 1))], dtype="int32") for n in lengths]


def batches_of(given, **changes):
    settings = {"context": 16, "batch": 4, "micro_batch": 2, "packed": False, "seed": 0}
    return Batches(given, **(settings | changes))


def test_an_epoch_reads_every_target_of_every_story_once(rng):
    given = sequences(rng, rng.integers(2, 17, 40))
    batches = batches_of(given)
    assert batches.steps_per_epoch == 10
    for epoch in (0, 1):
        seen = []
        for step in range(10):
            for part in batches.step(epoch * 10 + step):
                for tokens, targets, weights in zip(
                    part.tokens, part.targets, part.weights, strict=True
                ):
                    n = np.count_nonzero(weights)
                    assert (weights[n:] == 0).all()
                    assert tokens[0] == 1
                    assert (tokens[1:n] == targets[: n - 1]).all()
                    seen += targets[:n].tolist()
        assert sorted(seen) == sorted(i for ids in given for i in ids[1:])


def test_the_weights_of_a_step_are_equal_and_sum_to_1(rng):
    for part_of in (batches_of(sequences(rng, rng.integers(2, 17, 40))),):
        parts = part_of.step(3)
        weights = np.concatenate([part.weights.ravel() for part in parts])
        assert abs(weights.sum() - 1) < 1e-6
        assert len(np.unique(weights[weights > 0])) == 1


def test_rows_of_about_one_length_go_together(rng):
    parts = batches_of(sequences(rng, [3, 15, 4, 16] * 10), batch=8, micro_batch=4).step(0)
    assert [part.tokens.shape[0] for part in parts] == [4, 4]
    lengths = [np.count_nonzero(part.weights, axis=1) for part in parts]
    assert lengths[0].min() >= lengths[1].max()
    assert all(part.tokens.shape[1] == n.max() for part, n in zip(parts, lengths, strict=True))


def test_a_step_is_a_function_of_seed_and_number_alone(rng):
    given = sequences(rng, rng.integers(2, 17, 40))

    def read(steps, seed=0):
        batches = batches_of(given, seed=seed)
        return [np.concatenate([p.tokens.ravel() for p in batches.step(i)]) for i in steps]

    forward, backward = read(range(30)), read(reversed(range(30)))[::-1]
    assert all(map(np.array_equal, forward, backward))
    assert not np.array_equal(forward[0], forward[10])  # the next epoch has another order
    assert not np.array_equal(forward[0], read([0], seed=1)[0])


def test_a_story_longer_than_the_context_becomes_rows_that_lose_no_target(rng):
    (ids,) = given = sequences(rng, [40])
    rows = batches_of(given, batch=1).rows(0)
    assert max(map(len, rows)) == 17
    assert sorted(np.concatenate([row[1:] for row in rows])) == sorted(ids[1:])


def test_packed_rows_fill_the_context(rng):
    given = sequences(rng, rng.integers(2, 30, 40))
    total = sum(map(len, given))
    batches = batches_of(given, packed=True, batch=2)
    for epoch in (0, 1):
        rows = batches.rows(epoch)
        assert sorted(map(len, rows), reverse=True)[:-1] == [17] * (len(rows) - 1)
        assert sum(len(row) - 1 for row in rows) == total - 1
    assert not np.array_equal(batches.rows(0)[0], batches.rows(1)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_too_short_for_a_step_is_refused(rng, packed):
    with pytest.raises(InputError, match="choose a smaller --batch"):
        batches_of(sequences(rng, [5, 5]), batch=8, packed=packed)


def test_cut_off_stories_of_the_data_are_found():
    stories = read_stories(data_file("stories/train.txt"))
    assert len(stories) == 39_400
    assert 0.01 < sum(not is_complete(story) for story in stories) / len(stories) < 0.05
