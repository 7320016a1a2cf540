"""The shipped model: the statements of its model card are true, and every package contains it."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

import npllama
import perplexity
from conftest import ROOT, TINY, data_file, needed
from model_directory import write_model
from npllama.explore.__main__ import NEEDED
from npllama.llama import SHIPPED
from npllama.sampling_options import Sampling
from training.stories import read_stories

CARD = (SHIPPED / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def llama():
    return npllama.load(backend="numpy")


def test_it_has_grouped_queries_and_room_for_a_story(llama):
    config = llama.config
    assert 1 < config.n_kv_heads < config.n_heads
    assert config.context_length >= 512
    assert llama.dtype == "int8"


def test_no_backend_is_the_default_one(llama):
    default, none = npllama.load(backend="auto"), npllama.load(backend=None)
    assert none.backend.name == default.backend.name
    assert none.generate("a", max_new_tokens=2, seed=1).ids


def test_it_takes_at_most_4_mb_of_the_package():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 4 * 10**6


def test_it_tells_a_story_that_ends(llama):
    story = llama.generate("Once upon a time", max_new_tokens=450, temperature=0.6, seed=0)
    assert story.finish_reason == "eos"
    assert len(story.text.split()) > 50
    assert story.text.rstrip().endswith((".", "!", "?", '"'))


def test_it_foretells_unseen_stories(llama):
    """A part of the 600 validation stories. A slow test below uses all of them."""
    stories = read_stories(data_file("stories/valid.txt"))[::5]
    assert perplexity.score_texts(llama, stories).bits_per_byte <= 0.39


@pytest.mark.slow
def test_it_foretells_all_unseen_stories_as_well_as_its_card_says(llama):
    stories = read_stories(data_file("stories/valid.txt"))
    score = perplexity.score_texts(llama, stories)
    assert len(stories) == 600
    assert score.bits_per_byte <= 0.39
    told = float(re.search(r"\*\*(0\.\d{4}) bits per byte\*\*", CARD).group(1))
    assert abs(score.bits_per_byte - told) < 1e-4


@pytest.mark.slow
def test_its_samples_end_and_are_made_of_known_words(llama):
    known = set(re.findall(r"[\w'-]+", data_file("stories/train.txt").read_text(encoding="utf-8")))
    samples = llama.generate_batch(
        [""] * 100, max_new_tokens=450, sampling=Sampling(temperature=0.6), seed=0
    )
    assert sum(sample.finish_reason == "eos" for sample in samples) >= 90
    words = [word for sample in samples for word in re.findall(r"[\w'-]+", sample.text)]
    assert len(words) > 5000
    assert sum(word in known for word in words) / len(words) >= 0.99


def test_the_card_is_of_this_model(llama):
    with open(SHIPPED / "loss.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    for told in (
        f"{llama.config.n_parameters:,} parameters",
        f"{int(last['step']):,} steps",
        f"{float(last['valid_loss']):.4f} nats per token",
        "--seed 0",
        "licence",
        "cannot",
    ):
        assert told in CARD, told


# -- packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """An sdist of the working tree, and a wheel built from this sdist."""
    tmp_path = tmp_path_factory.mktemp("packages")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():  # a copy, because building writes into the tree
        if (ROOT / name).exists() and not name.startswith("tests/"):
            copy = tmp_path / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    command.append(str(tmp_path / "tree"))
    subprocess.run(command, check=True, capture_output=True)
    return next(tmp_path.glob("*.tar.gz")), next(tmp_path.glob("*.whl"))


def test_wheel_and_sdist_contain_the_model_and_the_kernels(packages):
    sdist, wheel = packages
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    kernels = list((ROOT / "npllama").rglob("*.cu"))
    assert kernels
    page = [path for end in ("html", "css", "js") for path in (ROOT / "npllama").rglob(f"*.{end}")]
    assert page
    for path in (*SHIPPED.iterdir(), *kernels, *page, *(ROOT / "npllama").rglob("*.py")):
        assert path.relative_to(ROOT).as_posix() in in_sdist
        assert path.relative_to(ROOT).as_posix() in in_wheel
    assert (ROOT / "npllama" / "explore" / "page.png").exists()
    assert "npllama/explore/page.png" not in in_wheel  # it is for who reads the repository


def test_wheel_contains_the_programs_inside_the_package(packages):
    """npllama/__main__.py starts the same programs that the repository has in tools/."""
    sdist, wheel = packages
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"npllama"}
    folders = ("benchmarking", "comparing", "converting", "training")
    tools = [*(ROOT / "tools").glob("*.py")]
    tools += [path for folder in folders for path in (ROOT / "tools" / folder).glob("*.py")]
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    for path in tools:
        assert f"npllama/{path.relative_to(ROOT).as_posix()}" in names
        assert path.relative_to(ROOT).as_posix() in in_sdist


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory):
    """A folder with the installed wheel, without files of this repository."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), str(packages[1])], check=True)
    return folder


def test_an_installed_wheel_tells_a_story(installed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(installed)}
    code = (  # like `python -m npllama.generate`, but prints the package's path
        "import runpy, sys, npllama; print(npllama.__file__, file=sys.stderr)\n"
        "runpy.run_module('npllama.generate', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--prompt", "Once upon a time"]
    command += ["--seed", "0", "--temperature", "0.6"]
    told = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, f"{installed / 'npllama' / '__init__.py'}\n")
    assert told.stdout.startswith("Once upon a time")
    assert len(told.stdout.split()) > 50


def test_an_installed_wheel_explains_a_run(installed, tmp_path):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    needed(f"{', '.join(missing)} cannot be imported: the extra [explore]" if missing else None)
    command = [sys.executable, str(installed / "bin" / "npllama"), "explore", "--prompt", "Once"]
    command += ["--out", "page.html", "--measure", "0", "--max-new-tokens", "2"]
    env = os.environ | {"PYTHONPATH": str(installed)}
    made = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<section id=") == 12
    assert "npllama/ops/equations.py:" in page


def test_an_installed_wheel_converts_and_measures(installed, tmp_path):
    """Runs the commands that error messages suggest, with the script that pip installs."""
    write_model(tmp_path / "small", TINY)
    (tmp_path / "text.txt").write_text("Once upon a time")

    def npllama_(*words):
        command = [sys.executable, str(installed / "bin" / "npllama"), *words]
        env = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    converted = npllama_("convert", "small", "converted", "--dtype", "bfloat16")
    assert (converted.returncode, converted.stdout) == (0, ""), converted.stderr
    scored = npllama_("perplexity", "--model", "converted", "--text", "text.txt", "--json")
    assert scored.returncode == 0, scored.stderr
    score = perplexity.score(npllama.load(tmp_path / "converted", "numpy"), "Once upon a time")
    assert json.loads(scored.stdout)["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
    nothing = npllama_("convert", "text.txt", "nothing")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("convert: error: text.txt ")


@pytest.mark.slow
def test_a_story_takes_less_than_two_seconds():
    """The first command of the README after installation. The best of three runs on an idle machine
    counts."""
    command = [sys.executable, "-m", "npllama.generate", "--prompt", "Once upon a time"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
