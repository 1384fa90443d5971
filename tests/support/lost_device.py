"""Runs ownpath in a process of its own whose device is lost in the middle of a step, and tells how all of it ends.

    python lost_device.py FAULT TRIGGER serve ...     the command line; the fault comes once the file TRIGGER exists
    python lost_device.py FAULT TRIGGER engine DEVICE the embedded model in a bare engine; prints how it ended as JSON

FAULT: ``pretended`` lets steps fail and the check of the device with them, on any device. The others are real errors of
CUDA after which every later call of the process fails: ``assertion`` in a device's code, and an illegal ``address``.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

WAIT_S = 120.0
FAULTS = ("assertion", "address")
PRETENDED = "CUDA error: an illegal memory access was encountered"
LOST = "the device computes nothing any more"
_ASKED = {"prompt": "The capital of France is", "stream": True, "temperature": 1.5, "max_tokens": 400, "seed": 3}
_MANY = 400
_DONE = "data: [DONE]"


@dataclass
class Ending:
    """The end of a server whose device was lost. streams: the error that each open answer ended with.

    health: the status and the reason that ``/health`` told. log: what the process said on stderr.
    """

    streams: list[str] = field(default_factory=list)
    health: tuple[int, str] | None = None
    exit_code: int | None = None
    log: str = ""


def command(fault: str, trigger: Path, *rest: str) -> list[str]:
    """Returns the command line of such a process."""
    return [sys.executable, __file__, fault, str(trigger), *rest]


def end_of_server(fault: str, trigger: Path, options: Sequence[str], num_streams: int = 2) -> Ending:
    """Serves, opens streams, lets the device be lost once each has had its first event, and waits for the end."""
    import httpx

    ending = Ending()
    full = command(fault, trigger, "serve", *options, "--port", "0", "--max-model-len", "512")
    process = subprocess.Popen(full, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+)/v1\n", line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(said))
        reader = threading.Thread(target=said.extend, args=(process.stderr,))  # a full pipe would stop the server
        reader.start()
        begun = threading.Semaphore(0)

        def follow() -> None:
            last = _DONE
            while last == _DONE:  # an answer may have ended by itself
                with httpx.stream("POST", f"{found[1]}/v1/completions", json=_ASKED, timeout=WAIT_S) as response:
                    for line in filter(None, response.iter_lines()):
                        last = line
                        begun.release()
            ending.streams.append(json.loads(last.removeprefix("data: "))["error"]["message"])

        threads = [threading.Thread(target=follow) for _ in range(num_streams)]
        for thread in threads:
            thread.start()
        for _ in range(2 * num_streams):
            assert begun.acquire(timeout=WAIT_S)
        trigger.touch()
        for thread in threads:
            thread.join(WAIT_S)
        health = httpx.get(f"{found[1]}/health", timeout=WAIT_S)
        ending.health = health.status_code, health.json()["status"]
        ending.exit_code = process.wait(WAIT_S)
        reader.join(WAIT_S)
        ending.log = "".join(said)
    finally:
        process.kill()
        process.wait()
    return ending


def break_step(fault: str, trigger: Path) -> None:
    """Lets every step of every model fail once the trigger exists, by ``forward`` and by a graph."""
    import torch

    from ownpath.engine import engine
    from ownpath.engine.decoder import Decoder
    from ownpath.model.batch import ForwardBatch
    from ownpath.model.model import Model

    forward, launch, device_problem = Model.forward, Decoder.launch, engine.device_problem

    def fail_if_due(device: torch.device) -> None:
        if trigger.exists():
            if fault == "pretended":
                raise RuntimeError(PRETENDED)
            lose(fault, device)

    def failing(self: Model, batch: ForwardBatch) -> torch.Tensor:
        fail_if_due(self.cache_spec.device)
        return forward(self, batch)

    def failing_launch(self: Decoder, count: int) -> torch.Tensor:
        fail_if_due(self.pool.spec.device)
        return launch(self, count)

    def problem(device: torch.device | str) -> str | None:
        return PRETENDED if fault == "pretended" and trigger.exists() else device_problem(device)

    Model.forward, Decoder.launch = failing, failing_launch
    engine.device_problem = problem


def lose(fault: str, device: object) -> None:
    """Makes a real error of CUDA that lasts as long as the process; it comes to light with a later call."""
    import torch

    if fault == "assertion":
        torch.zeros(4, device=device)[torch.full((8,), 1 << 20, device=device)]
        return
    from support.illegal_address import write_far_away

    write_far_away[(1,)](torch.zeros(4, device=device))


def end_of_engine(trigger: Path, device: str) -> dict[str, object]:
    """Runs two requests in a bare engine until the device is lost; returns how they and the engine ended."""
    from ownpath.chat.tokenizer import Tokenizer
    from ownpath.config import EngineConfig
    from ownpath.engine.engine import Engine, EngineStopped
    from ownpath.engine.request import Request, SamplingParams, StepOutput
    from ownpath.loading import default_model_dir, load_model

    folder = default_model_dir()
    config = EngineConfig.for_device(device, 512)
    tokenizer = Tokenizer.from_folder(folder)
    engine = Engine(load_model(folder, config), config, tokenizer.num_tokens, end_token_ids=[])
    engine.start()
    outputs: list[queue.SimpleQueue[StepOutput]] = [queue.SimpleQueue() for _ in range(2)]
    ids = tokenizer.encode_raw("The capital of France is")
    requests = [Request(ids, SamplingParams(_MANY), outbox.put) for outbox in outputs]
    engine.submit(requests)
    for outbox in outputs:
        assert outbox.get(timeout=WAIT_S).error is None
    trigger.touch()
    errors = []
    for outbox in outputs:
        while (output := outbox.get(timeout=WAIT_S)).finish_reason is None:
            pass
        errors.append(output.error)
    end = time.monotonic() + WAIT_S
    while engine.is_alive and time.monotonic() < end:
        time.sleep(0.01)
    try:
        engine.submit([Request(ids, SamplingParams(1), lambda output: None)])
        refusal = None
    except EngineStopped as error:
        refusal = str(error)
    return {"errors": errors, "failure": engine.failure, "is_alive": engine.is_alive, "refusal": refusal}


def run() -> int:
    """Runs what the command line says."""
    fault, trigger, *rest = sys.argv[1:]
    break_step(fault, Path(trigger))
    if rest[0] == "engine":
        print(json.dumps(end_of_engine(Path(trigger), rest[1])), flush=True)
        os._exit(0)  # an ordinary end would wait for the lost device
    from ownpath.cli import main

    return main(rest)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(run())
