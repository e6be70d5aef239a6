"""How images and limits come in: encodings, compressed pictures, lost cameras, publishers that cannot be heard, URDFs."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import String

from harness import MOVING_MODES, ROOT, count
from robot import ENCODINGS, JOINTS, PARAMETERS

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
JPEGS = [(ROOT / f"tests/fixtures/images/camera_{n}.jpg").read_bytes() for n in "ab"]


def png(side: int, seed: int) -> bytes:
    """A noisy picture, rgb, 8 bits."""
    rows = np.random.default_rng(seed).integers(0, 256, (side, 3 * side), dtype=np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def frames(node, camera: str) -> int:
    """Good frames of a camera so far, as the status says."""
    text = node.status.get(f"camera.{camera}", "")
    return int(text.split()[-2]) if text.endswith("frames") else 0


def goes_on(node, robot, what: str, n: int = 3) -> None:
    """More frames of both cameras, more chunks and more commands."""
    before, chunks, sent = {c: frames(node, c) for c in ("base", "wrist")}, count(node.status, "chunks"), robot.count()
    node.wait(lambda: all(frames(node, c) >= b + n for c, b in before.items()), f"frames of {what}")
    node.wait(lambda: count(node.status, "chunks") > chunks and robot.count() > sent, f"chunks and commands with {what}")
    assert node.status["mode"] in MOVING_MODES, f"{what}: {node.status}"


def test_pictures_and_encodings(start_node, robot):
    """JPEG, PNG and every raw encoding, while moving; then a picture that is cut short."""
    robot.pictures["base"] = JPEGS
    node = start_node(**{"cameras.base.transport": "compressed", "cameras.base.topic": "camera/base/image_raw/compressed"})
    node.run_armed()
    assert node.status["camera.base"].startswith("224x224 at "), node.status["camera.base"]
    robot.pictures["base"] = [png(96, 1), png(96, 2)]
    node.wait(lambda: node.status["camera.base"].startswith("96x96"), "a PNG picture")
    for encoding in ENCODINGS:
        robot.faults.encodings["wrist"] = encoding
        goes_on(node, robot, encoding)
    inputs = next(d for name, d in node.diagnostics.items() if name.endswith("inputs"))[-1]
    assert not any(v.key.endswith(".refused") for v in inputs.values), inputs

    robot.pictures["base"] = [JPEGS[0][: len(JPEGS[0]) // 2]]
    node.wait_for_mode("active")
    node.wait_for_diagnostic("inputs", ERROR, "camera 'base'", "of JPEG cannot be decoded: its end is missing")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    robot.pictures["base"] = [b"no picture"]
    node.wait_for_diagnostic("inputs", ERROR, "10 compressed bytes that begin with '6e 6f 20 70' are neither JPEG nor PNG")
    robot.pictures["base"] = JPEGS
    node.wait(lambda: node.enable().success, "arming with good pictures again")
    goes_on(node, robot, "JPEG again")


def test_a_lost_camera_is_left_out(start_node, robot):
    node = start_node(on_camera_loss="drop_view")
    node.run_armed()
    robot.faults.silent_cameras = {"wrist"}
    node.wait_for_diagnostic("inputs", ERROR, "camera 'wrist'", "ms old (limit 500 ms)")
    chunks, sent = count(node.status, "chunks"), robot.count()
    node.wait(lambda: count(node.status, "chunks") > chunks + 5 and robot.count() > sent + 50, "chunks from one camera")
    assert node.status["mode"] in MOVING_MODES, node.status
    robot.faults.silent_cameras = {"base", "wrist"}
    node.wait_for_mode("active")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()


def test_publishers_that_cannot_be_heard_are_named(start_node, robot):
    node = start_node("-r", "joint_states:=nowhere", **{"qos.images.reliability": "reliable", "cameras.wrist.transport": "compressed"})
    node.wait_for_diagnostic(
        "inputs", ERROR,
        "/ideal_robot publishes best_effort on /camera/base/image_raw, and qos.images.reliability is reliable",
        "/ideal_robot publishes sensor_msgs/msg/Image on /camera/wrist/image_raw, not sensor_msgs/msg/CompressedImage",
        "set the camera's transport to raw",
        "nobody publishes on /nowhere",
    )
    refused = node.enable()
    assert not refused.success and "nobody publishes on /nowhere" in refused.message, refused.message


URDF = """<robot name="arm">
  <joint name="elbow" type="revolute"><limit lower="1.2" upper="1.9" velocity="1.25" effort="1"/></joint>
  <joint name="gripper" type="prismatic"><limit lower="0" upper="{gripper}" velocity="0.09" effort="1"/></joint>
  <joint name="shoulder_pan" type="revolute"><limit lower="-0.1" upper="0.1" velocity="0.1" effort="1"/></joint>
</robot>"""


def test_limits_from_a_robot_description(start_node, robot, tmp_path):
    """Parameters win; what they leave out comes from the URDF, and it is said which; a broken one is refused."""
    given = {
        name: value for name, value in PARAMETERS.items()
        if not (name.startswith(("limits.elbow", "limits.gripper")) and not name.endswith("max_acceleration"))
    }
    params = tmp_path / "robot.yaml"
    params.write_text(yaml.safe_dump({"/**": {"ros__parameters": given}}))
    node = start_node(params_file=params)
    node.wait_for_mode("active")
    refused = node.enable()
    assert not refused.success and "joint 'elbow' has no limits" in refused.message, refused.message
    assert "robot_description" in refused.message

    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publisher = robot.node.create_publisher(String, "robot_description", latched)
    publisher.publish(String(data="<robot"))
    node.wait_for_diagnostic("safety", WARN, "robot_description is no XML")
    publisher.publish(String(data=URDF.format(gripper="-1")))
    node.wait_for_diagnostic("safety", WARN, "joint 'gripper': lower limit 0 is not below -1", "no min_position, max_position for joint 'gripper'")
    assert not node.enable().success
    publisher.publish(String(data=URDF.format(gripper="0.03")))
    node.wait_for_diagnostic(
        "safety", OK,
        "limits.elbow min_position 1.2 (robot_description), max_position 1.9 (robot_description), "
        "max_velocity 1.25 (robot_description), max_acceleration 6 (parameter)",
        "limits.shoulder_pan min_position -1.2 (parameter), max_position 1.2 (parameter)",
    )
    node.run_armed()
    elbow = JOINTS.index("elbow")
    speed = max(np.abs(t.velocities[:, elbow]).max() for t in robot.trajectories())
    assert speed <= 1.25 + 1e-6, speed
    # While armed nothing changes; afterwards the newest description counts.
    publisher.publish(String(data=URDF.format(gripper="0.025")))
    goes_on(node, robot, "a description that came while armed")
    assert node.enable(False).success
    node.wait_for_diagnostic("safety", OK, "max_position 0.025 (robot_description)")
