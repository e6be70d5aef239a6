"""A robot that follows its commands perfectly, with faults to be switched on."""

from __future__ import annotations

import array
import contextlib
import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
import rclpy
from builtin_interfaces.msg import Time as TimeMessage
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

from harness import ROOT  # noqa: E402
from trajectory import Trajectory, brakes, refusal, seconds  # noqa: E402

PARAMETERS = yaml.safe_load((ROOT / "config/robots/sim_arm.yaml").read_text())["/**"]["ros__parameters"]
JOINTS: list[str] = PARAMETERS["joint_names"]
CAMERAS: list[str] = PARAMETERS["camera_names"]
HOME = np.array([0.0, -0.1, 1.65, 1.1, 0.0, 0.0, 0.02])
PERIOD_S = 0.02
IMAGE_EVERY = 3  # periods
IMAGE_SIDE = 224  # pixels
# Bytes of a row, and rows of bytes for each row of pixels.
ENCODINGS = {
    "rgb8": (3, 1), "bgr8": (3, 1), "rgba8": (4, 1), "bgra8": (4, 1), "mono8": (1, 1),
    "yuv422": (2, 1), "uyvy": (2, 1), "yuv422_yuy2": (2, 1), "yuyv": (2, 1), "nv12": (1, 1.5), "nv21": (1, 1.5),
}


def limits(kind: str) -> np.ndarray:
    """A limit of every joint in the order of JOINTS; kind is `max_velocity` and the like."""
    return np.array([PARAMETERS[f"limits.{joint}.{kind}"] for joint in JOINTS])


def go_first() -> None:
    """The calling thread goes before the node's: a real robot does not wait for the node's processor."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)


@dataclass
class Faults:
    """What is wrong with the robot; the defaults are a healthy one."""

    silent_cameras: set[str] = field(default_factory=set)
    silent_joints: bool = False
    joint_names: list[str] | None = None
    nan_joint: str | None = None
    encodings: dict[str, str] = field(default_factory=dict)  # of a camera; rgb8 if it is not here
    cut_image_to: int | None = None  # bytes
    frozen_cameras: set[str] = field(default_factory=set)
    stamp_shift: dict[str, float] = field(default_factory=dict)  # seconds, of a camera or of "joint_states"
    zero_stamps: set[str] = field(default_factory=set)  # the same names
    joints_every: int = 1  # periods
    joint_error: tuple[str, float] | None = None  # rad


class IdealRobot:
    """Publishes images and joint states from a thread of its own; the pose is the newest trajectory, sampled."""

    def __init__(self) -> None:
        self.node: Node = rclpy.create_node("ideal_robot")
        self.faults = Faults()
        self.received: list[JointTrajectory] = []
        self.refused: list[str] = []
        self._trajectory = Trajectory.hold(HOME)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._images = {c: self.node.create_publisher(Image, f"camera/{c}/image_raw", newest) for c in CAMERAS}
        # Cameras here send these pictures, one after the other, instead of raw images.
        self.pictures: dict[str, list[bytes]] = {}
        self._compressed = {
            c: self.node.create_publisher(CompressedImage, f"camera/{c}/image_raw/compressed", newest) for c in CAMERAS
        }
        self._states = self.node.create_publisher(JointState, "joint_states", 10)
        self._commands = self.node.create_subscription(JointTrajectory, "/pi0_mps/arm/joint_trajectory", self._on_trajectory, 50)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._threads = [threading.Thread(target=self._spin), threading.Thread(target=self._publish)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop_listening(self) -> None:
        """The controller is gone: nobody is subscribed to the commands any more."""
        self.destroy(self._commands)

    def destroy(self, entity: Publisher | Subscription) -> None:
        """Ends it in the thread that spins: another would take it from under the wait set, and rclpy then raises there."""
        end = self.node.destroy_publisher if isinstance(entity, Publisher) else self.node.destroy_subscription
        gone = threading.Event()
        self._executor.create_task(end, entity).add_done_callback(lambda _: gone.set())
        assert gone.wait(10.0), f"{entity.topic_name} was not given up"

    def close(self) -> None:
        self._stop.set()
        self._executor.wake()
        for thread in self._threads:
            thread.join()
        self.node.destroy_node()

    def now(self) -> float:
        return self.node.get_clock().now().nanoseconds * 1e-9

    def _spin(self) -> None:
        go_first()
        while not self._stop.is_set():
            try:
                self._executor.spin_once(timeout_sec=0.1)
            except ExternalShutdownException:
                return

    def _on_trajectory(self, msg: JointTrajectory) -> None:
        # Not judged by arrival: on a busy machine a message may be late without any fault of the node.
        reason = refusal(msg, JOINTS, seconds(msg.header.stamp))
        with self._lock:
            self.received.append(msg)
            if reason:
                self.refused.append(reason)
            else:
                start = seconds(msg.header.stamp) or self.now()
                now = self.now()
                state = self._trajectory.sample(now)
                self._trajectory = Trajectory.from_message(msg, JOINTS, start).after(now, state)

    def _stamp(self, of: str) -> TimeMessage:
        if of in self.faults.zero_stamps:
            return TimeMessage()
        return (self.node.get_clock().now() + Duration(seconds=self.faults.stamp_shift.get(of, 0.0))).to_msg()

    def _publish(self) -> None:
        go_first()
        count = 0
        while not self._stop.wait(PERIOD_S):
            if not self.faults.silent_joints and count % self.faults.joints_every == 0:
                self._publish_state()
            if count % IMAGE_EVERY == 0:
                for camera in set(CAMERAS) - self.faults.silent_cameras:
                    if pictures := self.pictures.get(camera):
                        self._publish_picture(camera, pictures[count // IMAGE_EVERY % len(pictures)])
                    else:
                        self._publish_image(camera)
            count += 1

    def _publish_state(self) -> None:
        with self._lock:
            sample = self._trajectory.sample(self.now())
        msg = JointState(name=self.faults.joint_names or JOINTS)
        msg.header.stamp = self._stamp("joint_states")
        position = sample.position.tolist()
        if self.faults.joint_error:
            joint, error = self.faults.joint_error
            position[JOINTS.index(joint)] += error
        if self.faults.nan_joint:
            position[JOINTS.index(self.faults.nan_joint)] = math.nan
        msg.position, msg.velocity = position, sample.velocity.tolist()
        self._states.publish(msg)

    def _publish_picture(self, camera: str, data: bytes) -> None:
        msg = CompressedImage(format="jpeg", data=array.array("B", data))
        msg.header.stamp = self._stamp(camera)
        self._compressed[camera].publish(msg)

    def _publish_image(self, camera: str) -> None:
        encoding = self.faults.encodings.get(camera, "rgb8")
        bytes_per_pixel, rows = ENCODINGS.get(encoding, (3, 1))
        step = bytes_per_pixel * IMAGE_SIDE
        msg = Image(height=IMAGE_SIDE, width=IMAGE_SIDE, step=step, encoding=encoding)
        msg.header.stamp = self._stamp(camera)
        # Never the same bytes twice: a still image is the fault "frozen camera".
        row = bytes(step) if camera in self.faults.frozen_cameras else random.randbytes(step)
        data = row * int(IMAGE_SIDE * rows)
        msg.data = array.array("B", data[: self.faults.cut_image_to])
        self._images[camera].publish(msg)

    def trajectories(self) -> list[Trajectory]:
        """What was received, each on the time of its stamp."""
        with self._lock:
            messages = list(self.received)
        return [Trajectory.from_message(m, JOINTS, seconds(m.header.stamp)) for m in messages]

    def count(self) -> int:
        with self._lock:
            return len(self.received)

    def wait_for(self, count: int, timeout: float = 30.0) -> None:
        """Until `count` trajectories have come in all."""
        end = time.monotonic() + timeout
        while self.count() < count:
            assert time.monotonic() < end, f"{self.count()} trajectories within {timeout} s, expected {count}"
            time.sleep(0.05)

    def wait_for_silence(self, quiet: float = 1.0, timeout: float = 30.0) -> None:
        """Until no trajectory has come for `quiet` seconds."""
        end = time.monotonic() + timeout
        seen = -1
        while seen != self.count():
            assert time.monotonic() < end, f"trajectories still came after {timeout} s"
            seen = self.count()
            time.sleep(quiet)

    def check_last_is_a_stop(self) -> None:
        last = self.trajectories()[-1]
        assert brakes(last), f"the last trajectory speeds up: {last.velocities}"
        assert np.all(last.velocities[-1] == 0.0)

    def check_everything_received(self) -> None:
        """The rules of joint_trajectory_controller, the limits, and no jump from one trajectory to the next."""
        assert not self.refused, self.refused[:3]
        trajectories = self.trajectories()
        low, high, speed = limits("min_position"), limits("max_position"), limits("max_velocity")
        for trajectory in trajectories:
            assert trajectory.velocities is not None, "a trajectory without velocities"
            assert np.all(trajectory.positions >= low - 1e-6), (trajectory.positions - low).min(axis=0)
            assert np.all(trajectory.positions <= high + 1e-6), (high - trajectory.positions).min(axis=0)
            assert np.all(np.abs(trajectory.velocities) <= speed + 1e-6), np.abs(trajectory.velocities).max(axis=0)
        for old, new in zip(trajectories, trajectories[1:]):
            jump = np.abs(new.positions[0] - old.sample(float(new.times[0])).position)
            assert np.all(jump <= speed * PERIOD_S + 1e-6), f"jump between trajectories: {jump}"


def main() -> None:
    """The robot as a process of its own, so that it can be stopped like one; ends with SIGINT."""
    # Handlers of our own: rclpy's would end the context under the publishing thread, and Python's is missing where
    # a shell started the tests in the background.
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    robot = IdealRobot()
    robot.start()
    while not done.wait(0.1):
        pass
    robot.close()
    rclpy.shutdown()


if __name__ == "__main__":
    main()
