"""Plays the inputs of a recording through the node, on this computer alone, and records what it would have commanded.

    ros2 launch pi0_mps replay.launch.py bag:=my_bag robot:=so101 checkpoint:=DIR

No robot can be moved by it: of the recording only the cameras and joint states are played, commands go to topics under
replay/, and nothing of it leaves this computer (ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST). Only because of that the node is
armed without being asked. The measured joints are those of the recording, so a command that leads elsewhere is no error
here. `pi0 replay` does the same without ROS, by a clock of its own, and bit for bit the same each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import (
    DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription, OpaqueFunction, RegisterEventHandler,
    SetEnvironmentVariable, Shutdown, TimerAction,
)
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

CONTROL = Path(__file__).resolve().parent / "control.launch.py"
sys.path.insert(0, str(CONTROL.parent))

import params_files  # noqa: E402

# Time for the recorder and the node to find one another and to load a small policy; `delay` makes it longer.
START_DELAY_S = "5.0"
CLOCK_HZ = "200"

ARGUMENTS = [
    DeclareLaunchArgument("bag", description="Recording to play: a rosbag2 folder or MCAP file."),
    DeclareLaunchArgument("robot", default_value="", description="As for control.launch.py."),
    DeclareLaunchArgument("params_file", default_value="", description="As for control.launch.py."),
    DeclareLaunchArgument("checkpoint", default_value="", description="As for control.launch.py."),
    DeclareLaunchArgument("log_level", default_value="info", description="As for control.launch.py."),
    DeclareLaunchArgument("rate", default_value="1.0", description="Speed of playback; the policy has less time at more than 1."),
    DeclareLaunchArgument("delay", default_value=START_DELAY_S, description="Seconds before playback starts: time to load the policy."),
    DeclareLaunchArgument("record", default_value="replay", description="Folder for the recording of commands, chunks and status."),
]


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    given = {a.name: LaunchConfiguration(a.name).perform(context) for a in ARGUMENTS}
    if not Path(given["bag"]).expanduser().exists():
        raise RuntimeError(f"bag:={given['bag']} does not exist; give a rosbag2 folder or an MCAP file")
    if Path(given["record"]).exists():
        raise RuntimeError(f"record:={given['record']} exists already; give another folder")
    files = params_files.chosen(given["robot"], given["params_file"])
    cameras = params_files.given_parameter(files, "camera_names", [])
    topics = [params_files.given_parameter(files, f"cameras.{c}.topic", f"camera/{c}/image_raw") for c in cameras]
    inputs = [f"/{topic.lstrip('/')}" for topic in [*topics, "joint_states"]]
    outputs = [f"/replay/{group}" for group in params_files.output_groups(files)]
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(CONTROL)),
        launch_arguments={
            **{name: given[name] for name in ("robot", "params_file", "checkpoint", "log_level")},
            "use_sim_time": "true", "autostart": "true", "arm": "true", "outputs_under": "replay",
        }.items(),
    )
    recorder = ExecuteProcess(
        cmd=["ros2", "bag", "record", "--storage", "mcap", "--output", given["record"], "--use-sim-time",
             "--topics", *outputs, "/pi0_mps/action_chunk", "/pi0_mps/status", "/diagnostics"],
        output="screen",
    )
    # The commands that were recorded are not among the topics: they would go where they went then.
    player = ExecuteProcess(
        cmd=["ros2", "bag", "play", str(Path(given["bag"]).expanduser()), "--clock", CLOCK_HZ, "--rate", given["rate"],
             "--topics", *inputs],
        output="screen",
    )
    return [
        SetEnvironmentVariable("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST"),
        node,
        recorder,
        TimerAction(period=float(given["delay"]), actions=[player]),
        RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[Shutdown(reason="the recording is over")])),
    ]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start)])
