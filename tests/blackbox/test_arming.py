"""Nothing moves without ~/enable; ~/stop and the end of the process brake."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest


def test_nothing_is_published_before_enable(start_node, robot):
    node = start_node()
    node.wait_for_mode("active")
    ticks = int(node.status["ticks"])
    node.wait(lambda: int(node.status["ticks"]) > ticks + 100, "two seconds of control ticks")
    assert robot.count() == 0
    assert node.status["published"] == "0"

    node.run_armed(trajectories=50)
    assert any(np.abs(t.velocities).max() > 1e-3 for t in robot.trajectories()), "the policy did not move the arm"


def test_interrupt_ends_with_a_stop(start_node, robot):
    node = start_node()
    node.run_armed()
    node.process.interrupt(signal.SIGINT)
    assert node.process.wait(30.0) == 0, node.process.tail()
    robot.wait_for_silence()
    robot.check_last_is_a_stop()


@pytest.fixture
def no_nohup():
    """Under nohup the tests ignore SIGHUP, and so would what they start; what they handle starts with its default."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminate_or_a_lost_connection_ends_with_a_stop(start_node, robot, number):
    node = start_node()
    node.run_armed()
    node.process.interrupt(number)
    assert node.process.wait(30.0) == 0, node.process.tail()
    robot.wait_for_silence()
    robot.check_last_is_a_stop()


def test_a_second_interrupt_at_once_does_not_cut_the_stop_short(start_node, robot):
    """As `ros2 launch` sends them: one to all of them, and one to its child."""
    node = start_node()
    node.run_armed()
    node.process.interrupt()
    said = time.monotonic() + 30.0
    while "SIGINT: stopping" not in node.process.text():
        assert time.monotonic() < said, node.process.tail()
        time.sleep(0.002)
    node.process.interrupt()
    assert node.process.wait(30.0) == 0, node.process.tail()
    robot.wait_for_silence()
    robot.check_last_is_a_stop()


def test_a_second_interrupt_later_ends_at_once(start_node, tmp_path):
    """A pipe that nobody reads holds up the end of the process for as long as it takes."""
    pipe = tmp_path / "trace"
    os.mkfifo(pipe)
    node = start_node("--", "--trace", str(pipe), "--ros-args")
    node.wait_for_mode("active")
    node.process.interrupt()
    assert node.process.wait(2.0) is None, node.process.tail()
    node.expected_exit = 128 + signal.SIGINT
    node.process.interrupt()
    assert node.process.wait(5.0) == node.expected_exit, node.process.tail()


def test_stop_latches_until_reset(start_node, robot):
    node = start_node()
    node.run_armed()
    answer = node.stop()
    assert answer.success, answer.message
    node.wait_for_mode("stopped")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()

    refused = node.enable()
    assert not refused.success
    assert refused.message == "stopped: call ~/reset first"
    before = robot.count()

    answer = node.reset()
    assert answer.success, answer.message
    node.wait_for_mode("active")
    ticks = int(node.status["ticks"])
    node.wait(lambda: int(node.status["ticks"]) > ticks + 50, "a second of control ticks")
    assert robot.count() == before, "reset armed the node"

    node.run_armed()


def test_disable_brakes(start_node, robot):
    node = start_node()
    node.run_armed()
    answer = node.enable(False)
    assert answer.success, answer.message
    node.wait_for_text("disarmed by ~/enable")
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
