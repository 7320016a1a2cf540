"""Train a LLaMA-2 on a text file, from random weights or from those of a checkpoint.

    python tools/train.py --text train.txt --valid valid.txt --out RUN --config config.json
    python tools/train.py --text train.txt --valid valid.txt --out RUN --from DIR

The directory RUN holds the tokenizer, a checkpoint, and the loss curve. The same command resumes
from the checkpoint. At the end RUN/model is a model directory in float32; tools/convert.py converts
it to narrower dtypes.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import hashlib
import math
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from atomic import locked, parents_of
from command_line import Parser, exit_code, named_path
from converting.tokenizers import read_tokenizer
from interruption import deferred, interruptible
from npllama.atomic_file import atomic_file
from npllama.backend import get_backend
from npllama.config import LlamaConfig, read_json
from npllama.console import open_streams, reason, tell, utf8
from npllama.errors import ConfigError, InputError
from npllama.initialization import random_parameters
from npllama.llama import Llama
from npllama.ops import ops_for
from npllama.progress_line import progress_shown
from npllama.threads import Threads
from npllama.tokenizer import Tokenizer
from perplexity import score_texts
from training.batches import Batches
from training.checkpoint import load_checkpoint, load_facts, save_checkpoint
from training.identity import check_identity, schedule_of
from training.loss_curve import check_matplotlib, draw_curve
from training.model_writer import check_model_place, write_model
from training.progress import Progress
from training.run import Run, WorkerThreads, check_training_memory
from training.run_directory import CHECKPOINT, LOCK, check_out, mark_as_run
from training.schedules import SCHEDULES
from training.start import Start, read_start
from training.stories import encode_stories, read_stories
from training.tokenizer import train_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)

    def interrupted() -> str:
        checkpoint = options.out / CHECKPOINT
        with suppress(InputError):
            if checkpoint.exists():
                step = load_facts(checkpoint)["steps_done"]
                return f"interrupted; the same command resumes after step {step:,} ({checkpoint})"
        return "interrupted before the first checkpoint; the same command starts over"

    def work() -> None:
        with interruptible(), progress_shown("train"):
            train(options)

    return exit_code("train", work, interrupted, "use a smaller --micro-batch or model")


def train(options: argparse.Namespace) -> None:
    """Train to the last step. If `options.out` holds a checkpoint, resume from it.

    Raises:
        InputError: an option or file is invalid, or another run is writing to `options.out`.
        Interrupted: a signal arrived. The steps done so far are saved.
    """
    _check(options)
    check_out(options.out)
    if options.plot:
        check_matplotlib()
    with ExitStack() as stack:
        lock = options.out / LOCK
        message = (
            f"{options.out} is being written by another training run: wait until it ends, or "
            "choose another --out"
        )
        try:
            stack.enter_context(parents_of(lock))
            stack.enter_context(locked(lock, message))
        except OSError as error:
            raise InputError(f"{options.out} cannot be written: {reason(error)}") from None
        _train(options)


def _train(options: argparse.Namespace) -> None:
    out: Path = options.out
    checkpoint = out / CHECKPOINT
    begun = load_facts(checkpoint) if checkpoint.exists() else None
    _complete(options, {} if begun is None else begun["identity"])
    start = None if options.start is None else read_start(options.start)
    config = _config(options.config) if start is None else start.config
    stories = read_stories(options.text)
    valid = read_stories(options.valid)[: options.valid_stories] if options.valid else []
    tokenizer = _tokenizer_model(options, config, stories) if start is None else start.tokenizer
    identity = _identity(options, config, tokenizer, start)
    if begun is not None:
        check_identity(identity, begun["identity"], begun["steps_done"], checkpoint)
    run = _run(options, identity, config, stories, tokenizer)
    if start is not None and begun is None:
        start.copy_weights(run.model)
    check_model_place(config, out / "model")
    # all input has been checked; files are written from here on
    _write_tokenizer(tokenizer, out)
    with run.workers:
        progress = Progress(run, out / "loss.csv", options.steps)
        if begun is not None:
            _restore(run, progress, checkpoint)
            tell(f"train: resumes after step {run.steps_done:,}")
        tell(
            f"train: {config.n_parameters:,} parameters; an epoch has "
            f"{run.batches.steps_per_epoch:,} steps of {run.batches.batch} rows; "
            f"sgemm {progress.sgemm / 1e9:,.0f} GFLOP/s on {run.workers.n} threads"
        )
        with progress:
            _steps(run, progress, options, identity, valid)
    write_model(run.model, tokenizer, out / "model", {} if start is None else start.files)
    if options.plot:
        draw_curve(out / "loss.csv", out / "loss.png")
    tell(f"train: wrote {out / 'model'}")


def _run(
    options: argparse.Namespace,
    identity: dict,
    config: LlamaConfig,
    stories: list[str],
    tokenizer_model: bytes,
) -> Run:
    tokenizer = Tokenizer.from_bytes(tokenizer_model)
    batches = Batches(
        encode_stories(stories, tokenizer),
        context=config.context_length,
        batch=options.batch,
        micro_batch=options.micro_batch,
        packed=options.packed,
        seed=options.seed,
    )
    ops = ops_for(get_backend(options.backend, device=options.device))
    n_workers = options.threads or ops.backend.threads.most
    ops.backend.threads = Threads(1)  # each micro-batch runs in one thread
    check_training_memory(config, ops, min(options.micro_batch, options.batch), n_workers)
    sample = [] if options.sample is None else tokenizer.encode(options.sample)
    if len(sample) >= config.context_length:
        raise InputError(
            f"--sample fills the context of {config.context_length} tokens: use a shorter text"
        )
    parameters = random_parameters(config, ops, options.seed)
    return Run(
        Llama(config, parameters, ops, tokenizer=tokenizer),
        batches,
        schedule_of(identity),
        decay=options.weight_decay,
        max_grad_norm=options.clip,
        workers=WorkerThreads(n_workers),
    )


def _steps(
    run: Run, progress: Progress, options: argparse.Namespace, identity: dict, valid: list[str]
) -> None:
    def is_due(step: int, every: int) -> bool:
        return step % every == 0 or step == options.steps

    def save() -> None:
        facts = {"identity": identity, "steps_done": run.steps_done, "progress": progress.state()}
        save_checkpoint(options.out / CHECKPOINT, run.state(), facts)

    def interrupt() -> None:
        tell("\ntrain: interrupted; saving after this step; press Ctrl-C again to end at once")

    # A signal is handled after the step, because during a step the weights are half updated
    with deferred(interrupt) as signal:
        while run.steps_done < options.steps:
            progress.step()
            if is_due(run.steps_done, options.valid_every):
                score = score_texts(run.model, valid, run.workers.map) if valid else None
                progress.report(score)
            elif is_due(run.steps_done, options.report_every):
                progress.report()
            if options.sample is not None and is_due(run.steps_done, options.valid_every):
                progress.write(f"  {_sample(run.model, options.sample)}")
            came = signal.number is not None
            if came or is_due(run.steps_done, options.checkpoint_every):
                save()
            if came:
                break
        signal.check()


def _restore(run: Run, progress: Progress, checkpoint: Path) -> None:
    """Restore a run. This is a separate function so that the loaded arrays are freed at its end."""
    state, facts = load_checkpoint(checkpoint)
    run.restore(state, facts["steps_done"])
    progress.restore(facts["progress"])


def _sample(llama: Llama, prompt: str) -> str:
    completion = llama.generate(prompt, max_new_tokens=100, temperature=0.6, seed=0)
    return repr(prompt + completion.text)


def _check(options: argparse.Namespace) -> None:
    counts = ("steps", "batch", "micro_batch", "valid_stories")
    for name in (*counts, "report_every", "valid_every", "checkpoint_every"):
        if getattr(options, name) < 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {getattr(options, name)}: expected at least 1")
    for name in ("lr", "clip"):
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"--{name} is {getattr(options, name)}: expected a positive number")
    for name in ("final_lr", "weight_decay"):
        if not 0 <= getattr(options, name) <= 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {getattr(options, name)}: expected 0 to 1")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: expected at least 0")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads is {options.threads}: expected at least 1")
    if options.start is not None and options.tokenizer is not None:
        raise InputError("--tokenizer is given with --from, which has its own: leave it out")
    if options.schedule != "wsd" and options.decay is not None:
        raise InputError(
            f"--decay is given with --schedule {options.schedule}: only wsd decays, leave it out"
        )
    if options.schedule == "constant" and options.final_lr:
        raise InputError(
            "--final-lr is given with --schedule constant: its rate stays at --lr, leave it out"
        )


def _complete(options: argparse.Namespace, begun: dict) -> None:
    """Set --warmup and --decay if they are not given. --warmup is that of the resumed run, or else
    follows from --steps; --decay follows from --steps."""
    if options.warmup is None:
        options.warmup = begun.get("warmup", min(100, options.steps // 10))
    if not 0 <= options.warmup < options.steps:
        raise InputError(f"--warmup is {options.warmup}: expected 0 to --steps - 1")
    if options.schedule == "wsd":
        most = options.steps - options.warmup
        if options.decay is None:
            options.decay = min(options.steps // 5, most)
        if not 0 <= options.decay <= most:
            raise InputError(f"--decay is {options.decay}: expected 0 to --steps - --warmup")


def _config(file: Path) -> LlamaConfig:
    if file.is_dir():
        inside = file / "config.json"
        what = f"give {inside}" if inside.exists() else "expected a file such as config.json"
        raise ConfigError(f"--config {file} is a directory: {what}")
    try:
        return LlamaConfig.from_hf(read_json(file))
    except ConfigError as error:
        names_it = str(error).startswith(str(file))
        raise ConfigError(f"--config {'' if names_it else f'{file}: '}{error}") from None


def _tokenizer_model(options: argparse.Namespace, config: LlamaConfig, stories: list[str]) -> bytes:
    """The given tokenizer, else that of the run that is resumed, else one trained now."""
    is_begun = (options.out / CHECKPOINT).exists()
    path = options.tokenizer or (options.out / "tokenizer.model" if is_begun else None)
    if path is not None:
        return read_tokenizer(path, config.vocab_size)
    return train_tokenizer(stories, config.vocab_size)


def _identity(
    options: argparse.Namespace, config: LlamaConfig, tokenizer: bytes, start: Start | None
) -> dict:
    """Everything that determines a run's results; see training/identity.py."""
    names = ("steps", "batch", "micro_batch", "packed", "schedule", "lr", "warmup", "decay")
    names += ("final_lr", "weight_decay", "clip", "seed")
    return {
        "config": config.to_hf(),
        "text": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "start": None if start is None else start.digest(),
        **{name: getattr(options, name) for name in names},
    }


def _write_tokenizer(tokenizer: bytes, out: Path) -> None:
    try:
        mark_as_run(out)
        with atomic_file(out / "tokenizer.model") as partial:
            partial.write_bytes(tokenizer)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


_EPILOG = """
A config needs hidden_size, num_hidden_layers, num_attention_heads, intermediate_size and
vocab_size. It may have num_key_value_heads (default: num_attention_heads), head_dim (hidden_size /
num_attention_heads), max_position_embeddings (2048; the length of a row), rms_norm_eps (1e-6),
rope_theta (10000), tie_word_embeddings (false), bos_token_id (1) and eos_token_id (2).
To train longer after a run has finished, repeat its command with a larger --steps. This works if
the completed steps keep their learning rates. They do with constant, and with wsd before its decay
(run with --decay 0 first, and give --decay at the end). They do not with cosine.
"""


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        "train",
        "Train a LLaMA-2 on a text file, from random weights or from those of a checkpoint.",
        formatter_class=_Help,
        epilog=_EPILOG,
    )
    files = p.add_argument_group("files")
    files.add_argument(
        "--text", type=named_path, required=True, metavar="FILE",
        help="UTF-8; lines of <|endoftext|> separate stories",
    )  # fmt: skip
    files.add_argument("--valid", type=named_path, metavar="FILE", help="stories to validate on")
    begin = files.add_mutually_exclusive_group(required=True)
    begin.add_argument(
        "--config", type=named_path, metavar="FILE",
        help="start from random weights of this shape, a Hugging Face config.json (fields: below)",
    )  # fmt: skip
    begin.add_argument(
        "--from", dest="start", type=named_path, metavar="DIR",
        help="start from weights, config and tokenizer of this directory (float dtypes only)",
    )  # fmt: skip
    files.add_argument(
        "--out", type=named_path, required=True, metavar="RUN",
        help="directory of the run; if it holds a checkpoint, training resumes from it",
    )  # fmt: skip
    files.add_argument(
        "--tokenizer", type=named_path, metavar="FILE",
        help="use this tokenizer.model instead of training one with the config's vocab_size",
    )  # fmt: skip
    add = p.add_argument_group("training").add_argument
    add("--steps", type=int, default=5000, metavar="N", help="total number of optimizer steps")
    add("--batch", type=int, default=32, metavar="N", help="rows per step")
    add(
        "--micro-batch", type=int, default=4, metavar="N",
        help="rows per forward pass; gradients are summed over a step",
    )  # fmt: skip
    add("--packed", action="store_true", help="fill each row with several stories")
    add("--lr", type=float, default=3e-3, metavar="X", help="highest learning rate")
    add(
        "--warmup", type=int, metavar="N",
        help="steps to reach --lr (default: a tenth of --steps, at most 100)",
    )  # fmt: skip
    add(
        "--schedule", choices=SCHEDULES, default="cosine",
        help="rate after the warm-up: half a cosine; wsd: --lr, then a decay; constant: --lr",
    )  # fmt: skip
    add(
        "--decay", type=int, metavar="N",
        help="with wsd, number of last steps in which the rate falls (default: a fifth of --steps)",
    )  # fmt: skip
    add("--final-lr", type=float, default=0.0, metavar="X", help="last rate as a fraction of --lr")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="weight decay of matrices")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights and row order")
    add = p.add_argument_group("computation").add_argument
    add("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    add("--device", type=int, metavar="N", help="which GPU (default: the first)")
    add("--threads", type=int, metavar="N", help="micro-batches in parallel (default: all cores)")
    add = p.add_argument_group("output").add_argument
    add("--report-every", type=int, default=50, metavar="N", help="steps between lines")
    add("--valid-every", type=int, default=250, metavar="N", help="steps between validations")
    add("--valid-stories", type=int, default=100, metavar="N", help="stories of --valid to use")
    add("--checkpoint-every", type=int, default=250, metavar="N", help="steps between checkpoints")
    add("--sample", type=utf8, metavar="PROMPT", help="continue this text at each validation")
    add("--plot", action="store_true", help="draw RUN/loss.png at the end (extra [plot])")
    return p


if __name__ == "__main__":
    sys.exit(main())
