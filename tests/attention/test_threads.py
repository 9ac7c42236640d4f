"""Pieces of work on threads of one core each."""

import os
import sys
import threading

import pytest
import torch

from vidaccel.attention.threads import each


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def where(_: int) -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


def test_results_come_in_order_from_threads_of_one_core_each():
    with torch.no_grad():
        assert each(lambda x: x * x, range(50)) == [x * x for x in range(50)]
        places = each(where, range(50))
        assert {cores for _, cores in places} == {1} and threading.current_thread().name not in dict(places)
    assert torch.get_num_threads() == 2
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]  # nor do threads to come begin with one core


def test_a_new_number_of_threads_counts():
    with torch.no_grad():
        for count in (3, 2):
            torch.set_num_threads(count)
            waiting = threading.Barrier(count)  # as many pieces as threads, each of which waits for the others
            each(lambda _, waiting=waiting: waiting.wait(timeout=60), range(count))
        torch.set_num_threads(1)
        assert {name for name, _ in each(where, range(3))} == {threading.current_thread().name}


def test_small_pieces_are_worked_on_by_one_thread_of_one_core():
    with torch.no_grad():
        assert each(lambda x: x * x, range(50), small=True) == [x * x for x in range(50)]
        ((name, cores),) = set(each(where, range(50), small=True))
        assert cores == 1 and name != threading.current_thread().name
        torch.set_num_threads(1)
        assert {name for name, _ in each(where, range(3), small=True)} == {threading.current_thread().name}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_holds(mode):
    with mode():
        out = each(lambda x: torch.ones(3, requires_grad=False).add_(x), range(4))
        assert [t.is_inference() for t in out] == [mode is torch.inference_mode] * 4
        weight = torch.nn.Parameter(torch.ones(2))
        assert not any(x.requires_grad for x in each(lambda x: weight * x, range(4)))


@pytest.mark.parametrize("mode", [torch.enable_grad, lambda: torch.autocast("cpu"), lambda: torch.device("meta")])
def test_what_belongs_to_the_thread_stays_on_it(mode):
    with torch.no_grad(), mode():
        assert {name for name, _ in each(where, range(4))} == {threading.current_thread().name}


def test_an_error_comes_out():
    def work(x: int) -> int:
        if x == 3:
            raise ValueError("of 3")
        return x

    with torch.no_grad(), pytest.raises(ValueError, match="of 3"):
        each(work, range(6))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads():
    with torch.no_grad():
        each(where, range(4))
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            os._exit(0 if each(lambda x: x + 1, range(4)) == [1, 2, 3, 4] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_threads_of_unlike_numbers_leave_each_others_threads_alone():
    def turns(count, errors):
        torch.set_num_threads(count)
        try:
            with torch.no_grad():
                for _ in range(200):
                    each(lambda x: x, range(4))
        except RuntimeError as error:
            errors.append(error)

    errors, before = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        callers = [threading.Thread(target=turns, args=(count, errors)) for count in (2, 3, 2, 3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
