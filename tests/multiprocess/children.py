"""What the fork server's tests let it fork: children small enough to see through."""

from __future__ import annotations

import json
import os
import signal
import time


def main(argv: list[str]) -> int:
    verb, *words, _, ready_fd = argv
    if verb == "sleep-deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if verb == "sleep-with-child" and os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    os.write(int(ready_fd), json.dumps({"pid_seen": os.getpid()}).encode() + b"\n")
    if verb.startswith("sleep"):
        time.sleep(60)
    print(*words)
    if verb == "raise":
        raise ValueError(*words)
    if verb == "exit":
        return int(words[0])
    return 0
