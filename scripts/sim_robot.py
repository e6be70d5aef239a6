"""A simulated arm with two cameras as a ROS 2 node: MuJoCo physics, headless rendering, joint_trajectory_controller's rules.

It publishes camera/base/image_raw, camera/wrist/image_raw and joint_states, executes the JointTrajectory it is sent,
and reports on ~/report how well that went: tracking error, jumps between trajectories, what was refused and why, and
which blocks the fingers touched. The service ~/reset puts arm and blocks where the parameter `seed` says.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from film import Film
from sim_arm import CAMERAS, JOINTS, MODEL, Arm, write_picture
from touch import Touch
from trajectory import Jerk, Sample, Trajectory, brakes, refusal, seconds

CYCLE_S = 0.01  # one joint_states message a cycle
MAX_BACKLOG_S = 0.1  # further behind than this and the missed time is dropped, and counted
REPORT_PERIOD_S = 0.5
JERK_PERIOD_S = 0.02  # between the samples of the path whose jerk is reported
AT_REST_RAD_S = 0.02  # measured speed below which the arm counts as standing


@dataclass
class Report:
    """What became of the trajectories. Radians, metres for the gripper."""

    seed: int | None = None  # of the scene
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    max_tracking_error: float = 0.0
    max_tracking_error_joint: str = ""
    max_jump: float = 0.0
    max_velocity: np.ndarray = field(default_factory=lambda: np.zeros(len(JOINTS)))
    max_acceleration: np.ndarray = field(default_factory=lambda: np.zeros(len(JOINTS)))
    jerk: Jerk = field(default_factory=lambda: Jerk(JERK_PERIOD_S))  # of the desired path, without the gripper
    dropped_s: float = 0.0
    at_rest: bool = True
    last_brakes: bool = True
    camera_frames: int = 0
    touched: list = field(default_factory=list)  # colours and the seconds since the reset, in order

    def as_dict(self) -> dict:
        def per_joint(values: np.ndarray) -> dict:
            return {name: round(float(v), 4) for name, v in zip(JOINTS, values)}

        return {
            "seed": self.seed,
            "accepted": self.accepted,
            "refused": sum(self.refused.values()),
            "refused_reasons": dict(self.refused),
            "max_tracking_error_rad": round(self.max_tracking_error, 5),
            "max_tracking_error_joint": self.max_tracking_error_joint,
            "max_jump_rad": round(self.max_jump, 5),
            "max_velocity": per_joint(self.max_velocity),
            "max_acceleration": per_joint(self.max_acceleration),
            "jerk_rms_rad_s3": round(self.jerk.rms, 2),
            "dropped_s": round(self.dropped_s, 3),
            "at_rest": self.at_rest,
            "last_trajectory_brakes": self.last_brakes,
            "camera_frames": self.camera_frames,
            "touched": [[colour, round(seconds, 3)] for colour, seconds in self.touched],
        }


class Controller:
    """Follows the newest accepted trajectory and keeps the books. Times are the monotonic clock."""

    def __init__(self, arm: Arm, report: Report):
        self.arm = arm
        self.report = report
        self.trajectory = Trajectory.hold(arm.position())
        self.desired = self.trajectory.sample(0.0)
        self._last_position = arm.position().copy()
        self._steps = 0

    def receive(self, msg: JointTrajectory, ros_now: float, now: float, physics: float) -> None:
        """Accept or refuse a message. An accepted one replaces the running trajectory at `physics`, the time up to
        which the arm was simulated, a little before `now`."""
        reason = refusal(msg, JOINTS, ros_now)
        if reason:
            self.report.refused[reason] += 1
            print(f"sim_robot: trajectory refused: {reason}", file=sys.stderr)
            return
        stamp = seconds(msg.header.stamp)
        start = now + (stamp - ros_now if stamp else 0.0)
        new = Trajectory.from_message(msg, JOINTS, start)
        wanted = self.trajectory.sample(float(new.times[0]))
        jump = float(np.max(np.abs(new.positions[0] - wanted.position)))
        self.report.max_jump = max(self.report.max_jump, jump)
        self.report.last_brakes = brakes(new)
        self.report.accepted += 1
        self.trajectory = new.after(physics, self.trajectory.sample(physics))

    def step(self, t: float) -> None:
        """One physics step towards the desired state at `t`."""
        desired = self.trajectory.sample(t)
        step_s = self.arm.step_s
        # From the desired positions themselves: a jump shows as the velocity that it asks for.
        velocity = (desired.position - self._last_position) / step_s
        acceleration = (desired.velocity - self.desired.velocity) / step_s
        np.maximum(self.report.max_velocity, np.abs(velocity), out=self.report.max_velocity)
        np.maximum(self.report.max_acceleration, np.abs(acceleration), out=self.report.max_acceleration)
        self.desired, self._last_position = desired, desired.position
        if self._steps % round(JERK_PERIOD_S / step_s) == 0:
            self.report.jerk.add(desired.position[:-1])
        self._steps += 1
        self.arm.command(desired.position, desired.velocity)
        self.arm.step()

    def measure(self, now: float) -> None:
        """Compare the arm with what was desired of it."""
        error = np.abs(self.arm.position() - self.desired.position)
        worst = int(np.argmax(error))
        if error[worst] > self.report.max_tracking_error:
            self.report.max_tracking_error = float(error[worst])
            self.report.max_tracking_error_joint = JOINTS[worst]
        standing = float(np.max(np.abs(self.arm.velocity()))) < AT_REST_RAD_S
        self.report.at_rest = standing and now >= self.trajectory.end


class Recorder:
    """Keeps what the robot publishes and writes it to a rosbag2 MCAP at the end: compressing takes time that the
    running robot does not have."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._messages: list[tuple[str, object]] = []

    def add(self, topic: str, msg) -> None:
        self._messages.append((topic, msg))

    def close(self) -> None:
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        store = get_typestore(Stores.ROS2_JAZZY)
        writer = Writer(self._folder, version=9, storage_plugin=StoragePlugin.MCAP)
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        connections = {}
        with writer:
            for topic, msg in self._messages:
                kind = message_type(msg)
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=store)
                stamp = msg.header.stamp
                # Not rclpy's serialize_message: its padding is whatever lay in memory, and rosbags rejects it.
                raw = store.serialize_cdr(as_rosbags(msg, store.types), kind)
                writer.write(connections[topic], stamp.sec * 10**9 + stamp.nanosec, raw)


def message_type(msg) -> str:
    return f"{type(msg).__module__.split('.')[0]}/msg/{type(msg).__name__}"


def as_rosbags(msg, types: dict):
    """An rclpy message as the same message of rosbags."""
    fields = {}
    for name in msg.get_fields_and_field_types():
        value = getattr(msg, name)
        if hasattr(value, "get_fields_and_field_types"):
            value = as_rosbags(value, types)
        elif isinstance(value, array.array):
            value = np.array(value, dtype=value.typecode)
        fields[name] = value
    return types[message_type(msg)](**fields)


class SimRobot:
    """The node: topics round an Arm and its Controller."""

    def __init__(self, node: Node, options: argparse.Namespace):
        self.node = node
        self.options = options
        self.arm = Arm(options.model, options.width, options.height)
        self.touch = Touch(self.arm)
        self.report = Report(touched=self.touch.touches.order)
        self._begun, self._begun_ros = time.monotonic(), 0.0
        if options.seed is not None:
            self._reset(options.seed)
        self.controller = Controller(self.arm, self.report)
        self.recorder = Recorder(options.record) if options.record else None
        self.film = Film() if options.film else None
        self._asked = ""
        if self.film:
            node.create_subscription(String, options.prompt_topic, self._on_prompt, 1)
        self._newest: JointTrajectory | None = None
        self._lock = threading.Lock()
        # Images as camera drivers send them: the newest or nothing.
        newest = QoSProfile(
            depth=1,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.VOLATILE,
        )
        self._images = {c: node.create_publisher(Image, f"camera/{c}/image_raw", newest) for c in CAMERAS}
        self._joints = node.create_publisher(JointState, "joint_states", 10)
        self._report = node.create_publisher(DiagnosticStatus, "~/report", 1)
        node.create_subscription(JointTrajectory, options.trajectory_topic, self._on_trajectory, 1)
        node.declare_parameter("seed", options.seed or 0)
        self._wanted_reset: threading.Event | None = None
        node.create_service(Trigger, "~/reset", self._on_reset)

    def _on_reset(self, _, response: Trigger.Response) -> Trigger.Response:
        # The physics belong to the other thread.
        done = threading.Event()
        self._wanted_reset = done
        response.success = done.wait(2.0)
        seed = self.node.get_parameter("seed").value
        response.message = f"scene of seed {seed}" if response.success else "the simulation does not answer"
        return response

    def _reset(self, seed: int) -> None:
        """A new scene, and a new report with it."""
        self.touch.reset(seed)
        self._begun, self._begun_ros = time.monotonic(), self.node.get_clock().now().nanoseconds * 1e-9
        self.report = Report(seed, touched=self.touch.touches.order)

    def _on_prompt(self, msg: String) -> None:
        self._asked = msg.data

    def _on_trajectory(self, msg: JointTrajectory) -> None:
        stamp = seconds(msg.header.stamp)
        if stamp and stamp < self._begun_ros:
            return  # for the scene before
        with self._lock:
            self._newest = msg

    def _take_trajectory(self) -> JointTrajectory | None:
        with self._lock:
            msg, self._newest = self._newest, None
        return msg

    def run(self, stopped: threading.Event) -> None:
        """Until stopped or the duration is over. Physics keeps pace with the monotonic clock."""
        start = time.monotonic()
        end = start + self.options.duration if self.options.duration else math.inf
        physics = start
        camera_s = 1.0 / self.options.camera_rate
        next_image, next_report = dict.fromkeys(CAMERAS, start), start
        script = gentle_motion(self.arm.position(), start) if self.options.move else None
        cycle = start
        while not stopped.is_set() and cycle < end:
            now = time.monotonic()
            if done := self._wanted_reset:
                self._reset(self.node.get_parameter("seed").value)
                self._take_trajectory()
                self.controller = Controller(self.arm, self.report)
                self._wanted_reset = None
                done.set()
            if msg := self._take_trajectory() or (script and script(now)):
                self.controller.receive(msg, self.node.get_clock().now().nanoseconds * 1e-9, now, physics)
            if now - physics > MAX_BACKLOG_S:
                self.report.dropped_s += now - physics - MAX_BACKLOG_S
                physics = now - MAX_BACKLOG_S
            while physics + self.arm.step_s <= now:
                physics += self.arm.step_s
                self.controller.step(physics)
            self.controller.measure(physics)
            before = len(self.report.touched)
            self.touch.judge(now - self._begun)
            if self.film:
                self.film.add(now - start, self.arm.data.qpos, self._asked)
            self._publish_joints()
            # One camera a cycle, so that rendering both does not hold up the joint states.
            due = min(next_image, key=next_image.get)
            if now >= next_image[due]:
                self._publish_image(due)
                next_image[due] = max(next_image[due] + camera_s, now)
            if now >= next_report or len(self.report.touched) > before:
                self._publish_report()
                next_report = now + REPORT_PERIOD_S
            # Skip cycles that are over instead of running after them.
            cycle += CYCLE_S * max(1, math.ceil((time.monotonic() - cycle) / CYCLE_S))
            stopped.wait(max(0.0, cycle - time.monotonic()))

    def close(self) -> None:
        if self.recorder:
            self.recorder.close()
        if self.options.picture:
            write_picture(self.options.picture, self.options.model, self.arm.data)
        if self.film:
            self.film.write(self.options.film, self.options.model)

    def _send(self, publisher, msg) -> None:
        publisher.publish(msg)
        if self.recorder:
            self.recorder.add(publisher.topic_name, msg)

    def _publish_joints(self) -> None:
        msg = JointState()
        msg.header.stamp = self.node.get_clock().now().to_msg()
        msg.name = JOINTS
        msg.position = self.arm.position().tolist()
        msg.velocity = self.arm.velocity().tolist()
        self._send(self._joints, msg)

    def _publish_image(self, camera: str) -> None:
        image = self.arm.image(camera)
        msg = Image(height=image.shape[0], width=image.shape[1], encoding="rgb8", step=3 * image.shape[1])
        msg.header.stamp = self.node.get_clock().now().to_msg()
        msg.header.frame_id = f"{camera}_camera"
        # rclpy takes an array('B') as it is; a list or bytes it checks element by element.
        msg.data = array.array("B", image.tobytes())
        self._send(self._images[camera], msg)
        self.report.camera_frames += 1

    def _publish_report(self) -> None:
        msg = DiagnosticStatus(name=f"{self.node.get_name()}: report", hardware_id="sim_arm")
        refused = sum(self.report.refused.values())
        msg.level = DiagnosticStatus.WARN if refused else DiagnosticStatus.OK
        msg.message = f"{refused} trajectories refused" if refused else "following"
        for key, value in self.report.as_dict().items():
            text = json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
            msg.values.append(KeyValue(key=key, value=text))
        self._report.publish(msg)


def gentle_motion(home: np.ndarray, start: float) -> Callable[[float], JointTrajectory | None]:
    """A scripted motion for recordings: slow sines round the home pose, sent as trajectories five times a second."""
    amplitude = np.array([0.5, 0.12, 0.2, 0.3, 0.3, 0.6, 0.012])
    omega = 2 * math.pi * np.array([0.25, 0.5, 0.5, 0.25, 0.5, 0.25, 0.5])
    next_s = [start]

    def at(t: float) -> tuple[np.ndarray, np.ndarray]:
        # The first second fades the motion in, so that it starts at rest.
        fade, slope = (math.sin(math.pi / 2 * t) ** 2, math.pi / 2 * math.sin(math.pi * t)) if t < 1 else (1.0, 0.0)
        wave, rate = amplitude * np.sin(omega * t), amplitude * omega * np.cos(omega * t)
        return home + fade * wave, fade * rate + slope * wave

    def message(now: float) -> JointTrajectory | None:
        if now < next_s[0]:
            return None
        next_s[0] = now + 0.2
        msg = JointTrajectory(joint_names=JOINTS)
        for k in range(1, 17):
            position, velocity = at(now - start + 0.02 * k)
            velocity = velocity if k < 16 else np.zeros_like(velocity)
            point = JointTrajectoryPoint(positions=position.tolist(), velocities=velocity.tolist())
            point.time_from_start.nanosec = 20_000_000 * k
            msg.points.append(point)
        return msg

    return message


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="MJCF of the robot")
    parser.add_argument("--trajectory-topic", default="/pi0_mps/arm/joint_trajectory", help="what to follow")
    parser.add_argument("--width", type=int, default=224, help="camera width, pixels")
    parser.add_argument("--height", type=int, default=224, help="camera height, pixels")
    parser.add_argument("--camera-rate", type=float, default=15.0, help="images per second and camera")
    parser.add_argument("--duration", type=float, default=0.0, help="seconds to run; 0 runs until a signal")
    parser.add_argument("--seed", type=int, help="scene to begin with; without it everything is where the model has it")
    parser.add_argument("--move", action="store_true", help="move by itself, gently, without a policy")
    parser.add_argument("--record", type=Path, help="write what is published to this rosbag2 folder (MCAP)")
    parser.add_argument("--picture", type=Path, help="write a PNG of the scene at the end")
    parser.add_argument("--film", type=Path, help="write an animated PNG of the run at the end, which takes a while")
    parser.add_argument("--prompt-topic", default="/pi0_mps/prompt", help="what a film says above the picture")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON at the end")
    options = parser.parse_args()
    for name, value in {"--width": options.width, "--height": options.height, "--camera-rate": options.camera_rate}.items():
        if not value > 0:
            parser.error(f"{name} is {value}; it must be more than 0")
    if max(options.width, options.height) > 1280:
        parser.error(f"the image is {options.width}x{options.height}; the model renders up to 1280x960")
    if options.record and not options.duration:
        parser.error("--record needs --duration SECONDS: images fill a disk quickly")
    if options.record and options.record.exists():
        parser.error(f"{options.record} exists; remove it or give another folder")
    return options


def main() -> int:
    options = parse_arguments()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("sim_robot")
    robot = SimRobot(node, options)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=spin, args=(executor,), daemon=True)
    spinner.start()
    robot.run(stopped)
    robot.close()
    rclpy.try_shutdown()
    spinner.join()
    node.destroy_node()
    if options.json:
        print(json.dumps(robot.report.as_dict()), flush=True)
    return 0


def spin(executor: SingleThreadedExecutor) -> None:
    try:
        executor.spin()
    except ExternalShutdownException:
        pass


if __name__ == "__main__":
    sys.exit(main())
