"""Processes that stop, die and come back, and strangers on the command topic."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from trajectory_msgs.msg import JointTrajectory

from harness import Process
from robot import CAMERAS, PARAMETERS


@pytest.fixture
def robot_process(robot, tmp_path) -> Iterator[Process]:
    """The robot in a process of its own; the one in this process only listens."""
    robot.faults.silent_cameras = set(CAMERAS)
    robot.faults.silent_joints = True
    script = Path(__file__).resolve().parent / "robot.py"
    process = Process("robot", [sys.executable, str(script)], tmp_path / "robot.log")
    yield process
    process.interrupt(signal.SIGCONT)
    assert process.end() == 0, process.tail()


def expect_unarmed(node, robot, ticks: int = 50) -> None:
    """So many ticks later it is still active and has sent nothing."""
    before, seen = robot.count(), int(node.status["ticks"])
    node.wait(lambda: int(node.status["ticks"]) > seen + ticks, f"{ticks} control ticks")
    assert node.status["mode"] == "active"
    assert robot.count() == before, "it armed itself"


def test_robot_process_stopped_for_a_second(start_node, robot, robot_process):
    node = start_node()
    node.run_armed()
    robot_process.interrupt(signal.SIGSTOP)
    node.wait_for_text("position of joint", "ms old (limit 200 ms)")
    node.wait_for_mode("active")
    time.sleep(1.0)
    robot.check_last_is_a_stop()
    refused = node.enable()
    assert not refused.success
    assert "ms old" in refused.message, refused.message

    robot_process.interrupt(signal.SIGCONT)
    node.wait(lambda: node.enable().success, "arming once data is fresh")
    robot.wait_for(robot.count() + 30)


def test_robot_process_back_does_not_arm(start_node, robot, robot_process):
    node = start_node()
    node.run_armed()
    robot_process.interrupt(signal.SIGSTOP)
    node.wait_for_mode("active")
    robot_process.interrupt(signal.SIGCONT)
    expect_unarmed(node, robot)


def test_node_killed_while_armed_and_respawned(start_node, robot):
    node = start_node()
    node.run_armed()
    node.kill()
    robot.wait_for_silence()
    last = robot.trajectories()[-1]
    assert np.all(last.velocities[-1] == 0.0), "the controller is left with a trajectory that ends in motion"
    longest = (PARAMETERS["output_window_ms"] + PARAMETERS["stop_time_ms"]) * 1e-3 + 0.04
    assert last.end - last.times[0] <= longest, last.end - last.times[0]
    assert np.all(last.sample(last.end).velocity == 0.0)

    again = start_node()
    again.statuses.clear()
    again.wait_for_mode("active")
    assert again.status["published"] == "0"
    expect_unarmed(again, robot, ticks=100)


def test_second_publisher_on_the_command_topic(start_node, robot):
    node = start_node()
    node.run_armed()
    other = robot.node.create_publisher(JointTrajectory, "/pi0_mps/arm/joint_trajectory", 1)
    says = "somebody else publishes on the topic of output 'arm'"
    node.wait_for_text(says)
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    refused = node.enable()
    assert not refused.success
    assert says in refused.message, refused.message

    robot.node.destroy_publisher(other)
    node.wait(lambda: node.enable().success, "arming alone on the topic")
    robot.wait_for(robot.count() + 30)


def test_controller_gone_while_moving(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.stop_listening()
    says = "nobody listens to output 'arm'"
    node.wait_for_text(says)
    node.wait_for_mode("active")
    refused = node.enable()
    assert not refused.success
    assert says in refused.message, refused.message
