"""Starts the control node: deployment in the arguments, tuning in the params file.

    ros2 launch pi0_mps control.launch.py robot:=so101 checkpoint:=DIR
    ros2 launch pi0_mps control.launch.py params_file:=my_robot.yaml
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.logging import get_logger
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.ros_adapters import get_ros_node

PACKAGE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACKAGE / "launch"))

import mps_daemon  # noqa: E402
import params_files  # noqa: E402
from params_files import NAME  # noqa: E402

ARM_ATTEMPT_PERIOD_S = 1.0
ARM_TIMEOUT_S = 120.0
TRUE_FALSE = ["true", "false"]
# "" leaves a parameter to the files.
AS_GIVEN = ["", *TRUE_FALSE]
LOG_LEVELS = ["debug", "info", "warn", "error", "fatal"]

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and of its relative topics."),
    DeclareLaunchArgument(
        "robot", default_value="", description="One of the robots in config/robots by its name: so101, aloha, panda, fr3, ur5e, sim_arm."
    ),
    DeclareLaunchArgument(
        "params_file", default_value="", description="YAML file with parameters; what it says counts more than the robot's file."
    ),
    DeclareLaunchArgument("checkpoint", default_value="", description="Folder of the policy; counts more than both files."),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="",
        choices=AS_GIVEN,
        description="Take ROS time from /clock (simulation, replay); counts more than both files.",
    ),
    DeclareLaunchArgument("log_level", default_value="info", choices=LOG_LEVELS, description="Least severity that is logged."),
    DeclareLaunchArgument(
        "autostart",
        default_value="",
        choices=AS_GIVEN,
        description="Load the policy and run inference at start; counts more than both files. "
        "The robot does not move before it is armed.",
    ),
    DeclareLaunchArgument(
        "arm",
        default_value="false",
        choices=TRUE_FALSE,
        description="Arm once the node is active, as a call of ~/enable would: THE ROBOT MOVES. Not together with use_respawn.",
    ),
    DeclareLaunchArgument(
        "use_respawn",
        default_value="false",
        choices=TRUE_FALSE,
        description="Start the node again if it dies. It comes up unarmed.",
    ),
    DeclareLaunchArgument(
        "mps",
        default_value="false",
        choices=TRUE_FALSE,
        description="See that an MPS daemon runs, so that encoder and decoder get their own multiprocessors (partition mps).",
    ),
    DeclareLaunchArgument(
        "outputs_under",
        default_value="",
        description="Publish every command below this name instead of where the parameters say; for replay.launch.py.",
    ),
]


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The node, once the arguments make sense together."""
    given = {a.name: LaunchConfiguration(a.name).perform(context) for a in ARGUMENTS}
    arm = given["arm"] == "true"
    if arm and given["use_respawn"] == "true":
        raise RuntimeError(
            "arm:=true with use_respawn:=true would let a node that died move the robot again by itself; "
            "leave one of them out and arm with ~/enable"
        )
    if given["outputs_under"] and given["use_sim_time"] != "true":
        raise RuntimeError("outputs_under is for replay, by the recording's clock: give use_sim_time:=true too, or leave it out")
    files = params_files.chosen(given["robot"], given["params_file"])
    parameters: dict[str, object] = {p: given[p] == "true" for p in ("use_sim_time", "autostart") if given[p]}
    if given["checkpoint"]:
        parameters["checkpoint"] = str(Path(given["checkpoint"]).expanduser())
    if given["outputs_under"]:
        parameters |= params_files.commands_under(files, given["outputs_under"], given["namespace"])
        # What is measured comes from a recording and does not follow the commands.
        joints = params_files.names_ending(files, ".max_tracking_error", given["namespace"])
        parameters |= dict.fromkeys(["max_tracking_error", *joints], 1e6)
    if parameters:
        files.append(params_files.on_top(files, parameters))
    node = Node(
        package=NAME,
        executable="control_node",
        name=NAME,
        namespace=given["namespace"],
        parameters=[*map(str, files)],
        arguments=["--ros-args", "--log-level", given["log_level"]],
        additional_env=transport_profile() | (mps_daemon.ensure() if given["mps"] == "true" else {}),
        respawn=given["use_respawn"] == "true",
        respawn_delay=2.0,
        output="screen",
        emulate_tty=True,
    )
    return [node, OpaqueFunction(function=arm_when_active, args=[node])] if arm else [node]


def transport_profile() -> dict[str, str]:
    """The shipped Fast DDS profile, unless the user has chosen transports: camera images get lost without it."""
    fast_dds_2, fast_dds_3 = "FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"
    if any(os.environ.get(v) for v in [fast_dds_2, fast_dds_3, "FASTDDS_BUILTIN_TRANSPORTS"]):
        return {}
    # Fast DDS 3 warns of the older name.
    variable = fast_dds_2 if os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy") else fast_dds_3
    return {variable: str(PACKAGE / "config/fastdds.xml")}


def arm_when_active(context: LaunchContext, node: Node) -> None:
    """Call ~/enable once a second until the node accepts, then never again: a later stop stays a stop."""
    from diagnostic_msgs.msg import DiagnosticStatus
    from std_srvs.srv import SetBool

    log = get_logger("arm")
    ros = get_ros_node(context)
    name = node.node_name
    client = ros.create_client(SetBool, f"{name}/enable")
    state = {"mode": "", "pending": False, "attempts": 0, "refusal": ""}

    def done() -> None:
        ros.destroy_timer(timer)
        ros.destroy_subscription(subscription)

    def on_status(status: DiagnosticStatus) -> None:
        state["mode"] = next((v.value for v in status.values if v.key == "mode"), "")
        if state["mode"] in ("stopping", "stopped", "fault"):
            log.error(f"not armed: {name} is in mode {state['mode']}: {status.message}")
            done()

    def on_answer(future) -> None:
        state["pending"] = False
        answer = future.result()
        if answer.success:
            log.warning(f"{name} is armed: the robot moves")
            done()
        elif answer.message != state["refusal"]:
            state["refusal"] = answer.message
            log.warning(f"not armed yet: {answer.message}")

    def attempt() -> None:
        state["attempts"] += 1
        if state["attempts"] * ARM_ATTEMPT_PERIOD_S > ARM_TIMEOUT_S:
            log.error(f"not armed within {ARM_TIMEOUT_S:.0f} s: {state['refusal'] or 'the node did not become active'}")
            done()
        elif state["mode"] == "active" and not state["pending"] and client.service_is_ready():
            state["pending"] = True
            client.call_async(SetBool.Request(data=True)).add_done_callback(on_answer)

    subscription = ros.create_subscription(DiagnosticStatus, f"{name}/status", on_status, 10)
    timer = ros.create_timer(ARM_ATTEMPT_PERIOD_S, attempt)


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start)])
