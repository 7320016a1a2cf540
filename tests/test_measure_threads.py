"""The program that compares one thread with several: its results, and invalid options."""

import re

import pytest

import measure_threads
from conftest import TINY


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(measure_threads.SHAPES, "15m", TINY)


SMALL = ["--shape", "15m", "--prompt-tokens", "3", "--new-tokens", "2", "--threads", "1"]


def test_it_prints_all_ratios(capsys):
    assert measure_threads.main([*SMALL, "--runs", "1", "--requests", "2"]) == 0
    out = capsys.readouterr().out
    assert "one request" in out and "2 requests" in out
    assert len(re.findall(r"ratio \d+\.\d\d", out)) == 3
    assert re.search(r"by a server,\n +ratio .*, \d+\.\d\d times as many tokens per second$", out)


def test_the_requests_run_in_other_threads_and_all_of_them(monkeypatch):
    import threading

    threads = []
    monkeypatch.setattr(
        measure_threads, "generate", lambda *_: threads.append(threading.current_thread())
    )
    measure_threads.one_request(None, None, n_runs=2)
    main = threading.main_thread()
    assert [thread is main for thread in threads] == [True, False] * 3  # one pair is a warm-up
    threads.clear()
    measure_threads.many_requests(None, None, 4, n_runs=1)
    assert [thread is main for thread in threads] == ([True] * 4 + [False] * 4) * 2


@pytest.mark.parametrize("option", ["--runs", "--requests", "--new-tokens", "--prompt-tokens"])
def test_wrong_options_end_in_one_line(capsys, option):
    assert measure_threads.main([*SMALL, option, "0"]) == 2
    error = capsys.readouterr().err
    assert error == f"measure_threads: error: {option} is 0: expected at least 1\n"
