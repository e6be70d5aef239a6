"""Bad input: the text names it, the diagnostic shows it, the arm brakes or never starts."""

from __future__ import annotations

from diagnostic_msgs.msg import DiagnosticStatus

from robot import JOINTS

ERROR = DiagnosticStatus.ERROR


def expect_stop(node, robot, text: tuple[str, ...], detail: tuple[str, ...] = ()) -> None:
    """A fault while moving: the status says it, the diagnostic shows it in detail, a braking trajectory, then nothing."""
    node.wait_for_text(*text)
    node.wait_for_mode("active")
    node.wait_for_diagnostic("inputs", ERROR, *text, *detail)
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    before = robot.count()
    refused = node.enable()
    assert not refused.success
    assert all(part in refused.message for part in text[:1]), refused.message
    assert robot.count() == before


def expect_no_start(node, robot, text: tuple[str, ...], detail: tuple[str, ...] = ()) -> None:
    """A fault from the start: the diagnostic shows it in detail, arming is refused with it, no motion."""
    node.wait_for_diagnostic("inputs", ERROR, *text, *detail)
    refused = node.enable()
    assert not refused.success
    assert all(part in refused.message for part in text), refused.message
    assert robot.count() == 0


def test_nan_in_a_joint_state(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.nan_joint = "elbow"
    expect_stop(node, robot, ("joint 'elbow'", "NaN"))


def test_nan_from_the_start(start_node, robot):
    robot.faults.nan_joint = "elbow"
    expect_no_start(start_node(), robot, ("joint 'elbow'", "NaN"))


def test_wrong_joint_names(start_node, robot):
    robot.faults.joint_names = [name.replace("elbow", "elbow_joint") for name in JOINTS]
    expect_no_start(start_node(), robot, ("joint 'elbow'", "check joint_states for its name"))


def test_image_cut_short(start_node, robot):
    robot.faults.cut_image_to = 1000
    expect_no_start(start_node(), robot, ("camera", "size"), ("1000",))


def test_image_with_unknown_encoding(start_node, robot):
    robot.faults.encoding = "32FC1"
    expect_no_start(start_node(), robot, ("camera", "encoding"), ("32FC1",))


def test_image_turns_bad_while_moving(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.encoding = "32FC1"
    expect_stop(node, robot, ("camera", "encoding"), ("32FC1",))


def test_images_stop(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.silent_cameras = {"wrist"}
    expect_stop(node, robot, ("camera 'wrist'", "ms old"))


def test_joint_states_stop(start_node, robot):
    node = start_node()
    node.run_armed()
    robot.faults.silent_joints = True
    expect_stop(node, robot, ("position of joint", "ms old"))


def test_two_prompts_in_a_row(start_node, robot):
    node = start_node()
    node.run_armed()
    epoch, chunks = node.status["epoch"], int(node.status["chunks"])
    node.say("put the green cube into the mug")
    node.say("fold the towel")
    node.wait(lambda: int(node.status["chunks"]) > chunks + 5, "chunks after the prompts")
    node.wait_for_text("fold the towel", key="prompt")
    assert node.status["mode"] == "run", node.status
    assert node.status["epoch"] == epoch, "a prompt is no reset"
    robot.wait_for(robot.count() + 30)
