"""Advice on threads in a user's own ComfyUI."""

import logging

import pytest


@pytest.mark.parametrize(("said", "lines"), [(None, 1), ("ACTIVE", 0)])
def test_advice_where_threads_may_spin(host, monkeypatch, caplog, said, lines):
    """The tests run on the CPU."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    with caplog.at_level(logging.INFO):
        host.pack("nodes.adapters.threads").advise()
    assert caplog.text.count("OMP_WAIT_POLICY=PASSIVE") == lines
