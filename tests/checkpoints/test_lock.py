"""One process at a time changes a folder."""

import threading

import pytest

from budwood.checkpoints import lock
from budwood.checkpoints.lock import acquire, alone
from budwood.errors import RunError


def test_a_lock_is_held_until_it_is_given_up(tmp_path):
    with alone(tmp_path), pytest.raises(BlockingIOError):
        acquire(tmp_path)
    with alone(tmp_path):
        pass


def test_who_waits_comes_next(tmp_path):
    order = []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with alone(tmp_path):
            inside.set()
            leave.wait()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    threading.Timer(0.1, leave.set).start()
    with alone(tmp_path):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_patience_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with alone(tmp_path), pytest.raises(RunError, match="another budwood process writes to"), alone(tmp_path):
        pass
