"""Processes of the fault campaign: forked from one that has imported everything, so that none takes seconds to start.

The parent starts no thread and computes nothing; one thread a process.
"""

import fcntl
import gc
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_verbs import TIMED

PIPE = 1 << 20  # bytes that a process can print without a reader
HANG = 900.0  # seconds after which a process counts as hanging; some take many on a busy machine
CRASHED = 70  # exit status of a traceback
SENTENCES = (1, 2, 130)  # exit statuses of `budwood.cli.errors`
_loaded: dict[bytes, str] = {}  # digests of logits by digests of the files that are loaded


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    status: int | None
    signal: int | None
    printed: str
    errors: str

    def is_sentence(self) -> bool:
        """Whether it ended with a sentence of budwood, not with the text of an unexpected exception."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        unexpected = "Traceback" in self.errors or "BUDWOOD_DEBUG" in self.errors
        return self.status in SENTENCES and not unexpected and bool(lines) and lines[-1].startswith("budwood: ")

    def __str__(self) -> str:
        if self.signal is not None:
            return "hung" if self.status == HANG else f"ended by {signal.Signals(self.signal).name}"
        last = self.errors.strip().splitlines()[-1:] or ["nothing printed"]
        return f"status {self.status}" + (f" ({last[0]})" if self.status else "")


class Process:
    """`budwood` with these arguments, begun at once; `arm` is called in it before."""

    def __init__(self, arguments: list[str], arm: Callable[[], object] = lambda: None):
        self.pipes = [os.pipe(), os.pipe()]
        for _, end in self.pipes:
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE)
        self.due: tuple[float, signal.Signals] | None = None
        self.started = time.monotonic()
        sys.stdout.flush()
        self.id = os.fork()
        if self.id == 0:
            run_verb(arguments, arm, self.pipes[0][1], self.pipes[1][1])
        for _, end in self.pipes:
            os.close(end)

    def send_after(self, seconds: float, sent: signal.Signals) -> None:
        self.due = (self.started + seconds, sent)


def run_verb(arguments: list[str], arm: Callable[[], object], out: int, errors: int) -> None:
    """Never returns."""
    from budwood.cli import main

    status, begun = CRASHED, False
    try:
        os.dup2(out, 1)
        os.dup2(errors, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["budwood", *arguments]
        arm()
        begun = True
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        if begun:
            traceback.print_exc()
        else:  # as during the imports of Python
            status = SENTENCES[-1]
            os.write(2, b"budwood: interrupted\n")
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def finished(process: Process) -> Done:
    """Waits for the end; a process that hangs is killed."""
    hung = False
    while True:
        ended, code = os.waitpid(process.id, os.WNOHANG)
        if ended:
            break
        now = time.monotonic()
        if process.due is not None and now >= process.due[0]:
            os.kill(process.id, process.due[1])
            process.due = None
        if now > process.started + HANG and not hung:
            os.kill(process.id, signal.SIGKILL)
            hung = True
        time.sleep(0.002)
    printed, errors = (read_all(end) for end, _ in process.pipes)
    if os.WIFSIGNALED(code):
        return Done(int(HANG) if hung else None, os.WTERMSIG(code), printed, errors)
    return Done(os.WEXITSTATUS(code), None, printed, errors)


def read_all(end: int) -> str:
    parts = []
    while part := os.read(end, PIPE):
        parts.append(part)
    os.close(end)
    return b"".join(parts).decode(errors="replace")


def in_process(work: Callable[[], object]) -> str:
    """What `work` returns, as text, computed in a process of its own; the empty string where it raises."""
    end, inner = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(inner, str(work() or "").encode())
            status = 0
        except BaseException:
            if "BUDWOOD_DEBUG" in os.environ:
                traceback.print_exc()
        finally:
            os._exit(status)
    os.close(inner)
    os.waitpid(child, 0)
    return read_all(end)


def loaded(folder: Path) -> str:
    """A digest of the logits of the model that transformers loads from a folder; the empty string where it refuses."""
    if not (folder / "config.json").is_file():
        return ""
    files = sorted(file for pattern in ("*.json", "*.safetensors") for file in folder.glob(pattern))
    same = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files if file.name not in TIMED))
    if same.digest() not in _loaded:
        _loaded[same.digest()] = in_process(lambda: logits(folder))
    return _loaded[same.digest()]


def logits(folder: Path) -> str:
    import warnings

    import torch
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError("it begins with random weights")
    with torch.no_grad():
        return hashlib.sha256(model(torch.arange(3, 27)[None]).logits.float().numpy().tobytes()).hexdigest()


def preload() -> None:
    """Imports everything that the processes use, with one thread."""
    os.environ.update(
        BUDWOOD_KERNELS="reference",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch

    torch.set_num_threads(1)
    import gguf  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.seed_oss.modeling_seed_oss  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from typer.testing import CliRunner

    import budwood.benchmarking as benchmarking
    import budwood.cli
    import budwood.comparison.compare
    import budwood.conversion
    import budwood.finetuning
    import budwood.inspection
    import budwood.retraining
    from budwood import bench, evaluate, plan, prune, repack  # noqa: F401

    # Figures of a few runs: this is not about speed.
    benchmarking.PROMPT, benchmarking.NEW, benchmarking.REPEATS, benchmarking.COLD = 16, 2, 1, 1 << 16
    benchmarking.ROUNDS, benchmarking.MANY_ROWS_ROUNDS = {}, 1
    get_checkpoint_conversion_mapping("llama")  # a table that is made at first use, in half a second
    CliRunner().invoke(budwood.cli.app, ["methods", "wrp"])  # what the command line imports at first use
    gc.collect()
    gc.freeze()  # pages that are not touched are not copied
