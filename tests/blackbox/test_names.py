"""Names that others choose: a topic of two types, services under other names."""

from __future__ import annotations

import pytest
import rclpy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from harness import count


@pytest.fixture
def elsewhere():
    """A participant of its own: one participant has one type for a topic."""
    context = rclpy.Context()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    yield context
    rclpy.shutdown(context=context)


def test_a_topic_of_two_types_does_no_harm(start_node, robot, elsewhere):
    """Which any node on the network can bring about; here on the topic that is the last one in the graph."""
    topics = ["/zzz/last", "/aaa/first"]
    mine = [robot.node.create_publisher(String, topic, 1) for topic in topics]
    other = rclpy.create_node("other_types", context=elsewhere)
    for topic in topics:
        other.create_publisher(Float64MultiArray, topic, 1)
    node = start_node()
    types = lambda: dict(robot.node.get_topic_names_and_types()).get(topics[0], [])  # noqa: E731
    node.wait(lambda: len(types()) == 2, "two types of one topic")
    node.run_armed()
    ticks = count(node.status, "ticks")
    node.wait(lambda: count(node.status, "ticks") > ticks + 100, "two seconds more of control ticks")
    for publisher in mine:
        robot.destroy(publisher)


def test_a_rival_of_another_type_is_one_too(start_node, robot, elsewhere):
    other = rclpy.create_node("rival", context=elsewhere)
    other.create_publisher(Bool, "/pi0_mps/arm/joint_trajectory", 1)
    node = start_node()
    node.wait_for_diagnostic("safety", b"\x01", "somebody else publishes on /pi0_mps/arm/joint_trajectory", "stop /rival")


def test_every_service_can_be_remapped(start_node, robot):
    """`~/stop` too, though a hidden node serves it."""
    rules = ["~/stop:=/estop", "~/enable:=/arm", "~/reset:=release", "rostopic://~/stop:=/not_this"]
    remap = [part for rule in ["__ns:=/left", "__node:=pi0", *rules] for part in ("-r", rule)]
    remap += [part for c in ("base", "wrist") for part in ("-r", f"camera/{c}/image_raw:=/camera/{c}/image_raw")]
    remap += ["-r", "joint_states:=/joint_states", "-r", "~/arm/joint_trajectory:=/pi0_mps/arm/joint_trajectory"]
    node = start_node(*remap, name="/left/pi0")
    stop, reset = (robot.node.create_client(Trigger, name) for name in ("/estop", "/left/release"))
    node._enable = robot.node.create_client(SetBool, "/arm")
    node.run_armed()
    assert node.call(stop, Trigger.Request()).success
    node.wait_for_mode("stopped")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    answer = node.call(reset, Trigger.Request())
    assert answer.success, answer.message
    node.wait_for_mode("active")
    assert not node._stop.service_is_ready(), "/left/pi0/stop is there too"
