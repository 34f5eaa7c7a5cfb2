"""Runs train.py in forked children that may be told to die: `python tests/forks.py`, for runs.

Reads one request a line, {"argv", "cwd", "moment", "nth", "after"}, and answers {"code", "err",
"seconds"}: the exit code, -9 for a child that was killed. `moment` and `nth` say where the child
kills itself (see MOMENTS), `after` after how many seconds it is killed from outside.

A fork, so that a killed run costs 0.3 s and not 3 s, most of them spent on importing torch. Nothing
but imports happens before it, in one thread: a child starts as a fresh `python train.py` does.
"""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # half of a run's start; the first optimizer would import it in every child

import files
import generate as generate_py
import peft_format
import runs
import train

torch.set_num_threads(1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    """Ctrl-C; the program's own handler runs before the next line."""
    os.kill(os.getpid(), signal.SIGINT)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_call(owner, name, n, act, first=lambda *args: None, then=False):
    """At the nth call of owner.name: first(*its arguments) and act(), or act() once it is done."""
    original, count = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == n and not then:
            first(*args)
            act()
        result = original(*args, **kwargs)
        if count[0] == n and then:
            act()
        return result
    setattr(owner, name, counted)


def half_a_file(path, data):
    path = Path(path)
    path.with_name(path.name + ".tmp").write_bytes(data[:len(data) // 2])


def half_the_lines(run, name, rows):
    """The first half of what Run.append is about to write, cut in the middle of a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    run.files[name].write(text[:len(text) // 2])
    run.files[name].flush()


def in_a_write(n, act=die):
    """write_atomic is called by three names; all count."""
    at_call(files, "write_atomic", n, act, half_a_file)
    peft_format.write_atomic = files.write_atomic
    runs.write_atomic = files.write_atomic


MOMENTS = {
    "update": lambda n, act=die: at_call(train, "clip_grad_norm_", n, act),
    "last evaluation": lambda n, act=die: at_call(train, "evaluate", n, act),
    "reply": lambda n, act=die: at_call(generate_py.Engine, "decode", n, act),
    "lines": lambda n, act=die: at_call(runs.Run, "append", n, act, half_the_lines),
    "write": in_a_write,
    "rename": lambda n, act=die: at_call(os, "replace", n, act),
    "renamed": lambda n, act=die: at_call(os, "replace", n, act, then=True),
    # Ctrl-C and a full disk, at the same places
    "SIGINT in an update": lambda n: MOMENTS["update"](n, interrupt),
    "SIGINT in a reply": lambda n: MOMENTS["reply"](n, interrupt),
    "SIGINT in a write": lambda n: MOMENTS["renamed"](n, interrupt),
    "two SIGINTs": lambda n: MOMENTS["update"](n, lambda: (interrupt(), interrupt())),
    "disk full": lambda n: in_a_write(n, disk_full),
    "disk full at a line": lambda n: MOMENTS["lines"](n, disk_full),
    "disk full at a sync": lambda n: at_call(os, "fsync", n, disk_full),
}


def child(request, err):
    """Never returns."""
    os.chdir(request["cwd"])
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1  # as Python itself ends with a traceback
    try:
        if request.get("moment"):
            MOMENTS[request["moment"]](request["nth"])
        code = train.main(request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException as e:
        os.write(err, f"Traceback: {e!r}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request):
    with tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            child(request, err.fileno())
        after = request.get("after")
        while after is not None and time.perf_counter() - began < after:
            time.sleep(0.002)
        if after is not None:
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it yet: the id is still its own
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.perf_counter() - began
        err.seek(0)
        return {"code": code, "err": err.read().decode(), "seconds": seconds}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
    os._exit(0)  # at once: torch takes a second to go
