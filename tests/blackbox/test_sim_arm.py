"""The robot that the node is tried on: its own rules, and that its limits keep it off the table."""

from __future__ import annotations

import math
import os

os.environ.setdefault("MUJOCO_GL", "osmesa")

import mujoco
import numpy as np
import pytest
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from harness import ROOT
from robot import JOINTS, PARAMETERS, limits
from trajectory import Sample, Trajectory, brakes, refusal

MODEL = ROOT / "config/robots/sim_arm.xml"


def message(*points: tuple[float, list[float], list[float]], joints: tuple[str, ...] = ("a", "b")) -> JointTrajectory:
    msg = JointTrajectory(joint_names=list(joints))
    for time, position, velocity in points:
        point = JointTrajectoryPoint(positions=position, velocities=velocity)
        point.time_from_start.nanosec = round(time * 1e9)
        msg.points.append(point)
    return msg


def stamped(msg: JointTrajectory, sec: int) -> JointTrajectory:
    msg.header.stamp.sec = sec
    return msg


STOP = [0.0, 0.0]
ACCEPTED = message((0.1, [1.0, 2.0], [0.5, 0.5]), (0.2, [1.1, 2.1], STOP))


@pytest.mark.parametrize(
    ("msg", "reason"),
    [
        (ACCEPTED, None),
        (message((0.1, [1.0, 2.0], []), (0.2, [1.1, 2.1], [])), None),
        (message(), "no points"),
        (message((0.1, STOP, STOP), joints=()), "no joint names"),
        (message((0.1, STOP, STOP), joints=("a", "c")), "unknown joint c"),
        (message((0.1, [0.0], [0.0]), joints=("a",)), "joint b is missing"),
        (message((0.1, STOP, STOP), joints=("a", "a")), "a joint is named twice"),
        (message((0.1, [0.0], STOP)), "point 0 has 1 positions for 2 joints"),
        (message((0.1, STOP, [0.0])), "point 0 has 1 velocities for 2 joints"),
        (message((0.1, [0.0, math.nan], STOP)), "point 0 is not finite"),
        (message((0.1, STOP, [math.inf, 0.0])), "point 0 is not finite"),
        (message((0.2, STOP, STOP), (0.2, STOP, STOP)), "time_from_start does not increase strictly"),
        (message((0.1, STOP, [0.0, 0.1])), "velocity at the last point is not zero"),
        (stamped(message((0.1, STOP, STOP)), 1000), None),
        (stamped(message((0.1, STOP, STOP)), 999), "already over by 0.900 s"),
    ],
)
def test_controller_rules(msg: JointTrajectory, reason: str | None):
    assert refusal(msg, ["a", "b"], now=1000.0) == reason


def test_segments_are_cubic_and_joints_go_by_name():
    # x(t) = t³ is its own Hermite cubic.
    def cube(t: float) -> tuple[list[float], list[float]]:
        return [-(t**3), t**3], [-3 * t**2, 3 * t**2]

    msg = message((0.5, *cube(0.5)), (1.0, *cube(1.0)), joints=("b", "a"))
    trajectory = Trajectory.from_message(msg, ["a", "b"], start=10.0)
    sample = trajectory.sample(10.7)
    assert np.allclose(sample.position, [0.7**3, -(0.7**3)])
    assert np.allclose(sample.velocity, [3 * 0.7**2, -3 * 0.7**2])


def test_a_trajectory_is_entered_from_the_desired_state_and_held_at_its_end():
    trajectory = Trajectory.from_message(ACCEPTED, ["a", "b"], start=0.0).after(0.0, Sample(np.zeros(2), np.ones(2)))
    assert np.allclose(trajectory.sample(0.0).position, 0.0)
    assert np.allclose(trajectory.sample(0.0).velocity, 1.0)
    assert np.allclose(trajectory.sample(0.1).position, [1.0, 2.0])
    assert np.allclose(trajectory.sample(5.0).position, [1.1, 2.1])
    assert np.allclose(trajectory.sample(5.0).velocity, 0.0)


def test_what_a_stop_looks_like():
    assert brakes(Trajectory.from_message(ACCEPTED, ["a", "b"], 0.0))
    faster = message((0.1, [1.0, 2.0], [0.5, 0.5]), (0.2, [1.1, 2.1], [0.6, 0.4]), (0.3, [1.2, 2.2], STOP))
    assert not brakes(Trajectory.from_message(faster, ["a", "b"], 0.0))


def test_limits_fit_the_robot_and_the_stop_time():
    model = mujoco.MjModel.from_xml_path(str(MODEL))
    ranges = np.array([model.joint(name).range for name in JOINTS])
    assert np.all(limits("min_position") >= ranges[:, 0])
    assert np.all(limits("max_position") <= ranges[:, 1])
    assert np.all(limits("max_velocity") / limits("max_acceleration") <= PARAMETERS["stop_time_ms"] / 1000)


def test_within_its_limits_the_arm_touches_nothing():
    model = mujoco.MjModel.from_xml_path(str(MODEL))
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, model.key("home").id)
    arm = {i for i in range(model.ngeom) if model.body_rootid[model.geom_bodyid[i]] == model.body("pedestal").id}
    arm -= {i for i in arm if model.geom_bodyid[i] == model.body("pedestal").id}
    low, high = limits("min_position"), limits("max_position")
    random = np.random.default_rng(0)
    for sample in range(4000):
        # Every other pose is a corner of the box.
        pose = random.uniform(low, high) if sample % 2 else np.where(random.random(len(JOINTS)) < 0.5, low, high)
        for name, value in [*zip(JOINTS, pose), ("gripper_mirror", pose[-1])]:
            data.joint(name).qpos[0] = value
        mujoco.mj_forward(model, data)
        touched = [pair for pair in data.contact.geom if arm & {int(pair[0]), int(pair[1])}]
        assert not touched, f"contact at {pose}"
