"""Over HTTP every answer is the one that the simulation gives: one by one, streamed, and by hundreds at once.

The tests share one server, and the last of them breaks it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elision.spd import SyncPlan, save
from tests.spd.tiny import VOCABULARY
from tests_vllm.engines import LAYERS, NEW, RANKS, model_of, prompts, simulated

PLAN = SyncPlan(RANKS, tuple(range(LAYERS)))
REQUESTS = 500


class Server:
    """vLLM's OpenAI-compatible server in processes of its own."""

    def __init__(self, place: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place)]
        command += ["--served-model-name", "spd", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        command += ["--tensor-parallel-size", str(RANKS), "--max-model-len", "64", "--max-num-seqs", "32"]
        command += ["--distributed-executor-backend", "mp", "--enforce-eager"]
        self.log = place.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError("the server did not start")

    def post(self, question: list[int], **options: Any) -> Any:
        body = {"model": "spd", "prompt": question, "max_tokens": NEW, "temperature": 0, **options}
        body |= {"ignore_eos": True, "skip_special_tokens": False}  # every token is a word of the answer
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def complete(self, question: list[int]) -> str:
        with self.post(question) as response:
            return json.load(response)["choices"][0]["text"]

    def stream(self, question: list[int]) -> list[str]:
        with self.post(question, stream=True) as response:
            lines = [line.decode().strip().removeprefix("data: ") for line in response if line.strip()]
        assert lines[-1] == "[DONE]"
        return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]

    def workers(self) -> dict[str, psutil.Process]:
        """The processes that compute, by vLLM's name for them."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        titles = {process: process.cmdline()[0] for process in found if process.cmdline()}
        return {title.rpartition("::")[2]: process for process, title in titles.items() if "::Worker" in title}

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        print(self.log.read_text())  # which pytest shows where a test failed


def words(tokens: list[int]) -> str:
    """Token numbers as the text that the test's tokenizer makes of them."""
    return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "model"
    vocabulary = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(model_of("llama"), PLAN, place, PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0"))
    running = Server(place)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def expected(questions: list[list[int]]) -> list[str]:
    return [words(answer.tokens) for answer in simulated(model_of("llama"), PLAN, questions)]


def test_completion_and_stream(server):
    for question, answer in zip(prompts(2), expected(prompts(2)), strict=True):
        assert server.complete(question).split() == answer.split()
        pieces = server.stream(question)
        assert len(pieces) > 1
        assert "".join(pieces).split() == answer.split()


def test_hundreds_of_mixed_requests_at_once_each_get_their_own_answer(server):
    different = prompts(100, seed=7)
    wanted = expected(different)
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(server.complete, [different[i % 100] for i in range(REQUESTS)]))
    assert len(texts) == REQUESTS
    wrong = [i for i, text in enumerate(texts) if text.split() != wanted[i % 100].split()]
    assert wrong == []


def test_a_killed_worker_ends_the_others_and_is_named(server):
    """Within 30 seconds, in the middle of generating; the last test, because it ends the server."""
    workers = server.workers()
    assert len(workers) == RANKS, workers

    def ask() -> None:
        while True:
            server.complete(prompts(1)[0])

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        time.sleep(1)
        assert not any(future.done() for future in asking)
        workers["Worker_TP1"].kill()
        gone, left = psutil.wait_procs([*workers.values(), psutil.Process(server.process.pid)], timeout=30)
        assert not left, (gone, left)
        for future in asking:
            with pytest.raises((OSError, HTTPException)):
                future.result(timeout=30)
    assert "VllmWorker-1 died unexpectedly" in server.log.read_text()
