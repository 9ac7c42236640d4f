"""One thread at a time in a module, also where two begin at once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from vidaccel.pipelines.acceleration.one_thread import OneThread, others_call


class Guarded(torch.nn.Module):
    """Whose calls are told, and stay until another thread was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.threads, self.refused = OneThread(), threading.Event()
        self.register_forward_pre_hook(lambda module, args: self.threads.enter(module, "model", goes_on=False))

    def forward(self) -> bool:
        return self.refused.wait(timeout=0.2)


@pytest.fixture
def eager_switching():
    """Threads take turns as often as the interpreter can, so that they meet in the midst of a check."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_of_two_threads_that_begin_at_once_one_is_refused(eager_switching):
    for _ in range(100):
        module, gate, went = Guarded(), threading.Barrier(2), []

        def call(module=module, gate=gate, went=went) -> None:
            gate.wait()
            try:
                went.append(module())
            except RuntimeError:
                module.refused.set()

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert went == [True] and module.threads.refused == 1


def test_a_call_of_another_thread_is_seen_in_any_module():
    module, inside = torch.nn.Linear(1, 1), []
    other = torch.nn.Linear(1, 1)
    module.register_forward_hook(lambda *_: inside.extend([others_call(module), others_call(other)]))
    module(torch.ones(1))
    assert inside == [False, False]  # this thread is no other

    def elsewhere(*_) -> None:
        thread = threading.Thread(target=lambda: inside.extend([others_call(module), others_call(other)]))
        thread.start()
        thread.join()

    module.register_forward_hook(elsewhere)
    inside.clear()
    module(torch.ones(1))
    assert inside == [False, False, True, False]
