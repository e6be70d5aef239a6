"""What ros2_control's joint_trajectory_controller does with a JointTrajectory, as functions of values.

Used by the simulated robot and by the tests; times are seconds on whatever clock the caller uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # scripts/evaluate does without ROS
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

# The controller compares the last velocity with float epsilon.
AT_REST = float(np.finfo(np.float32).eps)


def seconds(stamp) -> float:
    """Seconds of a builtin_interfaces Time or Duration."""
    return stamp.sec + 1e-9 * stamp.nanosec


def refusal(msg: JointTrajectory, joints: list[str], now: float) -> str | None:
    """Why the controller refuses this message, or None. `now` is ROS time.

    The real controller does not look for NaN; this one does, because a NaN on this topic is the fault to be found.
    """
    if not msg.joint_names:
        return "no joint names"
    if unknown := [name for name in msg.joint_names if name not in joints]:
        return f"unknown joint {unknown[0]}"
    if len(set(msg.joint_names)) != len(msg.joint_names):
        return "a joint is named twice"
    if missing := [name for name in joints if name not in msg.joint_names]:
        return f"joint {missing[0]} is missing"
    if not msg.points:
        return "no points"
    for index, point in enumerate(msg.points):
        if reason := _point_refusal(point, index, len(joints)):
            return reason
    times = [seconds(point.time_from_start) for point in msg.points]
    if any(later <= earlier for earlier, later in zip(times, times[1:])):
        return "time_from_start does not increase strictly"
    if any(abs(v) > AT_REST for v in msg.points[-1].velocities):
        return "velocity at the last point is not zero"
    start = seconds(msg.header.stamp)
    if start != 0.0 and start + times[-1] < now:
        return f"already over by {now - start - times[-1]:.3f} s"
    return None


def _point_refusal(point: JointTrajectoryPoint, index: int, joints: int) -> str | None:
    if len(point.positions) != joints:
        return f"point {index} has {len(point.positions)} positions for {joints} joints"
    if len(point.velocities) not in (0, joints):
        return f"point {index} has {len(point.velocities)} velocities for {joints} joints"
    if not np.all(np.isfinite(point.positions)) or not np.all(np.isfinite(point.velocities)):
        return f"point {index} is not finite"
    return None


@dataclass
class Sample:
    """A desired state: radians (metres for the gripper) and per second."""

    position: np.ndarray
    velocity: np.ndarray


class Trajectory:
    """A trajectory under way: from the desired state at the moment of adoption to the first point, then point to point.

    Segments with velocities are cubic Hermite, without them linear; past the last point its position is held.
    """

    def __init__(self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray | None):
        self.times = times
        self.positions = positions
        self.velocities = velocities

    @classmethod
    def hold(cls, position: np.ndarray) -> Trajectory:
        """Standing still."""
        return cls(np.zeros(1), position[None, :].copy(), np.zeros((1, position.size)))

    @classmethod
    def from_message(cls, msg: JointTrajectory, joints: list[str], start: float) -> Trajectory:
        """The points of an accepted message in the order of `joints`; `start` is when time_from_start is zero."""
        order = [msg.joint_names.index(name) for name in joints]
        times = np.array([start + seconds(p.time_from_start) for p in msg.points])
        positions = np.array([p.positions for p in msg.points])[:, order]
        with_velocity = all(len(p.velocities) for p in msg.points)
        velocities = np.array([p.velocities for p in msg.points])[:, order] if with_velocity else None
        return cls(times, positions, velocities)

    def after(self, now: float, state: Sample) -> Trajectory:
        """The same trajectory entered at `now` from `state`, where that is before its first point."""
        if now >= self.times[0]:
            return self
        velocities = None if self.velocities is None else np.vstack([state.velocity, self.velocities])
        return Trajectory(np.insert(self.times, 0, now), np.vstack([state.position, self.positions]), velocities)

    @property
    def end(self) -> float:
        return float(self.times[-1])

    def sample(self, t: float) -> Sample:
        """The desired state at `t`."""
        if t >= self.times[-1] or t < self.times[0]:
            edge = -1 if t >= self.times[-1] else 0
            return Sample(self.positions[edge], np.zeros(self.positions.shape[1]))
        k = int(np.searchsorted(self.times, t, side="right")) - 1
        h = self.times[k + 1] - self.times[k]
        u = (t - self.times[k]) / h
        p0, p1 = self.positions[k], self.positions[k + 1]
        if self.velocities is None:
            return Sample(p0 + u * (p1 - p0), (p1 - p0) / h)
        m0, m1 = h * self.velocities[k], h * self.velocities[k + 1]
        # Hermite form with d = p1 - p0: p(u) = p0 + u m0 + u²(3d - 2m0 - m1) + u³(m0 + m1 - 2d).
        d = p1 - p0
        c2, c3 = 3 * d - 2 * m0 - m1, m0 + m1 - 2 * d
        return Sample(p0 + u * (m0 + u * (c2 + u * c3)), (m0 + u * (2 * c2 + 3 * u * c3)) / h)


class Jerk:
    """Root mean square jerk of a path over its joints, from samples `period` seconds apart; standing still does not count."""

    def __init__(self, period: float):
        self.period = period
        self._last: list[np.ndarray] = []
        self._squares, self._count = 0.0, 0

    def add(self, position: np.ndarray) -> None:
        self._last = [*self._last[-3:], position]
        if len(self._last) == 4:
            jerk = np.diff(self._last, n=3, axis=0) / self.period**3
            if jerk.any():
                self._squares += float(np.sum(jerk**2))
                self._count += jerk.size

    @property
    def rms(self) -> float:
        return (self._squares / self._count) ** 0.5 if self._count else 0.0


def brakes(trajectory: Trajectory, slack: float = 1e-3) -> bool:
    """Whether no joint speeds up from the first point on: what a stop looks like, and a hold."""
    if trajectory.velocities is None:
        return False
    speed = np.abs(trajectory.velocities)
    return bool(np.all(np.diff(speed, axis=0) <= slack))
