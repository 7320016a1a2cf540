"""Starts training from the weights, config and tokenizer of a model directory."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import npllama
from converting.huggingface import COPIED
from converting.tokenizers import read_tokenizer, tokenizer_config
from converting.writer import to_json
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.console import reason, tell
from npllama.errors import InputError, TokenizerError, TokenizerWarning
from npllama.llama import Llama
from npllama.ops import Ops
from npllama.progress import work
from npllama.small_file import MAX_TOKENIZER, read_small_file
from npllama.tokenizer_files import tokenizer_file
from npllama.weights import Checkpoint, named_arrays, shard_files


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Attributes:
        tokenizer: contents of a tokenizer.model.
        files: further files of the trained model by name, apart from weights and config.json.
    """

    directory: Path
    config: LlamaConfig
    tokenizer: bytes
    files: dict[str, bytes]

    def digest(self) -> str:
        """SHA-256 of the weight files. A run can resume only with the weights it started from."""
        digest = hashlib.sha256()
        paths = shard_files(self.directory)
        with work("checking the weights", sum(path.stat().st_size for path in paths)) as checked:
            for path in paths:
                with open(path, "rb") as file:
                    while part := file.read(2**24):
                        digest.update(part)
                        checked.advance(len(part))
        return digest.hexdigest()

    def copy_weights(self, run: Llama) -> None:
        """Copy the checkpoint's weights to the float32 weights of `run`."""
        weights = named_arrays(run.parameters, self.config)
        views = Checkpoint(self.directory, self.config).parameters(Ops(Backend()))
        stored = named_arrays(views, self.config)
        with work("reading the weights", self.config.n_parameters) as read:
            for name, array in stored.items():
                weights[name][...] = run.backend.to_device(array.astype("float32"))
                read.advance(array.size)


def read_start(directory: Path) -> Start:
    """Read a model directory except its weights, which `copy_weights` reads.

    Raises:
        NpllamaError: as for `npllama.load`; also if weights are int8 or there is no tokenizer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)  # llama.notes has its text
        llama = npllama.load(directory, "numpy", threads=1)
    for note in llama.notes:
        tell(f"train: {note}")
    if any(a.dtype == np.int8 for a in named_arrays(llama.parameters, llama.config).values()):
        raise InputError(
            f"--from {directory} holds int8 weights, which are too coarse for training: give the "
            "float weights from which they were made"
        )
    path = tokenizer_file(directory)
    if path is None:
        raise TokenizerError(
            f"--from {directory} has no tokenizer.model or tokenizer.json: copy the tokenizer of "
            "the checkpoint to this directory"
        )
    tokenizer = read_tokenizer(path, llama.config.vocab_size)
    try:
        files = {
            name: read_small_file(directory / name, MAX_TOKENIZER)
            for name in (*COPIED, "generation_config.json")
            if (directory / name).exists()
        }
    except OSError as error:
        raise InputError(f"--from {directory} cannot be read: {reason(error)}") from None
    files.setdefault("tokenizer_config.json", to_json(tokenizer_config(path)))
    return Start(directory, llama.config, tokenizer, files)
