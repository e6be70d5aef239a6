"""Bad input: the text names it, the diagnostic shows it, the arm brakes or never starts."""

from __future__ import annotations

from diagnostic_msgs.msg import DiagnosticStatus

from harness import MOVING_MODES
from robot import JOINTS

ERROR = DiagnosticStatus.ERROR


def expect_stop(node, robot, status: tuple[str, ...], diagnostic: tuple[str, ...]) -> None:
    """A fault while moving: status and diagnostic name it, a braking trajectory, then nothing and no arming."""
    node.wait_for_text(*status)
    node.wait_for_mode("active")
    node.wait_for_diagnostic("inputs", ERROR, *diagnostic)
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    before = robot.count()
    refused = node.enable()
    assert not refused.success
    assert status[0] in refused.message, refused.message
    assert robot.count() == before


def expect_no_start(node, robot, *parts: str) -> None:
    """A fault from the start: status, diagnostic and the refusal to arm name it, the node stays inactive, no motion."""
    node.wait_for_text(*parts)
    node.wait_for_diagnostic("inputs", ERROR, *parts)
    refused = node.enable()
    assert not refused.success
    assert all(part in refused.message for part in parts), refused.message
    assert node.status["mode"] == "warmup"
    assert robot.count() == 0


def test_nan_in_a_joint_state(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.nan_joint = "elbow"
    expect_stop(node, robot, ("joint 'elbow'", "NaN"), ("joint 'elbow'", "NaN"))


def test_nan_from_the_start(start_node, robot):
    robot.faults.nan_joint = "elbow"
    node = start_node()
    node.wait_for_diagnostic("inputs", ERROR, "joint 'elbow'", "NaN")
    refused = node.enable()
    assert not refused.success
    assert "joint 'elbow'" in refused.message and "NaN" in refused.message, refused.message
    assert robot.count() == 0


def test_wrong_joint_names(start_node, robot):
    robot.faults.joint_names = [name.replace("elbow", "elbow_joint") for name in JOINTS]
    expect_no_start(start_node(), robot, "joint 'elbow'", "elbow_joint")


def test_image_cut_short(start_node, robot):
    robot.faults.cut_image_to = 1000
    expect_no_start(start_node(), robot, "camera 'base'", "1000 bytes with step 672 are too few for 224x224 rgb8")


def test_image_with_unknown_encoding(start_node, robot):
    robot.faults.encodings["base"] = "32FC1"
    expect_no_start(start_node(), robot, "camera 'base'", "encoding '32FC1' is not supported; publish one of rgb8")


def test_image_turns_bad_while_moving(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.encodings["base"] = "32FC1"
    expect_stop(node, robot, ("camera 'base'", "encoding"), ("camera 'base'", "encoding '32FC1' is not supported"))


def test_images_stop(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.silent_cameras = {"wrist"}
    expect_stop(node, robot, ("camera 'wrist'", "ms old (limit 500 ms)"), ("camera 'wrist'", "ms old (limit 500 ms)"))


def test_joint_states_stop(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.silent_joints = True
    expect_stop(node, robot, ("joint 'shoulder_pan'", "ms old (limit 500 ms)"), ("joint 'shoulder_pan'", "ms old (limit 500 ms)"))


def test_two_prompts_in_a_row(start_node, robot):
    node = start_node()
    node.run_armed()
    armed_at = len(node.statuses) - 1
    epoch, chunks = node.status["epoch"], int(node.status["chunks"])
    node.say("put the green cube into the mug")
    node.say("fold the towel")
    node.wait(lambda: int(node.status["chunks"]) > chunks + 5, "chunks after the prompts")
    node.wait_for_text("fold the towel", key="prompt")
    node.wait_for_mode("run")
    assert all(s["mode"] in MOVING_MODES for s in node.statuses[armed_at:]), [s["mode"] for s in node.statuses]
    assert node.status["epoch"] == epoch, "a prompt is no reset"
    robot.wait_for(robot.count() + 30)
