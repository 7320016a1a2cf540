"""Synthetic checkpoints for measuring conversions, and the program that measures."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT
from convert import main as convert_main
from make_synthetic_meta import main, write_meta
from npllama import load
from npllama.config import LlamaConfig

SMALL = LlamaConfig(64, 2, 8, 4, 96, 300)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("make_synthetic_meta.TINY_LLAMA", SMALL)


def test_a_synthetic_checkpoint_converts_and_loads(tmp_path, small, capsys):
    assert main(["1.1B", str(tmp_path / "meta")]) == 0
    assert convert_main([str(tmp_path / "meta"), str(tmp_path / "out")]) == 0
    llama = load(tmp_path / "out", backend="numpy")
    assert llama.dtype == "bfloat16"
    assert llama.config.n_parameters == SMALL.n_parameters
    assert main(["1.1b", str(tmp_path / "one"), "--layers", "1"]) == 0
    told = capsys.readouterr().err
    assert f"one: {replace(SMALL, n_layers=1).n_parameters:,} parameters" in told


def test_heads_of_a_width_of_their_own_are_converted(tmp_path):
    config = replace(SMALL, head_dim=6)  # 8 heads have 48 columns, the residual stream has 64
    (tmp_path / "meta").mkdir()
    write_meta(tmp_path / "meta", config)
    params = tmp_path / "meta" / "params.json"
    fields = json.loads(params.read_text())
    assert convert_main([str(tmp_path / "meta"), str(tmp_path / "out")]) == 2
    params.write_text(json.dumps(fields | {"head_dim": 6}))
    assert convert_main([str(tmp_path / "meta"), str(tmp_path / "out")]) == 0
    llama = load(tmp_path / "out", backend="numpy")
    assert (llama.config.head_dim, llama.config.n_parameters) == (6, config.n_parameters)
    assert llama.parameters.layers[0].wo.shape == (64, 48)


@pytest.mark.parametrize(("args", "message"), [
    (("99B", "new"), "size is '99B': expected one of 7B, 13B, 34B, 70B, 1.1B\n"),
    (("1.1B", "new", "--layers", "0"), "n_layers is 0"),
    (("1.1B", "full"), "has content"),
    (("1.1B", "full/mine.txt"), "is a file"),
    (("1.1B", "full/mine.txt/below"), "cannot be written"),
])  # fmt: skip
def test_a_wrong_call_is_one_line_and_loses_nothing(tmp_path, small, capsys, args, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert main([args[0], str(tmp_path / args[1]), *args[2:]]) == 2
    line = capsys.readouterr().err
    assert line.startswith("make_synthetic_meta: error: ") and line.count("\n") == 1
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_more_than_the_disk_holds_is_refused(tmp_path, capsys):
    assert main(["70B", str(tmp_path / "big"), "--layers", "100000"]) == 2
    assert "free: choose another disk" in capsys.readouterr().err


def test_a_measurement_tells_both_rates_and_the_peak_and_leaves_nothing(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "disk").mkdir()
    write_meta(tmp_path / "meta", SMALL)
    command = [sys.executable, str(ROOT / "tools" / "measure_conversion.py")]
    command += [str(tmp_path / "meta"), str(tmp_path / "disk")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = re.fullmatch(
        r"0\.00 GB: copied at (\d+) MB/s, converted at (\d+) MB/s \(\d\.\d\d of that\), "
        r"peak (\d+) MB\n",
        told,
    )
    assert 20 < int(number[3]) < 300  # MB of Python and NumPy
    assert list((tmp_path / "disk").iterdir()) == []
    missing = subprocess.run([*command[:-1], "none"], capture_output=True, text=True)
    assert missing.returncode == 2
