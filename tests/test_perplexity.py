"""tools/perplexity.py, compared with perplexities computed directly from logits."""

import json
import math

import numpy as np
import pytest

import npllama
import perplexity
from conftest import TINY, make_llama, make_ops
from model_directory import random_tensors, write_model


@pytest.fixture
def llama():
    return make_llama(make_ops("numpy"))


def surprise(llama, ids):
    """-log p of every id after the first, from one forward, in float64."""
    logits = llama.logits(ids[:-1]).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]]


def test_a_text_is_scored_on_every_id_after_bos_and_all_its_bytes(llama):
    text = "A dog, and 🦙."
    ids = llama.encode(text)
    score = perplexity.score(llama, text)
    truth = surprise(llama, ids).sum()
    assert abs(score.nats - truth) < 1e-4
    assert score.n_tokens == len(ids) - 1
    assert score.n_bytes == len(text.encode())
    assert abs(score.bits_per_byte - truth / math.log(2) / len(text.encode())) < 1e-5
    assert abs(score.perplexity - math.exp(truth / (len(ids) - 1))) < 1e-2


@pytest.mark.parametrize("n", [2, 64, 65, 66, 97, 98, 200])
def test_past_the_context_each_id_is_scored_once_from_at_least_half_of_it(llama, n):
    """TINY's context is 64, so windows have 65 ids and start every 32 ids."""
    ids = np.random.default_rng(0).integers(3, 260, n).tolist()
    got = perplexity.nats(llama, ids)
    assert len(got) == n - 1
    assert np.abs(got[:64] - surprise(llama, ids[:65])).max() < 1e-4
    for t in range(65, n, 7):  # the first window that contains id t scores it
        begin = next(i for i in range(0, n, 32) if i + 65 > t)
        assert t - begin >= 32
        assert abs(got[t - 1] - surprise(llama, ids[begin : t + 1])[-1]) < 1e-4


def test_a_text_is_scored_after_bos_whatever_is_put_around_a_prompt(tmp_path):
    directory = write_model(tmp_path / "model", TINY)
    scores = []
    for flags in ({}, {"add_bos_token": False}, {"add_eos_token": True}):
        (directory / "tokenizer_config.json").write_text(json.dumps(flags))
        scores.append(perplexity.score(npllama.load(directory, "numpy"), "Once."))
    assert scores[0] == scores[1] == scores[2]


def test_even_odds_have_the_vocabulary_as_perplexity(llama):
    llama.parameters.head.norm[:] = 0  # all logits become 0
    score = perplexity.score(llama, "abc")
    assert abs(score.perplexity - 260) < 1e-2


def test_scores_of_texts_add_up(llama):
    texts = ["One.", "Two, three."]
    total = perplexity.score_texts(llama, texts)
    parts = [perplexity.score(llama, text) for text in texts]
    assert abs(total.nats - sum(part.nats for part in parts)) < 1e-6
    assert total.n_bytes == len("".join(texts))


def test_the_command_prints_the_three_figures(tmp_path, capsys):
    directory = write_model(tmp_path / "model", TINY)
    text = tmp_path / "text.txt"
    text.write_text("One.\n<|endoftext|>\nTwo.\n")
    args = ["--model", str(directory), "--text", str(text)]
    assert perplexity.main(args) == 0
    out = capsys.readouterr().out
    assert "nats per token, perplexity" in out
    assert "bits per byte (2 texts, " in out
    assert perplexity.main([*args, "--json", "--limit", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["texts"] == 1
    assert figures["bytes"] == 4
    assert abs(figures["perplexity"] - math.exp(figures["nats_per_token"])) < 1e-9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "none.txt"], "none.txt cannot be read"),
        (["--model", "none"], "none does not exist"),
        (["--limit", "0"], "--limit is 0"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, capsys, more, message):
    text = tmp_path / "text.txt"
    text.write_text("One.\n")
    directory = write_model(tmp_path / "model", TINY)
    assert perplexity.main(["--model", str(directory), "--text", str(text), *more]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err


def test_a_model_without_sense_has_a_perplexity_and_one_that_is_damaged_none(llama, tmp_path):
    llama.parameters.head.norm[:] = 1e6
    assert perplexity.score(llama, "abc").perplexity == math.inf
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"][:] = np.nan
    write_model(tmp_path / "model", TINY, tensors=tensors)
    (tmp_path / "text.txt").write_text("One.")
    args = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    assert perplexity.main(args) == 2
