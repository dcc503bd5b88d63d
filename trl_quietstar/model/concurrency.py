"""What calls in several threads share on one model.

A server calls `generate` of one model from many threads. Such a call changes two things on the model itself: its mode, and what
its LM head does. The first of the calls that overlap sets them, and the last puts them back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


LOCK = threading.RLock()  # around what is done once for a model, such as the start-up check, and the entries below


@dataclass
class _Shared:
    """How many calls under way use a change of the model, and what was there before it."""

    users: int
    before: Any


_modes: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()
_heads: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()
_thread = threading.local()  # `taken`: from a head to the list that this thread's forwards fill


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """
    A model in `eval()` mode: no dropout, and a cache even where layers are checkpointed.

    Args:
        model (`nn.Module`):
            The model. When the last of the calls that overlap ends, each of its modules is in the mode that it was in.
    """
    with LOCK:
        shared = _modes.setdefault(model, _Shared(0, [x for x in model.modules() if x.training]))
        shared.users += 1
        if shared.users == 1:
            model.eval()
    try:
        yield
    finally:
        with LOCK:
            shared.users -= 1
            if shared.users == 0:
                del _modes[model]
                for module in shared.before:
                    module.training = True


@contextmanager
def without_head(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """
    In this thread, the LM head hands on what it reads; in others it goes on as it is.

    Args:
        head (`nn.Module`):
            The LM head.

    Yields:
        `list`: what it read, once for each forward.
    """
    taken: list[torch.Tensor] = []
    by_head = vars(_thread).setdefault("taken", {})
    by_head[head] = taken
    with LOCK:
        if head not in _heads:
            _heads[head] = _Shared(0, vars(head).get("forward"))  # a hook's, if any
            head.forward = _tapped(head, head.forward)
        _heads[head].users += 1
    try:
        yield taken
    finally:
        del by_head[head]
        with LOCK:
            shared = _heads[head]
            shared.users -= 1
            if shared.users == 0:
                del _heads[head]
                if shared.before is None:
                    del head.forward
                else:
                    head.forward = shared.before


def _tapped(head: nn.Module, plain):
    """The head's forward, but for the threads that want what it reads."""

    def forward(hidden: torch.Tensor, *args, **kwargs):
        taken = vars(_thread).get("taken", {}).get(head)
        if taken is None:
            return plain(hidden, *args, **kwargs)
        taken.append(hidden)
        return hidden

    return forward
