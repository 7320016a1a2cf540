"""tools/train.py as a program: training, exact resumption, and errors."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import npllama
import train
import training.progress
from conftest import ROOT, STRICT_CUPY, TINY, data_file, make_ops
from model_directory import random_tensors, write_model
from npllama.config import _HF_NAMES
from npllama.initialization import random_parameters
from npllama.llama import SHIPPED, Llama
from npllama.rope_scaling import RopeScaling
from npllama.weight_formats import FORMATS
from npllama.weights import named_arrays
from test_atomic import refuse_locks
from test_console import Broken
from training.batches import Batches
from training.checkpoint import load_checkpoint, save_checkpoint
from training.run import Run, WorkerThreads
from training.schedules import constant, cosine, wsd
from training.tokenizer import train_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a config and a text. The measurement of the machine's speed is replaced."""
    monkeypatch.setattr("training.progress.sgemm_rate", lambda run: 1e9)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text(f"{SENTENCE}\n<|endoftext|>\n" * 8)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def one_measurement():
    """The speed of sgemm is measured only once for all runs."""
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        measure = training.progress.sgemm_rate

        def measured_once(run):
            if not rates:
                rates.append(measure(run))
            return rates[0]

        patch.setattr(training.progress, "sgemm_rate", measured_once)
        yield


def arguments(place, *more, steps=12):
    given = ["--text", place / "text.txt", "--config", place / "config.json"]
    given += ["--out", place / "run", "--steps", steps, "--batch", 4, "--micro-batch", 2]
    given += ["--warmup", 2, *more]
    return [str(argument) for argument in given]


def weights_of(place):
    return (place / "run" / "model" / "model.safetensors").read_bytes()


def curve_of(place):
    with open(place / "run" / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_it_memorizes_a_sentence(place, capsys):
    """Trains from random weights until the model generates the text, including its end."""
    assert (
        train.main(arguments(place, "--lr", "0.02", "--valid", str(place / "text.txt"), steps=80))
        == 0
    )
    llama = npllama.load(place / "run" / "model", backend="numpy")
    completion = llama.generate("The quick", temperature=0, max_new_tokens=60)
    assert "The quick" + completion.text == SENTENCE
    assert completion.finish_reason == "eos"
    rows = curve_of(place)
    assert float(rows[-1]["train_loss"]) < 0.2 < 1 < float(rows[0]["train_loss"])
    assert float(rows[-1]["valid_loss"]) < 0.2
    assert "of sgemm" in capsys.readouterr().err


def test_the_loss_curve_has_a_line_a_report(place):
    args = arguments(
        place, "--report-every", "3", "--valid-every", "6", "--valid", place / "text.txt"
    )
    assert train.main(args) == 0
    rows = curve_of(place)
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["valid_bits_per_byte"]) for row in rows] == [False, True, False, True]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert int(rows[-1]["tokens"]) == 2 * int(rows[1]["tokens"])


# Runs train.py, and kills it before its ninth step.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train, training.progress, training.run
training.progress.sgemm_rate = lambda run: 1.0
step, begun = training.run.Run.step, []

def step_or_die(self):
    begun.append(1)
    if len(begun) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

training.run.Run.step = step_or_die
train.main(sys.argv[1:])
"""


def test_a_killed_run_that_resumes_equals_one_that_never_stopped(place):
    """Weights, optimizer state and data order are bit-identical. SIGKILL ends the first run."""
    often = ("--report-every", "7")
    assert train.main(arguments(place, *often, steps=20)) == 0
    whole, state = weights_of(place), load_checkpoint(place / "run" / "checkpoint.npz")[0]
    curve = without_seconds(curve_of(place))
    assert [row["step"] for row in curve] == ["7", "14", "20"]
    (place / "run").rename(place / "never-stopped")

    args = arguments(place, *often, "--checkpoint-every", "2", steps=20)
    command = [sys.executable, "-c", KILLED, str(ROOT / "tools"), *args]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = place / "run" / "checkpoint.npz"
    assert load_checkpoint(checkpoint)[1]["steps_done"] == 8
    assert not (place / "run" / "model").exists()

    assert train.main(arguments(place, *often, steps=20)) == 0
    assert weights_of(place) == whole
    resumed = load_checkpoint(checkpoint)[0]
    assert resumed.keys() == state.keys()
    assert all(np.array_equal(resumed[name], state[name]) for name in state)
    assert without_seconds(curve_of(place)) == curve


def test_a_finished_run_given_again_changes_nothing(place):
    assert train.main(arguments(place)) == 0
    before = weights_of(place)
    assert train.main(arguments(place)) == 0
    assert weights_of(place) == before
    assert len(curve_of(place)) == 1


def test_the_seed_and_it_alone_makes_the_run(place):
    results = {}
    for name, more in {
        "a": ["--seed", 1, "--threads", 1],
        "b": ["--seed", 1, "--threads", 3],
        "c": ["--seed", 2],
    }.items():
        assert train.main(arguments(place, *more)) == 0
        results[name] = weights_of(place)
        (place / "run").rename(place / name)
    assert results["a"] == results["b"]
    assert results["a"] != results["c"]


def test_a_run_may_be_given_its_tokenizer_and_be_packed(place):
    assert train.main(arguments(place)) == 0
    (place / "run").rename(place / "first")
    tokenizer = place / "first" / "tokenizer.model"
    args = arguments(place, "--tokenizer", tokenizer, "--packed", "--batch", "1")
    assert train.main(args) == 0
    made = place / "run" / "model" / "tokenizer.model"
    assert made.read_bytes() == tokenizer.read_bytes()


def test_samples_are_shown_on_the_way(place, capsys):
    assert train.main(arguments(place, "--sample", "The quick", "--valid-every", "6")) == 0
    assert capsys.readouterr().err.count("'The quick") == 2


def test_a_sample_is_utf8_whatever_the_locale_made_of_it(place, capsys):
    as_ascii = "größe".encode().decode("ascii", "surrogateescape")
    assert train.main(arguments(place, "--sample", as_ascii)) == 0
    assert "'größe" in capsys.readouterr().err


def test_the_curve_is_drawn_where_asked(place):
    pytest.importorskip("matplotlib", reason="the optional extra [plot] is not installed")
    assert train.main(arguments(place, "--plot")) == 0
    assert (place / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_the_first_step(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train.main(arguments(place, "--plot")) == 2
    assert "install npllama's extra [plot]" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_step_on_a_device_is_that_of_numpy(rng):
    """A step uses only device arrays: strict arrays refuse what CuPy refuses."""
    sequences = [rng.integers(3, TINY.vocab_size, n).astype("int32") for n in (9, 5, 12, 7)]
    batches = Batches(sequences, context=64, batch=4, micro_batch=2, packed=False, seed=0)
    weights = []
    for implementation in ("numpy", "strict", STRICT_CUPY):
        ops = make_ops(implementation)
        llama = Llama(TINY, random_parameters(TINY, ops), ops)
        workers = WorkerThreads(1)
        schedule = partial(constant, peak=1e-2, warmup=1)
        run = Run(llama, batches, schedule, decay=0.1, max_grad_norm=1.0, workers=workers)
        with workers:
            losses = [run.step().loss for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        weights.append(run.state())
    for other in weights[1:]:
        for name, array in weights[0].items():
            assert np.abs(other[name] - array).max() <= 2e-3 * np.abs(array).max(), name


@pytest.mark.slow
def test_the_shipped_models_shape_trains_at_a_quarter_of_sgemm(tmp_path, capsys):
    """As reported by the program, on an idle machine."""
    text = data_file("stories/valid.txt")
    given = ["--text", text, "--config", SHIPPED / "config.json", "--out", tmp_path / "run"]
    given += ["--steps", "30", "--batch", "24", "--micro-batch", "4", "--warmup", "2"]
    assert train.main([str(argument) for argument in given]) == 0
    share = int(re.search(r"= (\d+)% of sgemm", capsys.readouterr().err).group(1))
    assert share >= 25


# -- errors


@pytest.mark.filterwarnings("error")
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(place, capsys):
    assert train.main(arguments(place, "--lr", "1e30", "--checkpoint-every", "1")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "use a smaller --lr" in lines[-1]
    state, facts = load_checkpoint(place / "run" / "checkpoint.npz")
    assert facts["steps_done"] >= 1
    assert all(np.isfinite(array).all() for array in state.values())
    assert not (place / "run" / "model").exists()


def test_a_run_without_a_checkpoint_trains_its_tokenizer_anew(place):
    assert train.main(arguments(place)) == 0
    whole = weights_of(place)
    (place / "run" / "checkpoint.npz").unlink()
    (place / "run" / "tokenizer.model").write_bytes(
        train_tokenizer([SENTENCE, "More words than before."] * 9, 290)
    )
    assert train.main(arguments(place)) == 0
    assert weights_of(place) == whole


def test_a_sample_too_long_is_refused_before_the_first_step(place, capsys):
    assert train.main(arguments(place, "--sample", "fox " * 100)) == 2
    assert "--sample fills the context of 64" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_loss_curve_that_cannot_be_written_is_one_line(place, capsys):
    (place / "run" / "loss.csv").mkdir(parents=True)
    (place / "run" / ".train.lock").touch()
    assert train.main(arguments(place)) == 2
    assert "loss.csv cannot be written" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(place, capsys):
    (place / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 2**17}))
    assert train.main(arguments(place)) == 2
    err = capsys.readouterr().err
    assert "training needs" in err and "are free: use a smaller --micro-batch" in err
    assert not (place / "run").exists()


def test_the_memory_that_is_foretold_is_what_is_taken(tmp_path):
    """In a separate process, whose peak is compared with the estimate of check_training_memory."""
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | wide))
    text = "\n<|endoftext|>\n".join(f"{SENTENCE} {i} " * 2 for i in range(40))
    (tmp_path / "text.txt").write_text(text)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import train, training.run as run\n"
        "from npllama.backend import Backend\n"
        "before = Backend().peak_bytes()\n"
        "said = []\n"
        "Backend.free_bytes = lambda self: said.append(1) or 0\n"
        "import training.progress; training.progress.sgemm_rate = lambda run: 1.0\n"
        "try: train.train(train._parser().parse_args(sys.argv[1:]))\n"
        "except Exception as error: needed = float(str(error).split()[2])\n"
        "Backend.free_bytes = lambda self: None\n"
        "train.main(sys.argv[1:])\n"
        "print(needed * 1e9, Backend().peak_bytes() - before)\n"
    )
    more = ["--threads", "1", "--batch", "20", "--micro-batch", "20", "--warmup", "0"]
    given = arguments(tmp_path, *more, steps=2)
    command = [sys.executable, "-c", code, str(ROOT / "tools"), *given]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed, taken = (float(number) for number in out.split())
    assert 1e8 < 0.7 * taken < needed < 3 * taken


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--micro-batch", "0"], "--micro-batch is 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--final-lr", "2"], "--final-lr is 2"),
        (["--warmup", "12"], "--warmup is 12"),
        (["--seed", "-1"], "--seed is -1"),
        (["--threads", "0"], "--threads is 0"),
        (["--batch", "100"], "choose a smaller --batch"),
        (["--text", "none.txt"], "none.txt cannot be read"),
        (["--config", "none.json"], "none.json does not exist"),
        (["--tokenizer", "none.model"], "none.model"),
        (["--backend", "tpu"], "--backend"),
    ],
)
def test_wrong_input_ends_in_one_line(place, capsys, more, message):
    try:
        code = train.main(arguments(place, *more))
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train: error: ")
    assert message in lines[0]


def test_a_config_that_is_none_is_refused_by_name(place, capsys):
    (place / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 3}))
    assert train.main(arguments(place)) == 2
    assert (
        f"--config {place / 'config.json'}: 4 query heads cannot share 3" in capsys.readouterr().err
    )


def test_another_run_is_not_taken_for_this_one(place, capsys):
    assert train.main(arguments(place)) == 0
    capsys.readouterr()
    for more, what in (
        (["--lr", "0.5"], "another lr (0.003, now 0.5)"),
        (["--seed", "3"], "another seed (0, now 3)"),
    ):
        assert train.main(arguments(place, *more)) == 2
        assert what in capsys.readouterr().err
    model = (place / "run" / "tokenizer.model").read_bytes()
    other = place / "other.model"
    other.write_bytes(train_tokenizer([SENTENCE, "More words than before."] * 9, 290))
    assert train.main(arguments(place, "--tokenizer", other)) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert (place / "run" / "tokenizer.model").read_bytes() == model
    (place / "text.txt").write_text("Another text. " * 100 + "\n<|endoftext|>\nOf two.\n" * 9)
    assert train.main(arguments(place)) == 2
    assert "another text" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not a zip"])
def test_a_damaged_checkpoint_is_refused_and_kept(place, capsys, content):
    assert train.main(arguments(place)) == 0
    checkpoint = place / "run" / "checkpoint.npz"
    checkpoint.write_bytes(content)
    capsys.readouterr()
    assert train.main(arguments(place)) == 2
    err = capsys.readouterr().err.strip()
    assert "is not a checkpoint of a training run" in err
    assert "\n" not in err
    assert checkpoint.read_bytes() == content


def test_an_interrupt_says_how_to_go_on(place, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "step", interrupted)
    assert train.main(arguments(place)) == 130
    assert "before the first checkpoint; the same command starts over" in capsys.readouterr().err


def interrupt_at(monkeypatch, step, *numbers):
    """Signals that arrive during a step."""
    step_of_run = Run.step

    def interrupted(self):
        if self.steps_done == step - 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step_of_run(self)

    monkeypatch.setattr(Run, "step", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_its_step_and_goes_on_to_the_bit(
    place, capsys, monkeypatch, number, code
):
    often = ("--report-every", "5", "--valid-every", "5", "--valid", place / "text.txt")
    assert train.main(arguments(place, *often)) == 0
    whole, curve = weights_of(place), without_seconds(curve_of(place))
    (place / "run").rename(place / "never-stopped")
    capsys.readouterr()
    interrupt_at(monkeypatch, 5, number)
    assert train.main(arguments(place, *often)) == code
    said = capsys.readouterr().err
    assert "interrupted; saving after this step" in said
    checkpoint = place / "run" / "checkpoint.npz"
    line = f"train: interrupted; the same command resumes after step 5 ({checkpoint})\n"
    assert said.endswith(line)
    assert load_checkpoint(checkpoint)[1]["steps_done"] == 5
    assert not (place / "run" / "model").exists()
    monkeypatch.undo()
    assert train.main(arguments(place, *often)) == 0
    assert "train: resumes after step 5\n" in capsys.readouterr().err
    assert weights_of(place) == whole
    assert without_seconds(curve_of(place)) == curve


def test_an_interrupt_in_the_last_step_loses_nothing(place, monkeypatch):
    interrupt_at(monkeypatch, 12, signal.SIGINT)
    assert train.main(arguments(place)) == 130
    assert load_checkpoint(place / "run" / "checkpoint.npz")[1]["steps_done"] == 12


def test_a_second_interrupt_ends_at_once(place, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    assert train.main(arguments(place, "--checkpoint-every", "3")) == 130
    assert "resumes after step 3 (" in capsys.readouterr().err
    assert load_checkpoint(place / "run" / "checkpoint.npz")[1]["steps_done"] == 3


# -- concurrent runs


def test_a_second_run_into_one_directory_is_refused(place, capsys, monkeypatch):
    refused = []
    step_of_run = Run.step

    def step(self):
        if not refused:  # another run starts while this one is running
            refused.append(train.main(arguments(place)))
        return step_of_run(self)

    monkeypatch.setattr(Run, "step", step)
    assert train.main(arguments(place)) == 0
    assert refused == [2]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == [
        f"train: error: {place / 'run'} is being written by another training run: wait until it "
        "ends, or choose another --out"
    ]
    assert not (place / "run" / ".train.lock").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors", "tokenizer.model"],  # a converted model
        ["model/config.json", "model/model.safetensors"],
        ["loss.csv"],
    ],
)
def test_an_out_with_content_that_is_no_run_is_refused_and_kept(place, capsys, monkeypatch, names):
    monkeypatch.setattr(train, "read_stories", None)  # fails before any work
    for name in names:
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "run" / name).write_text(f"my {name}")
    before = sorted((place / "run").rglob("*"))
    assert train.main(arguments(place)) == 2
    assert capsys.readouterr().err == (
        f"train: error: --out {place / 'run'} has content but is not a run of train.py, and its "
        "files would be overwritten: choose another directory\n"
    )
    assert sorted((place / "run").rglob("*")) == before
    assert all((place / "run" / name).read_text() == f"my {name}" for name in names)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(place, monkeypatch):
    interrupt_at(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    assert train.main(arguments(place)) == 130
    monkeypatch.undo()
    monkeypatch.setattr("training.progress.sgemm_rate", lambda run: 1e9)
    names = {path.name for path in (place / "run").iterdir()}
    assert names == {".train.run", "tokenizer.model", "loss.csv"}
    assert train.main(arguments(place)) == 0
    assert (place / "run" / "model" / "config.json").exists()


def test_an_empty_out_is_a_place_for_a_run(place):
    (place / "run").mkdir()
    assert train.main(arguments(place)) == 0


def test_a_run_from_before_the_mark_is_known_by_its_checkpoint(place):
    assert train.main(arguments(place)) == 0
    (place / "run" / ".train.run").unlink()
    assert train.main(arguments(place)) == 0


@pytest.mark.parametrize("what", ["a file", "no model", "a full disk", "not writable"])
def test_a_model_that_could_not_be_written_is_refused_before_the_first_step(
    place, capsys, monkeypatch, what
):
    monkeypatch.setattr(Run, "step", None)
    model = place / "run" / "model"
    model.parent.mkdir()
    (model.parent / ".train.lock").touch()
    messages = {
        "a file": f"{model} is a file",
        "no model": f"{model} has content but no config.json",
        "a full disk": f"{model} needs 0.00 GB, but {model.parent} has 0.00 GB free",
        "not writable": f"{model} cannot be written: {model.parent} is not writable",
    }
    if what == "a file":
        model.touch()
    elif what == "no model":
        model.mkdir()
        (model / "notes.txt").touch()
    elif what == "a full disk":
        disk = SimpleNamespace(free=1000)
        monkeypatch.setattr("atomic.shutil.disk_usage", lambda path: disk)
    else:
        monkeypatch.setattr("atomic.os.access", lambda path, mode: False)
    assert train.main(arguments(place)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train: error: {messages[what]}") and err.count("\n") == 1
    assert not (model.parent / "tokenizer.model").exists()


def test_a_directory_as_config_is_told_its_file(place, capsys):
    args = arguments(place)
    for config, message in (
        (place, f"--config {place} is a directory: give {place / 'config.json'}"),
        (place.parent, f"--config {place.parent} is a directory: expected a file such as"),
        (place / "none", f"--config {place / 'none'} does not exist: expected a JSON file"),
    ):
        assert train.main([*args, "--config", str(config)]) == 2
        assert capsys.readouterr().err.startswith(f"train: error: {message}")


def test_an_empty_out_name_is_not_the_current_directory(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        train.main(arguments(place, "--out", ""))
    assert "argument --out: it is empty: expected the name of" in capsys.readouterr().err


def test_a_lock_file_of_a_killed_run_is_no_lock(place):
    (place / "run").mkdir()
    (place / "run" / ".train.lock").touch()
    assert train.main(arguments(place)) == 0
    assert not (place / "run" / ".train.lock").exists()


def test_without_locks_a_run_goes_on(place, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOLCK)
    assert train.main(arguments(place)) == 0
    assert not (place / "run" / ".train.lock").exists()


def test_an_out_that_cannot_be_made_is_one_line(place, capsys):
    (place / "run").touch()
    assert train.main(arguments(place)) == 2
    assert capsys.readouterr().err == (
        f"train: error: {place / 'run'} is a file: choose the name of a directory\n"
    )


def test_a_terminal_that_is_gone_does_not_end_a_run(place, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(errno.EIO))
    assert train.main(arguments(place, "--report-every", "3", "--sample", "The")) == 0


# -- schedules, and the length of a run


SCHEDULES = {
    "cosine": ["--final-lr", "0.1"],
    "wsd": ["--schedule", "wsd", "--decay", "4", "--final-lr", "0.1"],
    "constant": ["--schedule", "constant"],
}


def run_rates(place):
    return [float(row["learning_rate"]) for row in curve_of(place)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_has_the_rates_of_its_schedule_and_resumes_to_the_bit(place, monkeypatch, name):
    often = (*SCHEDULES[name], "--lr", "0.01", "--report-every", "1")
    assert train.main(arguments(place, *often)) == 0
    truth = {
        "cosine": lambda step: cosine(step, peak=0.01, warmup=2, steps=12, final=0.1),
        "wsd": lambda step: wsd(step, peak=0.01, warmup=2, steps=12, decay=4, final=0.1),
        "constant": lambda step: constant(step, peak=0.01, warmup=2),
    }[name]
    assert run_rates(place) == pytest.approx([truth(step) for step in range(12)], rel=1e-5)
    whole = weights_of(place)
    (place / "run").rename(place / "never-stopped")
    interrupt_at(monkeypatch, 10, signal.SIGINT)  # within the decay of wsd
    assert train.main(arguments(place, *often)) == 130
    monkeypatch.undo()
    monkeypatch.setattr("training.progress.sgemm_rate", lambda run: 1e9)
    assert train.main(arguments(place, *often)) == 0
    assert weights_of(place) == whole
    assert run_rates(place) == pytest.approx([truth(step) for step in range(12)], rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([12, "--schedule", "constant"], [20, "--schedule", "constant"]),
        ([12, "--schedule", "wsd", "--decay", 0], [20, "--schedule", "wsd", "--decay", 5]),
        ([12, "--schedule", "wsd", "--decay", 0], [12, "--schedule", "wsd", "--decay", 0]),
    ],
)
def test_a_lengthened_run_equals_one_of_that_length(place, capsys, before, after):
    often = ("--report-every", "4")
    assert train.main(arguments(place, *after[1:], *often, steps=after[0])) == 0
    whole, state = weights_of(place), load_checkpoint(place / "run" / "checkpoint.npz")[0]
    curve = without_seconds(curve_of(place))
    (place / "run").rename(place / "at-once")
    assert train.main(arguments(place, *before[1:], *often, steps=before[0])) == 0
    assert after[0] == before[0] or weights_of(place) != whole
    capsys.readouterr()
    assert train.main(arguments(place, *after[1:], *often, steps=after[0])) == 0
    assert "train: resumes after step 12\n" in capsys.readouterr().err
    assert weights_of(place) == whole
    lengthened = load_checkpoint(place / "run" / "checkpoint.npz")[0]
    assert all(np.array_equal(lengthened[name], state[name]) for name in state)
    assert without_seconds(curve_of(place)) == curve


def test_the_warmup_of_a_lengthened_run_is_its_own(place):
    args = arguments(place, "--schedule", "constant", steps=30)
    at = args.index("--warmup")
    args = args[:at] + args[at + 2 :]
    assert train.main(args) == 0
    args[args.index("30")] = "60"  # a new run of 60 steps would have 6 warmup steps
    assert train.main(args) == 0
    facts = load_checkpoint(place / "run" / "checkpoint.npz", with_arrays=False)[1]
    assert (facts["identity"]["warmup"], facts["steps_done"]) == (3, 60)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            [12],
            [20],
            "run started with --steps 12: with 20, the steps already done would have had other "
            "learning rates, since the cosine schedule depends on the number of steps; give what",
        ),
        (
            [12, "--schedule", "wsd", "--decay", 4],
            [20, "--schedule", "wsd", "--decay", 4],
            "since the decay has already begun, or would have; give what",
        ),
        (
            [12, "--schedule", "wsd", "--decay", 0],
            [14, "--schedule", "wsd", "--decay", 3],
            "run started with --steps 12: with 14, the steps",
        ),
        (
            [12, "--schedule", "wsd", "--decay", 0],
            [12, "--schedule", "wsd", "--decay", 3],
            "run started with --decay 0: with 3, the steps",
        ),
        (
            [12, "--schedule", "constant"],
            [11, "--schedule", "constant"],
            "has 12 steps done, but --steps is 11: give at least as many",
        ),
        ([12], [12, "--schedule", "constant"], "another schedule (cosine, now constant): give"),
    ],
)
def test_a_length_that_its_schedule_does_not_allow_is_refused(
    place, capsys, before, after, message
):
    assert train.main(arguments(place, *before[1:], steps=before[0])) == 0
    kept = (place / "run" / "checkpoint.npz").read_bytes()
    capsys.readouterr()
    assert train.main(arguments(place, *after[1:], steps=after[0])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert (place / "run" / "checkpoint.npz").read_bytes() == kept


def test_a_checkpoint_from_before_schedules_is_one_of_a_cosine(place, capsys):
    assert train.main(arguments(place)) == 0
    checkpoint = place / "run" / "checkpoint.npz"
    state, facts = load_checkpoint(checkpoint)
    for name in ("schedule", "decay", "start"):
        del facts["identity"][name]
    save_checkpoint(checkpoint, state, facts)
    assert train.main(arguments(place)) == 0
    assert train.main(arguments(place, "--schedule", "constant")) == 2
    assert "another schedule (cosine, now constant)" in capsys.readouterr().err


# -- from a checkpoint


def from_arguments(place, directory, *more, **options):
    args = arguments(place, *more, **options)
    at = args.index("--config")
    return [*args[:at], "--from", str(directory), *args[at + 2 :]]


def first_state(monkeypatch):
    """The state of the next run at the start of its first step."""
    states = []
    step_of_run = Run.step

    def step(self):
        if not states:
            states.append({name: array.copy() for name, array in self.state().items()})
        return step_of_run(self)

    monkeypatch.setattr(Run, "step", step)
    return states


@pytest.mark.parametrize(
    ("dtype", "tied", "shards", "scaling"),
    [
        ("float32", False, 1, None),
        ("bfloat16", True, 1, None),
        ("float16", False, 3, RopeScaling("yarn", 4.0, 16)),
    ],
)
def test_training_starts_from_a_checkpoints_weights(
    place, monkeypatch, dtype, tied, shards, scaling
):
    """The weights are separate in the file, as other programs write them. They replace the random
    ones, and the RoPE scaling is kept."""
    config = replace(TINY, tie_embeddings=tied, rope_scaling=scaling)
    directory = write_model(place / "model", config, dtype=dtype, shards=shards)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    states = first_state(monkeypatch)
    assert train.main(from_arguments(place, directory, "--seed", "5")) == 0
    loaded = named_arrays(npllama.load(directory, "numpy", dtype="float32").parameters, config)
    assert {f"w/{name}" for name in loaded} <= states[0].keys()
    for name, array in loaded.items():
        assert states[0][f"w/{name}"].dtype == np.float32
        assert np.array_equal(states[0][f"w/{name}"], array), name
        assert not states[0][f"m/{name}"].any()
    trained = npllama.load(place / "run" / "model", "numpy")
    assert (trained.config, trained.dtype) == (config, "float32")
    for name, array in named_arrays(trained.parameters, config).items():
        assert not np.array_equal(array, loaded[name]), name
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_run_from_a_checkpoint_goes_on_learning_and_resumes_to_the_bit(place, monkeypatch):
    assert train.main(arguments(place, "--lr", "0.02", "--report-every", "1", steps=40)) == 0
    first = curve_of(place)
    (place / "run").rename(place / "first")
    model = place / "first" / "model"
    again = ("--lr", "0.01", "--report-every", "1")
    assert train.main(from_arguments(place, model, *again)) == 0
    losses = [float(row["train_loss"]) for row in curve_of(place)]
    assert losses[0] < 1.2 * float(first[-1]["train_loss"]) < 0.5 * float(first[0]["train_loss"])
    assert losses[-1] < losses[0]
    whole = weights_of(place)
    names = {path.name for path in (place / "run" / "model").iterdir()}
    assert names == {path.name for path in model.iterdir()}
    (place / "run").rename(place / "never-stopped")
    interrupt_at(monkeypatch, 6, signal.SIGINT)
    assert train.main(from_arguments(place, model, *again)) == 130
    monkeypatch.undo()
    monkeypatch.setattr("training.progress.sgemm_rate", lambda run: 1e9)
    assert train.main(from_arguments(place, model, *again)) == 0
    assert weights_of(place) == whole


def test_the_trained_model_has_the_tokenizer_files_of_its_checkpoint(place):
    directory = write_model(place / "model", TINY)
    files = {
        "tokenizer_config.json": b'{"add_bos_token": true, "chat_template": "x"}',
        "special_tokens_map.json": b"{}",
        "generation_config.json": b'{"eos_token_id": [2, 7]}',
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    assert train.main(from_arguments(place, directory)) == 0
    trained = place / "run" / "model"
    assert {name: (trained / name).read_bytes() for name in files} == files
    name = "tokenizer.model"
    assert (trained / name).read_bytes() == (directory / name).read_bytes()
    assert npllama.load(trained, "numpy").config.eos_ids == (2, 7)


def test_other_weights_are_another_run(place, capsys):
    directory = write_model(place / "model", TINY, seed=1)
    assert train.main(from_arguments(place, directory)) == 0
    write_model(directory, TINY, seed=2)
    capsys.readouterr()
    assert train.main(from_arguments(place, directory)) == 2
    err = capsys.readouterr().err
    assert "is of a run with another start: give the option that the run was started with" in err
    assert err.count("\n") == 1


def int8_tensors():
    tensors = {}
    for name, array in random_tensors(TINY).items():
        int8 = FORMATS["int8"]
        parts = int8.stored(name, array.shape) if array.ndim == 2 else [name]
        arrays = int8.from_float(array) if array.ndim == 2 else [array]
        tensors |= dict(zip(parts, arrays, strict=True))
    return tensors


@pytest.mark.parametrize("what", ["int8", "no tokenizer", "no model", "tokenizer", "config"])
def test_a_checkpoint_that_cannot_be_trained_is_one_line(place, capsys, what):
    tensors = int8_tensors() if what == "int8" else None
    directory = place / "model"
    if what != "no model":
        write_model(directory, TINY, tensors=tensors, tokenizer=what != "no tokenizer")
    more = ["--tokenizer", directory / "tokenizer.model"] if what == "tokenizer" else []
    more += ["--config", place / "config.json"] if what == "config" else []
    message = {
        "int8": f"--from {directory} holds int8 weights, which are too coarse for training",
        "no tokenizer": f"--from {directory} has no tokenizer.model or tokenizer.json",
        "no model": f"{directory} does not exist: expected a model directory",
        "tokenizer": "--tokenizer is given with --from, which has its own",
        "config": "argument --config: not allowed with argument --from",
    }[what]
    try:
        code = train.main(from_arguments(place, directory, *more))
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train: error: {message}") and err.count("\n") == 1
    assert not (place / "run").exists()


# -- the help


def test_the_help_names_the_fields_of_a_config(place, capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for name in _HF_NAMES.values():
        assert name in text
    needed = re.search("A config needs (.*?)\\. It may have", " ".join(text.split())).group(1)
    needed = re.split(", | and ", needed)
    for name in CONFIG:
        fields = {field: value for field, value in CONFIG.items() if field != name}
        (place / "config.json").write_text(json.dumps(fields))
        assert train.main(arguments(place, steps=3)) == (2 if name in needed else 0)
        if name in needed:
            assert f"{name} is missing" in capsys.readouterr().err
        shutil.rmtree(place / "run", ignore_errors=True)
