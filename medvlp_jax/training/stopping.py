"""Being asked to stop: SIGTERM or the first Ctrl-C is noticed, the run saves, and leaves with 75.

Python runs signal handlers between two instructions of the main thread, so while XLA compiles or a
step runs on the device they wait. As long as there is nothing to save, a thread ends the process
all the same: a long first compilation does not use up the time a scheduler grants.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

# EX_TEMPFAIL of sysexits.h, "try the same again later". Not 143 (128 + SIGTERM), which a scheduler
# also sees from a process that was killed before it could save; and not 0, which means finished.
EXIT_CODE = 75
ASKING = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3.0  # seconds for the main thread to leave by itself


class Stopped(BaseException):
    """The run was asked to stop and has saved what there was to save.

    Not an Exception: raised from a signal, it would be taken for a damaged file or a full disk by
    whatever handles what a library raises.
    """


class Signals:
    """Remembers, while its `with` block lasts, that SIGTERM or SIGINT has come.

    Attributes:
      asked: whether one has.
      expendable: whether the process could end here and now without a loss.
    """

    def __init__(self):
        self.asked = False
        self.expendable = True
        self._at_once = False

    def __enter__(self):
        """Take over both signals."""
        self._handlers = {number: signal.signal(number, self._notice) for number in ASKING}
        # Python writes the number of a signal here as it arrives, whatever the main thread does.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        """Give them back."""
        self.expendable = False
        signal.set_wakeup_fd(-1)
        os.close(self._writing)
        self._watcher.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped out of the block as soon as a signal comes, also where the block waits.

        For work whose loss harms nothing: waiting for data, evaluation, preparation.
        """
        if self.asked:
            raise Stopped
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def _notice(self, number, frame):
        del frame
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = True
        again = "; Ctrl-C again stops without saving" if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        print(f"medvlp: {name}: saving, then stopping{again}.", file=sys.stderr, flush=True)
        if self._at_once:
            self._at_once = False  # once; what handles it is not to be interrupted
            raise Stopped

    def _watch(self, reading):
        """End the process when a signal finds nothing to save and the main thread is busy."""
        while arrived := os.read(reading, 1):
            if arrived[0] not in ASKING:
                continue
            deadline = time.monotonic() + PATIENCE
            while self.expendable and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.expendable:
                print("medvlp: stopped; nothing was there to save.", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
        os.close(reading)
