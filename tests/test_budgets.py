"""How much a step may take: of host memory, and of a device that others use too."""

import pytest
import torch

from ckpt_trainer import budgets, memory
from ckpt_trainer.budgets import budget_bytes

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(budgets, "available_bytes", lambda: 1000)
    monkeypatch.setattr(budgets, "local_ranks", lambda: 4)


@pytest.fixture
def device(monkeypatch):
    """1000 bytes, of which 300 are free, 500 are with this process's allocator and 200 with others."""
    seen = {"free": 300}
    monkeypatch.setattr(memory, "device_bytes", lambda device: (seen["free"], 1000))
    monkeypatch.setattr(memory, "reserved_bytes", lambda device: 500)
    return seen


def test_a_share_of_host_memory_is_of_what_is_left_for_this_process(host):
    assert budget_bytes(0.5, CPU) == 125
    assert budget_bytes(1.0, CPU) == 250


def test_what_this_process_has_already_counts_as_left(host):
    assert budget_bytes(0.5, CPU, own_bytes=100) == 175


def test_bytes_of_host_memory_are_taken_as_they_are(host):
    assert budget_bytes(10**6, CPU, own_bytes=100) == 10**6


def test_a_share_of_a_device_is_of_all_of_it_less_what_others_have(device):
    assert budget_bytes(0.9, CPU) == 900 - 200
    assert budget_bytes(1.0, CPU) == 800
    device["free"] = 500
    assert budget_bytes(0.9, CPU) == 900


def test_what_this_process_has_of_a_device_is_in_its_allocator_already(device):
    assert budget_bytes(0.9, CPU, own_bytes=100) == 700


def test_bytes_of_a_device_are_at_most_what_is_left(device):
    assert budget_bytes(700, CPU) == 700
    assert budget_bytes(900, CPU) == 800


def test_host_memory_is_asked_for_once_and_a_device_each_time(host, device, monkeypatch):
    asked = budgets.budget_of(0.9, CPU)
    assert asked() == 700
    device["free"] = 400
    assert asked() == 800
    monkeypatch.setattr(memory, "device_bytes", lambda device: None)
    asked = budgets.budget_of(0.5, CPU)
    monkeypatch.setattr(budgets, "available_bytes", lambda: 1)
    assert asked() == 125
