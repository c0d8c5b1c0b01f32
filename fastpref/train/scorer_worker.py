"""The process in which a user's `module:function` scores responses; scorer.py starts it and talks to it in JSON, over a
connection of multiprocessing (its end here is a file descriptor).

    python fastpref/train/scorer_worker.py module:function FD

    out  {"ready": true}  or  {"unusable": "why"}, once
    in   {"prompt": ..., "response": "..."}
    out  {"score": 0.5}  or  {"failed": "raised" | "not a number" | "not finite", "message": "..."}

Run as a file: as a module of the package it would import torch first, and a restart would take seconds. The process
ends when the one that started it does.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_FROZEN = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")  # Python's own import


def load(spec: str) -> Callable[..., Any]:
    """Raises LookupError with what is wrong with `spec`."""
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - a module may raise anything, SystemExit too
        if isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.partition(".")[0]):
            raise LookupError(f"there is no module {error.name!r} here or on the Python path") from None
        raise LookupError(f"importing {module_name} raised {_told(error)}") from None
    function = getattr(module, name, None)
    if function is None:
        raise LookupError(f"module {module_name} has no {name!r}")
    if not callable(function):
        raise LookupError(f"{name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def answer(function: Callable[..., Any], prompt: Any, response: str) -> dict[str, Any]:
    try:
        value = function(prompt, response)
    except BaseException as error:  # noqa: BLE001 - SystemExit too: the next response may go well
        return {"failed": "raised", "message": _told(error)}
    if not isinstance(value, numbers.Real):
        return {"failed": "not a number", "message": f"returned {type(value).__name__}: {_short(value)}"}
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        return {"failed": "not finite", "message": f"returned {_short(value)}"}
    return {"score": score}


def _told(error: BaseException) -> str:
    """One line: what was raised, and where."""
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in (__file__, *_FROZEN)]
    where = "".join(f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in theirs[-1:])
    try:
        first = next(iter(str(error).splitlines()), "")
    except Exception:  # noqa: BLE001 - its own __str__
        first = ""
    return f"{type(error).__name__}{': ' * bool(first)}{first[:300]}{where}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - its own __repr__
        text = "?"
    return text if len(text) <= 60 else text[:57] + "..."


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(spec: str, fd: int) -> None:
    os.set_inheritable(fd, False)  # what the function starts must not hold it open
    connection = Connection(fd)
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # whose names are not the user's
        del sys.path[0]
    sys.path.insert(0, os.getcwd())
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def reply(content: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(content).encode())

    try:
        function = load(spec)
    except LookupError as error:
        return reply({"unusable": str(error)})
    reply({"ready": True})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        reply(answer(function, request["prompt"], request["response"]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
