"""A chat template tried in a process of its own before it runs in this one.

A template is a program by the author of the model directory. Jinja's sandbox keeps it from files and attributes, and
not from loops without end or from text of gigabytes.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from mmtrain.encoding.messages import Render, Tools
from mmtrain.errors import UserError
from mmtrain.records.chat import Messages

SECONDS = 5.0
MEMORY = 512 * 2**20
"""Bytes that the trial may take on top of what this process has."""
MAX_CHARACTERS = 1_000_000
"""Of the template, and of what it makes of a short conversation."""

_STATM = Path("/proc/self/statm")
"""Its first number is the size of this process in pages, see proc_pid_statm(5)."""
_OVER_MEMORY, _OVER_OUTPUT = 3, 4
_REASONS = {
    _OVER_MEMORY: f"takes over {MEMORY // 2**20} MiB of memory",
    _OVER_OUTPUT: f"makes more than {MAX_CHARACTERS:,} characters",
}


def try_template(template: str | None, render: Render) -> None:
    """Raise UserError where a few short conversations take the template longer or more memory than any can need.

    `render` makes text of messages by `template`; what it raises is no fault here. Without Linux's /proc only time and
    output are limited.
    """
    if template is not None and len(template) > MAX_CHARACTERS:
        raise UserError(f"the chat template has {len(template):,} characters, over {MAX_CHARACTERS:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking next to threads: the child only renders
        child = os.fork()
    if not child:
        code = 1
        try:
            code = _render_all(render)
        finally:
            os._exit(code)  # it must not continue as a second copy of the program
    reason = _outcome(child)
    if reason is not None:
        raise UserError(f"the chat template is refused: for a short conversation it {reason}")


def _outcome(child: int) -> str | None:
    """Why the trial failed; None where it did not. The child is gone afterwards."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return _REASONS.get(code, f"ended the process that tried it (exit code {code})") if code else None
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"takes longer than {SECONDS:g} seconds"


def _render_all(render: Render) -> int:
    """The exit code of the process that tries."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)  # a handler of this program would act as if it were its main process
    _limit_memory()
    for messages, tools in [*((messages, None) for messages in _conversations()), *_with_tools()]:
        for begun in (False, True):
            try:
                if len(render(messages, begun, tools)) > MAX_CHARACTERS:
                    return _OVER_OUTPUT
            except MemoryError:
                return _OVER_MEMORY
            except Exception:  # a template may refuse a conversation, in any way: that is reported where it is used
                continue
    return 0


def _limit_memory() -> None:
    if _STATM.exists():
        limit = int(_STATM.read_text().split()[0]) * resource.getpagesize() + MEMORY
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        own = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *own]), hard))


def _with_tools() -> Iterator[tuple[Messages, Tools | None]]:
    """A tool, a call of it and a result, in the forms in which templates take them, and the reasoning of a reply."""
    tool = {"type": "function", "function": {"name": "f", "description": "probe", "parameters": {"type": "object"}}}
    for content in ("probe", [{"type": "text", "text": "probe"}]):
        asked, nothing = {"role": "user", "content": content}, content[:0]
        yield [asked, {"role": "assistant", "content": content, "reasoning_content": "probe"}], [tool]
        for arguments in ({"key": "probe"}, '{"key": "probe"}'):
            call = {"type": "function", "id": "callofqZ1", "function": {"name": "f", "arguments": arguments}}
            called = {"role": "assistant", "content": nothing, "tool_calls": [call]}
            result = {"role": "tool", "name": "f", "tool_call_id": "callofqZ1", "content": content}
            yield [asked, called, result, {"role": "assistant", "content": content}], [tool]
            yield [asked, called, result], None


def _conversations() -> list[Messages]:
    """Every role, content as text and as parts, an image, and several turns."""
    found: list[Messages] = []
    for content in ("probe", [{"type": "text", "text": "probe"}], [{"type": "image"}, {"type": "text", "text": "a"}]):
        text = content if isinstance(content, str) else content[-1:]
        system = {"role": "system", "content": text}
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        found += [turns[:1], turns, [system, *turns[:1]], [system, *turns * 3]]
    return found
