"""A few of the sequences of commands and faults that tools/states.py draws for half an hour."""

import sys
from collections import Counter

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and reads /proc", allow_module_level=True)

from tools.states import Fault, RunMachine, World, draw, is_described

FEATURES = "feature-extractor"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), (FEATURES,))


@pytest.fixture
def machine(world: World) -> RunMachine:
    class Machine(RunMachine):
        pass

    Machine.world = world
    return Machine()


def test_killed_moved_and_resumed_a_run_ends_as_if_undisturbed(machine: RunMachine) -> None:
    machine.finetune(0, Fault("kill", 0.7))
    machine.move_data()
    machine.move_run(0, to=1)
    machine.resume(0, Fault("full disk", 0.05))
    machine.evaluate(0)
    machine.teardown()


@pytest.mark.slow
def test_sequences_of_commands_and_faults(world: World) -> None:
    counts: Counter[str] = Counter()
    draw(world, 5, 8, 1, lambda what: counts.update([what]))
    assert counts["sequences"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("at", [n / 20 for n in range(1, 21)])
def test_killed_at_each_twentieth_of_its_file_operations(machine: RunMachine, at: float) -> None:
    machine.finetune(0, Fault("kill", at))
    machine.teardown()


def test_what_must_hold_is_looked_at(machine: RunMachine) -> None:
    """So that the model does not agree with everything."""
    machine.finetune(0, None)
    (path,) = machine.finished
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-4:] = b"\0\0\0\x42"  # 32.0
    (path / "model.safetensors").write_bytes(weights)
    from cnnft.runs.run import Run

    assert not is_described(Run(path), machine.world.data)
    with pytest.raises(AssertionError, match="differ from the undisturbed run"):
        machine._require_finished(path)
    (machine.world.folder / "tmp" / "x").touch()
    with pytest.raises(AssertionError, match="left in tmp"):
        machine._require_clean()
