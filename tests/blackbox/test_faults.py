"""Processes that stop, die and come back, and strangers on the command topic."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from harness import MOVING_MODES, Process, count
from robot import CAMERAS, HOME, PARAMETERS, PERIOD_S, Faults
from trajectory import seconds


# Ages that a busy machine does not reach by itself.
PATIENT = {"cameras.base.max_age_ms": "4000.0", "cameras.wrist.max_age_ms": "4000.0", "max_joint_state_age_ms": "3000.0"}
# A robot that stands still lets its joint states and its pictures age together, and leaves its command: here the joint
# states are what is noticed first, whatever the arm is doing at that moment.
JOINTS_FIRST = {
    **PATIENT, "cameras.base.max_age_ms": "10000.0", "cameras.wrist.max_age_ms": "10000.0", "max_tracking_error": "10.0",
}


@pytest.fixture
def start_robot(robot, tmp_path) -> Iterator[Callable[[], Process]]:
    """Starts the robot in a process of its own; the one in this process only listens. Asked for before start_node, it outlives
    the node, which still brakes a robot that is there."""
    robot.faults = Faults(silent_cameras=set(CAMERAS), silent_joints=True)
    started: list[Process] = []

    def start() -> Process:
        command = [sys.executable, str(Path(__file__).resolve().parent / "robot.py")]
        started.append(Process("robot", command, tmp_path / f"robot_{len(started)}.log"))
        return started[-1]

    yield start
    for process in started:
        process.interrupt(signal.SIGCONT)
    # All are ended before one is judged: what is left running would be heard by the tests that follow.
    codes = [process.end() for process in started]
    for process, code in zip(started, codes):
        assert code in (0, -signal.SIGKILL), f"the robot ended with {code}:\n{process.tail()}"


def expect_unarmed(node, robot, ticks: int = 50) -> None:
    """So many ticks later it is still active and has sent nothing. What it sent before may still be arriving."""
    begin, sent, seen = robot.now(), count(node.status, "published"), count(node.status, "ticks")
    node.wait(lambda: count(node.status, "ticks") > seen + ticks, f"{ticks} control ticks")
    assert node.status["mode"] == "active"
    assert count(node.status, "published") <= sent, "it armed itself"
    dated = [seconds(m.header.stamp) for m in list(robot.received)]
    assert all(stamp <= begin for stamp in dated), f"it armed itself: {dated[-1]} is after {begin}"


def wait_until_there(node, robot) -> None:
    """Until the robot has taken up what it missed and says that it is where the last command led."""
    heard: list[JointState] = []
    listener = robot.node.create_subscription(JointState, "joint_states", heard.append, 10)
    goal = robot.trajectories()[-1].positions[-1]
    node.wait(lambda: heard and np.allclose(heard[-1].position, goal, atol=1e-6), "the robot where the last command led")
    robot.destroy(listener)


def test_robot_process_stopped_and_continued(start_robot, start_node, robot):
    process = start_robot()
    node = start_node(**JOINTS_FIRST)
    node.run_armed()
    process.interrupt(signal.SIGSTOP)
    node.wait_for_text("position of joint", "ms old (limit 3000 ms)")
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    refused = node.enable()
    assert not refused.success
    assert "ms old" in refused.message, refused.message

    process.interrupt(signal.SIGCONT)
    expect_unarmed(node, robot)
    wait_until_there(node, robot)
    node.wait(lambda: node.enable().success, "arming once data is fresh")
    robot.wait_for(robot.count() + 30)


def test_robot_process_back_does_not_arm(start_robot, start_node, robot):
    process = start_robot()
    node = start_node()
    node.run_armed()
    process.interrupt(signal.SIGSTOP)
    node.wait_for_mode("active")
    process.interrupt(signal.SIGCONT)
    expect_unarmed(node, robot)


def test_robot_process_killed_and_respawned_elsewhere(start_robot, start_node, robot):
    first = start_robot()
    node = start_node(**JOINTS_FIRST)
    node.run_armed(100)
    first.interrupt(signal.SIGKILL)
    node.wait_for_text("position of joint", "ms old (limit 3000 ms)")
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    robot.check_everything_received()
    # The new one begins at its home pose, wherever the old one was left: what comes now is another motion.
    robot.received.clear()
    start_robot()
    node.diagnostics.clear()
    node.wait_for_diagnostic("inputs", b"\x00", "all inputs fresh")
    expect_unarmed(node, robot)
    node.wait(lambda: node.enable().success, "arming once data is fresh")
    robot.wait_for(30)
    assert np.allclose(robot.trajectories()[0].positions[0], HOME, atol=0.01)


def test_node_stopped_for_a_second(start_node, robot):
    """As a debugger, a laptop's lid or a hypervisor does: the controller brakes at the end of what it has."""
    node = start_node()
    node.run_armed(100)
    skipped, ticks = count(node.status, "skipped"), count(node.status, "ticks")
    node.process.interrupt(signal.SIGSTOP)
    time.sleep(1.5)
    last = robot.trajectories()[-1]
    assert np.all(last.velocities[-1] == 0.0) and last.end < robot.now(), "the robot is at rest by now"
    node.process.interrupt(signal.SIGCONT)
    # Whatever it hears first, its own old joint state or a fresh one, what it sends goes on from where the robot is:
    # the robot checks that. It has not caught up, and says how much it missed.
    node.wait(lambda: count(node.status, "ticks") > ticks + 100, "control ticks")
    assert count(node.status, "skipped") - skipped > 50, node.status
    node.wait_for_mode("active", *MOVING_MODES)
    if node.status["mode"] == "active":
        expect_unarmed(node, robot)
        node.wait(lambda: node.enable().success, "arming again")
    robot.wait_for(robot.count() + 30)


# What is wrong, and what /diagnostics must show at which level while the robot goes on.
GOES_ON = {
    "a frozen camera": (Faults(frozen_cameras={"base"}), b"\x01", "camera 'base'", "frames are identical: frozen?"),
    "a camera without stamps": (Faults(zero_stamps={"wrist"}), b"\x01", "camera 'wrist'", "judged by arrival"),
    "a camera's clock 3 s ahead": (Faults(stamp_shift={"base": 3.0}), b"\x01", "camera 'base'", "judged by arrival"),
    "joint states without stamps": (Faults(zero_stamps={"joint_states"}), b"\x01", "judged by arrival"),
    "slow joint states": (Faults(joints_every=4), b"\x00", "all inputs fresh"),
    "late pictures": (Faults(stamp_shift={"base": -0.2, "wrist": -0.2}), b"\x00", "all inputs fresh"),
}
# What is wrong, and what the status must say when the robot has stopped for it.
STOPS = {
    "a camera's clock 6 s behind": (Faults(stamp_shift={"base": -6.0}), "camera 'base'", "ms old (limit 4000 ms)"),
    "late joint states": (Faults(stamp_shift={"joint_states": -5.0}), "position of joint", "ms old (limit 3000 ms)"),
    "a joint elsewhere": (Faults(joint_error=("elbow", -0.5)), "joint 'elbow' was told", "look for a hardware stop"),
}


def shown(node, key: str) -> list[float]:
    """Of every diagnostic of the inputs, one a second: a number, or the age that the text of a camera has. The first may be
    from before."""
    values = [v.value for name in list(node.diagnostics) if name.endswith("inputs")
              for status in list(node.diagnostics[name]) for v in status.values if v.key == key]
    found = [re.search(r"([\d.]+)( ms old|$)", value) for value in values]
    return [float(number[1]) for number in found if number][1:]


def joint_states_are_slow(node) -> bool:
    """By their number, at most half a healthy robot's: single ones are old on a busy machine, too."""
    counts = shown(node, "joint_states.messages")
    return len(counts) > 2 and counts[-1] - counts[0] < 0.5 / PERIOD_S * (len(counts) - 1)


def pictures_are_late(node) -> bool:
    ages = shown(node, "camera.base")
    return len(ages) > 2 and min(ages) >= 200.0


# What shows that the node has met a fault which is no problem to it.
MET = {"slow joint states": joint_states_are_slow, "late pictures": pictures_are_late}


def test_faults_it_goes_on_with(start_node, robot):
    node = start_node(**PATIENT)
    node.run_armed()
    for what, (faults, level, *says) in GOES_ON.items():
        node.statuses.clear()
        node.diagnostics.clear()
        robot.faults = faults
        node.wait_for_diagnostic("inputs", level, *says)
        if what in MET:
            node.wait(lambda: MET[what](node), what)
        before = robot.count()
        robot.wait_for(before + 30)
        robot.faults = Faults()
        modes = {s["mode"] for s in node.statuses}
        assert modes <= set(MOVING_MODES), f"{what}: {modes}"


def test_faults_it_stops_for(start_node, robot):
    node = start_node(**PATIENT)
    for faults, *says in STOPS.values():
        node.run_armed()
        node.statuses.clear()
        robot.check_everything_received()
        robot.faults = faults
        node.wait_for_text(*says)
        node.wait_for_mode("active")
        robot.wait_for_silence(quiet=0.3)
        robot.check_last_is_a_stop()
        if faults.joint_error:
            # It is held where it is measured, not where its last command led: no motion to check for jumps.
            assert not robot.trajectories()[-1].velocities.any()
            robot.received.clear()
        robot.faults = Faults()
        expect_unarmed(node, robot, ticks=20)


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
    says = "somebody else publishes on /pi0_mps/arm/joint_trajectory, the topic of output 'arm': stop /ideal_robot"
    node.wait_for_text(says)
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    refused = node.enable()
    assert not refused.success
    assert says in refused.message, refused.message

    robot.destroy(other)
    node.wait(lambda: node.enable().success, "arming alone on the topic")
    robot.wait_for(robot.count() + 30)


def test_controller_gone_while_moving(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.stop_listening()
    says = "nobody listens to /pi0_mps/arm/joint_trajectory, the topic of output 'arm': activate its controller"
    node.wait_for_text(says)
    node.wait_for_mode("active")
    refused = node.enable()
    assert not refused.success
    assert says in refused.message, refused.message
