"""When a rank dies while all of them work together, the others stop and name it.

By itself gloo would name a port, and NCCL would wait for ten minutes. So a thread of each rank writes a heartbeat to
the store at which the ranks met, watches the next rank's, and tells all ranks when that one stops.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError

# seconds: between heartbeats; without one until a rank counts as lost, normally and after a communication error; given
# to the main thread to stop by itself
BEAT, SILENT, SILENT_AFTER_ERROR, PATIENCE = 2.0, 20.0, 8.0, 15.0
DONE, FAILED = "done", "failed"
_times = 0


@contextmanager
def together(what: str, stop_stuck: bool = True) -> Iterator[None]:
    """Run this block on all ranks; if one dies, the others stop and name it.

    Args:
        what: what errors call the block ("the scan").
        stop_stuck: end this process when a rank is lost and the main thread waits for it forever. Set to False where a
            rank may be silent for other reasons: writing a large file keeps Python's other threads waiting.

    Raises:
        KappaTuneError: another rank died or failed; names it.
    """
    if ranks.world() == 1:
        yield
        return
    watch = _Watch(what, stop_stuck)
    watch.start()
    try:
        yield
        watch.say(DONE)
    except KappaTuneError as error:
        watch.say(f"{FAILED}: {error}")
        raise
    except RuntimeError as error:
        # gloo and NCCL raise it where a rank is gone
        problem = watch.ask_for_problem()
        watch.say(f"{FAILED}: {error}")
        if problem:
            raise KappaTuneError(problem) from error
        raise
    except BaseException as error:
        # an interrupt too: without a last heartbeat this rank would count as killed
        watch.say(f"{FAILED}: {type(error).__name__}: {error}")
        raise
    finally:
        watch.stop()


class _Watch(threading.Thread):
    def __init__(self, what: str, stop_stuck: bool) -> None:
        global _times
        super().__init__(daemon=True)
        _times += 1
        self._prefix = f"kappatune/{_times}"
        self._what, self._stop_stuck = what, stop_stuck
        self._me, self._next = ranks.rank(), (ranks.rank() + 1) % ranks.world()
        self._store = _own_connection()
        self._state, self._silent = "here", SILENT
        self._problem = ""
        self._ended, self._known = threading.Event(), threading.Event()
        # the thread must not overwrite the last state with an older one
        self._signing = threading.Lock()
        # at once, since a rank without any heartbeat counts as not started yet
        self._sign(0)

    def say(self, state: str) -> None:
        """Publish this rank's state."""
        self._state = state
        if not self._problem:
            # the process that holds the store may have ended before
            with suppress(RuntimeError):
                self._sign(0)

    def ask_for_problem(self) -> str:
        """The cause of a communication error: which rank is gone; "" if all ranks are alive."""
        self._silent = SILENT_AFTER_ERROR
        self._known.wait(SILENT_AFTER_ERROR + 3 * BEAT)
        return self._problem

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        seen, since, beat = "", time.monotonic(), 0
        while not self._ended.wait(BEAT):
            beat, known = beat + 1, ""
            try:
                self._sign(beat)
                sign = self._read(f"{self._next}")
                known = self._read("problem")
                seen, since = (sign, time.monotonic()) if sign != seen else (seen, since)
                if not known and (missing := self._missing(sign, time.monotonic() - since)):
                    known = f"{self._what}: rank {self._next} {missing}"
                    self._store.set(f"{self._prefix}/problem", known)
            except RuntimeError:
                # the store is in the launcher, or in the first rank
                gone = f"{self._what}: the process at which the ranks meet (rank 0 or its launcher) is gone."
                known = known or gone
            if known:
                self._stop_all(known)
                return

    def _missing(self, sign: str, silence: float) -> str:
        """What is wrong with the next rank, whose last heartbeat `sign` is `silence` seconds old; "" if nothing."""
        _, _, state = sign.partition(" ")
        if state.startswith(FAILED):
            return f"stopped ({state.removeprefix(FAILED).lstrip(': ')})."
        if sign and state != DONE and silence > self._silent:
            return f"has given no sign of life for {silence:.0f} seconds: it was killed, or its machine is gone."
        return ""

    def _stop_all(self, problem: str) -> None:
        self._problem = problem
        self._known.set()
        if self._stop_stuck and not self._ended.wait(PATIENCE):
            print(f"Error: {problem}", file=sys.stderr, flush=True)
            os._exit(1)

    def _sign(self, beat: int) -> None:
        with self._signing:
            self._store.set(f"{self._prefix}/{self._me}", f"{beat} {self._state}")

    def _read(self, name: str) -> str:
        key = f"{self._prefix}/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _own_connection() -> Any:
    """A new connection to the store at which the ranks met; the process group's own may be busy waiting."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, None, False, timedelta(seconds=10))
    return store
