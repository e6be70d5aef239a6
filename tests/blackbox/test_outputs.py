"""What the node sends, judged by the rules of the controllers that take it; and two nodes in two namespaces."""

from __future__ import annotations

import math

from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from harness import MOVING_MODES
from robot import JOINTS, PARAMETERS
from trajectory import refusal, seconds

ARM, GRIPPER = JOINTS[:-1], JOINTS[-1]
# As a user gives them, in another order than the joints'.
SPLIT = {
    "outputs.names": "[gripper, arm]",
    "outputs.arm.joints": f"[{', '.join(reversed(ARM))}]",
    "outputs.arm.topic": "arm_controller/joint_trajectory",
    "outputs.gripper.joints": f"[{GRIPPER}]",
    "outputs.gripper.topic": "gripper_controller/commands",
    "outputs.gripper.type": "command",
}


def forward_command_refusal(msg: Float64MultiArray, joints: int) -> str | None:
    """Why forward_command_controller does not take this message, or None; NaN would be passed to the hardware."""
    if len(msg.data) != joints:
        return f"{len(msg.data)} values for {joints} joints"
    return None if all(math.isfinite(x) for x in msg.data) else "not finite"


class Controllers:
    """A joint_trajectory_controller for the arm and a forward_command_controller for the gripper."""

    def __init__(self, robot, namespace: str = ""):
        self.trajectories: list[JointTrajectory] = []
        self.commands: list[Float64MultiArray] = []
        self.refused: list[str] = []
        node = robot.node
        node.create_subscription(JointTrajectory, f"{namespace}/arm_controller/joint_trajectory", self._on_trajectory, 50)
        node.create_subscription(Float64MultiArray, f"{namespace}/gripper_controller/commands", self._on_command, 50)

    def _on_trajectory(self, msg: JointTrajectory) -> None:
        self.trajectories.append(msg)
        if reason := refusal(msg, ARM, seconds(msg.header.stamp)):
            self.refused.append(f"trajectory: {reason}")

    def _on_command(self, msg: Float64MultiArray) -> None:
        self.commands.append(msg)
        if reason := forward_command_refusal(msg, 1):
            self.refused.append(f"command: {reason}")

    def check(self) -> None:
        assert not self.refused, self.refused[:3]
        low, high = (PARAMETERS[f"limits.{GRIPPER}.{end}_position"] for end in ("min", "max"))
        assert all(low - 1e-9 <= c.data[0] <= high + 1e-9 for c in self.commands)


def armed(node) -> bool:
    """Tries to arm; what the node is still discovering, it refuses at first."""
    return node.status.get("mode") in MOVING_MODES or (node.status.get("mode") == "active" and node.enable().success)


def test_two_groups_of_two_kinds(start_node, robot):
    controllers = Controllers(robot)
    node = start_node(**SPLIT)
    node.wait_for_mode("active")
    node.wait(lambda: armed(node), "arming")
    # Nothing follows these commands: the node notices, so the arm is watched for as long as it takes.
    node.wait(lambda: len(controllers.trajectories) >= 5 and len(controllers.commands) >= 5, "commands of both groups")
    assert controllers.trajectories[-1].joint_names == list(reversed(ARM)), "the group's own order"
    node.stop()
    robot.wait_for_silence()
    controllers.check()
    assert robot.count() == 0, "nothing goes to the default topic"


def test_a_rival_on_one_of_two_groups_is_named_with_its_topic(start_node, robot):
    Controllers(robot, "/left")
    remap = ["-r", "__ns:=/left", "-r", "arm_controller/joint_trajectory:=/elsewhere/arm"]
    robot.node.create_subscription(JointTrajectory, "/elsewhere/arm", lambda _: None, 1)
    rival = robot.node.create_publisher(JointTrajectory, "/elsewhere/arm", 1)
    says = "somebody else publishes on /elsewhere/arm, the topic of output 'arm': stop /ideal_robot"
    node = start_node(*remap, name="/left/pi0_mps", **SPLIT)
    node.wait_for_diagnostic("safety", b"\x01", says)
    robot.destroy(rival)
    rival = robot.node.create_publisher(Float64MultiArray, "/left/gripper_controller/commands", 1)
    says = "somebody else publishes on /left/gripper_controller/commands, the topic of output 'gripper': stop /ideal_robot"
    node.wait_for_diagnostic("safety", b"\x01", says)
    robot.destroy(rival)


def test_two_robots_in_two_namespaces(start_node, robot):
    """Same process names, same relative topics; each hears and moves its own robot, and a stop stops one of them."""
    cameras = [f"{c}:=/{c}" for c in ("camera/base/image_raw", "camera/wrist/image_raw")]
    nodes, controllers = [], []
    for side in ("left", "right"):
        remap = [part for rule in ["joint_states:=/joint_states", *cameras] for part in ("-r", rule)]
        controllers.append(Controllers(robot, f"/{side}"))
        nodes.append(start_node("-r", f"__ns:=/{side}", *remap, name=f"/{side}/pi0_mps", max_tracking_error="10.0", **SPLIT))
    for node in nodes:
        node.wait_for_mode("active")
    for node in nodes:
        node.wait(lambda node=node: armed(node), "arming")
    for side in controllers:
        nodes[0].wait(lambda side=side: len(side.trajectories) > 20, "commands of both nodes")
    assert nodes[0].stop().success
    nodes[0].wait_for_mode("stopped")
    stopped, seen = robot.now(), len(controllers[1].trajectories)
    nodes[1].wait(lambda: len(controllers[1].trajectories) > seen + 50, "a second of commands of the other node")
    assert nodes[1].status["mode"] in MOVING_MODES
    # By its stamps: what it sent before may still have been arriving.
    dated = [seconds(m.header.stamp) for m in controllers[0].trajectories]
    assert all(stamp <= stopped for stamp in dated), f"it went on: {dated[-1]} is after {stopped}"
    for side in controllers:
        side.check()
    names = {name.split(":")[0] for name in nodes[0].diagnostics}
    assert names == {"left/pi0_mps", "right/pi0_mps"}, names


def test_log_reaches_rosout_at_log_level(start_node, robot):
    from rcl_interfaces.msg import Log

    heard: list[Log] = []
    robot.node.create_subscription(Log, "/rosout", heard.append, 100)
    node = start_node("--log-level", "warn")
    node.wait_for_mode("active")
    refused = node.set_parameter("seam", node.get_parameter("prompt"))
    assert not refused.successful
    node.wait(lambda: any("'seam'" in m.msg for m in heard), "the refusal on /rosout")
    mine = [m for m in heard if m.name == "pi0_mps"]
    assert mine and all(m.level >= 30 for m in mine), mine
    assert all(m.file.endswith(".rs") and m.line > 0 for m in mine)
    assert "mode:" not in node.process.text(), "info is below warn"
    assert "'seam'" in node.process.text(), "the console says it too"
