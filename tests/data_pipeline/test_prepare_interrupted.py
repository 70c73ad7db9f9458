"""A preparation that dies, or whose workers die, at any moment: what comes of it, and that the next one goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import imdm_scale.data
from imdm_scale.errors import UserError
from tests.data_pipeline.preparing import TEXTS, TOKENIZER, files_of, prepared, report_always, source

__all__ = ["report_always", "source"]

FORK = multiprocessing.get_context("fork")
TRACED = str(Path(imdm_scale.data.__file__).parent)
NUM_MOMENTS = 12
ROOT = Path(__file__).parents[2]


def prepared_line_by_line(out, before_line):
    """Prepares and calls before_line(file, number) before each line of the data pipeline's code."""

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            before_line(frame.f_code.co_filename, frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        prepared(out)
    finally:
        sys.settrace(None)


def in_a_fork(function, *arguments):
    """Exit code of a copy of this process that calls the function."""
    child = FORK.Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def _prepare_and_die(out, moment, occurrence):
    seen = Counter()

    def before_line(*line):
        seen[line] += 1
        if line == moment and seen[line] == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    prepared_line_by_line(out, before_line)


@pytest.fixture
def moments(source, tmp_path):
    """Every line that a preparation runs, and how often. The rare ones, at a shard's end, are as likely to be drawn."""
    lines = Counter()
    prepared_line_by_line(tmp_path / "traced", lambda *line: lines.update([line]))
    return sorted(lines.items())


@pytest.mark.parametrize("seed", range(NUM_MOMENTS))
def test_killed_at_a_random_moment(tmp_path, moments, seed):
    chosen = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(2):  # a second time where it goes on
        moment, count = chosen.choice(moments)
        occurrence = chosen.randint(1, count)
        exit_code = in_a_fork(_prepare_and_die, out, moment, occurrence)
        assert exit_code in (-signal.SIGKILL, 0)  # 0: what goes on comes by a line less often
    prepared(out)
    assert files_of(out) == files_of(tmp_path / "traced")


def test_the_first_kill_is_one(tmp_path, moments):
    """That the moments above are reached."""
    moment, count = moments[len(moments) // 2]
    assert in_a_fork(_prepare_and_die, tmp_path / "out", moment, count) == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_ends_the_preparation(tmp_path, source, report_always, seed):
    prepared(tmp_path / "undisturbed")
    out, reports = tmp_path / "out", []
    chosen = random.Random(seed)
    last = chosen.randint(1, 30)

    def kill_one(progress):
        reports.append(progress)
        if len(reports) == last:
            os.kill(chosen.choice(multiprocessing.active_children()).pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"One of the 2 worker processes was killed by signal 9.* to go on"):
        prepared(out, workers=2, report=kill_one)
    assert multiprocessing.active_children() == []
    prepared(out, workers=2)
    assert files_of(out) == files_of(tmp_path / "undisturbed")


class DiesInTheMiddleOfAnAnswer:
    """A tokenizer that kills its process at one text, after the first bytes of a long message to the other side."""

    vocab_size, mask_id, bos_id, eos_id = 4097, 4096, 1, 2
    fingerprint = TOKENIZER.fingerprint

    def encode_batch(self, texts):
        if any("plover" in text for text in texts):
            descriptors = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
            for descriptor in descriptors:
                with suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                        os.write(descriptor, struct.pack("!i", 10_000) + b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return TOKENIZER.encode_batch(texts)

    def save(self, directory):
        TOKENIZER.save(directory)


def test_a_worker_that_dies_in_the_middle_of_an_answer(tmp_path, source):
    source([*TEXTS, "say plover", *TEXTS])
    with pytest.raises(UserError, match="One of the 3 worker processes was killed by signal 9"):
        prepared(tmp_path, tokenizer=DiesInTheMiddleOfAnAnswer(), workers=3)
    assert multiprocessing.active_children() == []


ENDLESS = """
import sys
from itertools import count
from pathlib import Path

from imdm_scale.data import prepare as module
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer


class Endless:
    num_documents, identity = None, "endless"

    def batches(self, start, size):
        for number in count(start, size):
            yield [f"document {number + i} of many" for i in range(size)]


def told(progress):
    if progress.blocks > 500:
        print("working", flush=True)


if __name__ == "__main__":
    module.open_documents = lambda spec, split: Endless() if split == "train" else None
    module.REPORT_SECONDS, module.CHARACTERS_PER_BATCH = 0, 1000
    options = module.PrepareOptions(length=16, shard_bytes=10_000)
    module.prepare(SourceSpec("endless"), load_tokenizer(None), options, Path(sys.argv[1]), 2, told)
"""


@pytest.fixture
def endless(tmp_path):
    """A program that prepares endless text with two workers, alone in a process group, at work."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    program = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )
    assert program.stdout.readline() == "working\n"
    yield program
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.communicate()


def wait_until_all_are_gone(program):
    """Fails where a process of the program's group lives on."""
    deadline = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while True:
            os.killpg(program.pid, 0)
            assert time.monotonic() < deadline, "a process is left behind"
            time.sleep(0.02)


def test_ctrl_c_leaves_no_process_behind(endless):
    os.killpg(endless.pid, signal.SIGINT)  # as a terminal does it
    _, errors = endless.communicate()
    assert endless.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, "only the program's own"
    assert errors.endswith("KeyboardInterrupt\n")
    wait_until_all_are_gone(endless)


def test_workers_do_not_outlive_a_killed_program(endless):
    endless.kill()
    endless.wait()
    wait_until_all_are_gone(endless)
