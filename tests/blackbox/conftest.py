"""Black-box tests: the real control_node on real topics, with a robot that follows perfectly played by the test.

Nothing here depends on how fast the machine is: waits are long and end early, what is asserted is accounting, texts,
modes and the content of messages.

PI0_MPS_BIN is the folder with control_node and pi0; target/ros/release without it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rclpy  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from rclpy.time import Time  # noqa: E402

from harness import claim_domain  # noqa: E402
from node_under_test import NodeUnderTest  # noqa: E402
from robot import IdealRobot  # noqa: E402


@pytest.fixture(scope="session")
def binaries() -> Path:
    folder = Path(os.environ.get("PI0_MPS_BIN", ROOT / "target/ros/release"))
    for name in ("control_node", "pi0"):
        assert (folder / name).is_file(), f"{folder / name} is missing; run scripts/test, or set PI0_MPS_BIN"
    return folder


@pytest.fixture(scope="session")
def checkpoint(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random policy for the simulated arm."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    subprocess.run([binaries / "pi0", "new-checkpoint", "--preset", "tiny", "--seed", "1", folder], check=True)
    return folder


@contextlib.contextmanager
def robots_first() -> Iterator[None]:
    """The robot plays in this process. Where Linux groups tasks by session, this session goes before the node's meanwhile:
    there a thread's priority says nothing across sessions."""
    group = Path("/proc/self/autogroup")
    try:
        # Empty for a process outside every session's group, as under init: its threads' own priorities count there.
        nice = group.read_text().split()[-1:]
        if nice:
            group.write_text("-10")
    except OSError:  # no such groups here, or not root
        nice = []
    try:
        yield
    finally:
        if nice:
            group.write_text(nice[0])


@pytest.fixture(scope="session", autouse=True)
def ros() -> Iterator[None]:
    claim_domain()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    with robots_first():
        yield
    rclpy.try_shutdown()


@pytest.fixture
def robot() -> Iterator[IdealRobot]:
    """The robot; what the node sent it is checked after every test, whatever the test was about."""
    robot = IdealRobot()
    robot.start()
    yield robot
    robot.close()
    robot.check_everything_received()


@pytest.fixture
def start_node(binaries: Path, checkpoint: Path, robot: IdealRobot, tmp_path: Path) -> Iterator[Callable[..., NodeUnderTest]]:
    """Starts the node with parameters on top of config/robots/sim_arm.yaml; ends it with the test."""
    started: list[NodeUnderTest] = []

    def start(
        *arguments: str, name: str = "/pi0_mps", params_file: Path = ROOT / "config/robots/sim_arm.yaml", **parameters: str
    ) -> NodeUnderTest:
        """`arguments` are ROS arguments; they must make `name` the node's full name if it is another one."""
        command = [str(binaries / "control_node"), "--ros-args"]
        command += ["--params-file", str(params_file), "-p", f"checkpoint:={checkpoint}"]
        command += arguments
        # Patient with a robot that a busy machine holds up.
        defaults = {"max_joint_state_age_ms": "500.0", "recorder.folder": str(tmp_path / "recordings")}
        for parameter, value in {**defaults, **parameters}.items():
            command += ["-p", f"{parameter}:={value}"]
        started.append(NodeUnderTest(command, tmp_path / f"control_node_{len(started)}.log", robot, name))
        return started[-1]

    yield start
    # All are closed before one is judged: what is left running would be heard by the tests that follow.
    codes = [node.close() for node in started]
    for node, code in zip(started, codes):
        assert code == node.expected_exit, f"the node ended with {code}; its log:\n{node.process.tail()}"
        node.check_accounting()


@pytest.fixture
def play_bag() -> Callable[[Path, NodeUnderTest], None]:
    """Plays a bag over topics with its time on /clock, as `ros2 bag play --clock` does; arms as soon as that is possible."""

    def play(bag: Path, node: NodeUnderTest) -> None:
        from rclpy.serialization import deserialize_message
        from rosbags.rosbag2 import Reader
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import Image, JointState

        ros = node.robot.node
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        clock = ros.create_publisher(Clock, "/clock", newest)
        with Reader(bag) as reader:
            kinds = {c.topic: JointState if c.msgtype.endswith("JointState") else Image for c in reader.connections}
            messages = [(t, c.topic, deserialize_message(bytes(d), kinds[c.topic])) for c, t, d in reader.messages()]
        topics = {topic: ros.create_publisher(kind, topic, newest) for topic, kind in kinds.items()}
        everybody = [clock, *topics.values()]
        node.wait(lambda: all(p.get_subscription_count() for p in everybody), "subscriptions of the node")
        node.wait_for_text("waiting")  # the policy is loaded
        begin, wall = messages[0][0], time.monotonic()
        armed = None
        for recorded, topic, message in messages:
            while (ahead := (recorded - begin) * 1e-9 - (time.monotonic() - wall)) > 0:
                clock.publish(Clock(clock=Time(nanoseconds=recorded - int(ahead * 1e9)).to_msg()))
                time.sleep(min(ahead, 0.002))
            clock.publish(Clock(clock=Time(nanoseconds=recorded).to_msg()))
            topics[topic].publish(message)
            if armed is None or (armed.done() and not armed.result().success):
                armed = node.ask_to_enable()
        node.wait(armed.done, "answer to arming")
        assert armed.result().success, armed.result().message
        for publisher in everybody:
            node.robot.destroy(publisher)

    return play
