"""Stop texts: the filter passes the same text as a search in the whole text, however the text is
divided into pieces."""

import itertools

import numpy as np
import pytest

from npllama.row import StopFilter


def before_the_first_stop(text, stops):
    """The text before the stop text that is complete first, or the longer one of two that end
    together."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


def through(stops, pieces):
    """The text that a filter passes until the first stop text, and whether it found one."""
    stop = StopFilter(stops)
    said = ""
    for piece in pieces:
        said += stop.push(piece)
        if stop.found:
            return said, True
    return said + stop.push("", final=True), stop.found


def all_splits(text):
    for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(at)]


CASES = [
    (["\n\n"], "one\n\ntwo"),
    (["User:"], "well. User: so"),
    (["aab"], "aaaab"),
    (["aab"], "aaab aab"),
    (["abab"], "abaabab"),
    (["aab"], "aaaa"),
    (["ab", "bc"], "xabcx"),
    (["abc", "b"], "xabcx"),
    (["b", "abc"], "xabcx"),
    (["abcd", "bx"], "abxabcd"),
    (["aa", "aaa"], "baaab"),
    (["end", "the end"], "at the end."),
    (["🦙é"], "a🦙🦙é."),
    (["xyz"], "xy"),
    (["x"], "xxxx"),
    ([], "no stops"),
    (["long stop text"], ""),
]


@pytest.mark.parametrize("stops, text", CASES)
def test_every_split_into_pieces_gives_what_a_search_in_the_whole_text_gives(stops, text):
    truth = before_the_first_stop(text, stops)
    for pieces in all_splits(text):
        assert through(stops, pieces) == truth, pieces


@pytest.mark.parametrize("stop, text", [(stops[0], text) for stops, text in CASES if stops])
def test_one_stop_is_a_find(stop, text):
    at = text.find(stop)
    truth = (text, False) if at < 0 else (text[:at], True)
    assert through([stop], [text]) == through([stop], list(text)) == truth


def test_random_texts_of_two_letters_are_cut_where_find_says():
    rng = np.random.default_rng(0)

    def word(shortest, longest):
        return "".join(rng.choice(["a", "b"], rng.integers(shortest, longest)))

    found = 0
    for _ in range(3000):
        stop, text = word(1, 7), word(0, 30)
        cuts = sorted(rng.integers(0, len(text) + 1, 6).tolist())
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        at = text.find(stop)
        truth = (text, False) if at < 0 else (text[:at], True)
        assert through([stop], pieces) == truth, (stop, pieces)
        several = [stop, *(word(2, 7) for _ in range(rng.integers(1, 4)))]
        assert through(several, pieces) == before_the_first_stop(text, several), (several, pieces)
        found += at >= 0
    assert 500 < found < 2500  # both with and without a stop text


def test_every_text_and_stop_of_two_letters_up_to_a_length():
    words = ["".join(w) for n in range(1, 7) for w in itertools.product("ab", repeat=n)]
    for stop in (word for word in words if len(word) <= 4):
        for text in words:
            at = text.find(stop)
            truth = (text, False) if at < 0 else (text[:at], True)
            assert through([stop], list(text)) == truth


def test_only_what_may_begin_a_stop_is_held():
    stop = StopFilter(["aab"])
    assert [stop.push(letter) for letter in "xaaacaa"] == ["x", "", "", "a", "aac", "", ""]
    assert not stop.found


def test_the_longest_beginning_of_any_stop_is_held():
    stop = StopFilter(["bc", "abd"])
    assert [stop.push(letter) for letter in "abx"] == ["", "", "abx"]
    assert stop.push("ab") == ""
    assert (stop.push("c"), stop.found) == ("a", True)


def test_what_was_held_is_released_at_the_end():
    stop = StopFilter(["abc"])
    assert (stop.push("xab"), stop.push("", final=True), stop.found) == ("x", "ab", False)


def test_the_last_piece_may_complete_a_stop_or_disappoint_it():
    stop = StopFilter(["abc"])
    assert (stop.push("xab"), stop.push("c", final=True), stop.found) == ("x", "", True)
    stop = StopFilter(["abc"])
    assert (stop.push("xab"), stop.push("ab", final=True), stop.found) == ("x", "abab", False)


def test_without_stops_everything_passes_at_once():
    stop = StopFilter([])
    assert [stop.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert stop.push("", final=True) == "" and not stop.found
