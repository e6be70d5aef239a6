"""Robot and policy on two computers, tried on one: a network namespace each, joined by a wire that delays and drops.

    sudo env PATH="$PATH" .local/venv/bin/python tests/blackbox/two_hosts.py

prints the table of docs/several-machines.md. Needs root, `ip` and /dev/net/tun. The wire is a program between two TAP
devices, since not every kernel has netem; it carries every Ethernet frame in both directions. Shared memory, which would
go round it, is off.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import json
import math
import multiprocessing
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(Path(__file__).resolve().parent)]

SIDES = {"pi0-robot": "10.77.0.1", "pi0-policy": "10.77.0.2"}
ROWS = [(0, 0), (5, 0), (20, 0), (50, 0), (100, 0), (0, 1), (20, 1), (20, 5), (50, 5)]  # ms one way, % of frames
SECONDS = 10.0
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def tap(side: str) -> int:
    """A TAP device inside the namespace of that side; what it sends can be read here."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", side.encode(), IFF_TAP | IFF_NO_PI))
    ip("netns", "add", side)
    ip("link", "set", side, "netns", side)
    for command in (["addr", "add", f"{SIDES[side]}/24", "dev", side], ["link", "set", side, "up"], ["link", "set", "lo", "up"]):
        ip("-n", side, *command)
    return device


def wire(ends: list[int], settings) -> None:
    """Carries frames until it is ended; `settings` are delay in seconds, probability of loss, bytes carried."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(30))
    except PermissionError:
        pass
    pending: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        now = time.monotonic()
        while pending and pending[0][0] <= now:
            _, _, end, frame = heapq.heappop(pending)
            try:
                os.write(end, frame)
            except OSError:
                pass  # the other end's queue is full: the frame is lost, as on a wire
        patience = max(0.0, pending[0][0] - now) if pending else 0.1
        for end in select.select(ends, [], [], patience)[0]:
            frame = os.read(end, 65536)
            settings[2] += len(frame)
            if random.random() >= settings[1]:
                count += 1
                heapq.heappush(pending, (time.monotonic() + settings[0], count, ends[1 - ends.index(end)], frame))


def robot_side() -> None:
    """Inside the robot's namespace: cameras, joints, listener, operator. Commands on stdin, answers on stdout."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from diagnostic_msgs.msg import DiagnosticStatus
    from std_srvs.srv import SetBool, Trigger

    from harness import MOVING_MODES, status_values
    from robot import CAMERAS, IdealRobot

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    robot = IdealRobot()
    jpegs = [(ROOT / f"tests/fixtures/images/camera_{n}.jpg").read_bytes() for n in "ab"]
    robot.pictures = {camera: jpegs for camera in CAMERAS}
    statuses: list[dict[str, str]] = []
    arrivals: list[float] = []
    ros = robot.node
    ros.create_subscription(DiagnosticStatus, "/pi0_mps/status", lambda m: statuses.append(status_values(m)), 50)
    heard = robot._on_trajectory
    robot._on_trajectory = lambda msg: (arrivals.append(time.monotonic()), heard(msg))
    robot.node.destroy_subscription(robot._commands)
    from trajectory_msgs.msg import JointTrajectory
    robot._commands = ros.create_subscription(JointTrajectory, "/pi0_mps/arm/joint_trajectory", robot._on_trajectory, 50)
    enable = ros.create_client(SetBool, "/pi0_mps/enable")
    save = ros.create_client(Trigger, "/pi0_mps/save_recording")
    robot.start()

    def call(client, request, patience: float):
        future, end = client.call_async(request), time.monotonic() + patience
        while not future.done() and time.monotonic() < end:
            time.sleep(0.02)
        return future.result() if future.done() else None

    def moving() -> bool:
        return bool(statuses) and statuses[-1].get("mode") in MOVING_MODES

    for line in sys.stdin:
        refusal, end = "", time.monotonic() + 60.0
        while not moving() and time.monotonic() < end:
            answer = call(enable, SetBool.Request(data=True), 3.0) if enable.service_is_ready() else None
            refusal = answer.message if answer and not answer.success else refusal
            time.sleep(0.3)
        if not moving():
            print(json.dumps({"refusal": refusal}), flush=True)
            continue
        arrivals.clear(), statuses.clear(), robot.refused.clear()
        time.sleep(float(line))
        times, said = list(arrivals), list(statuses)
        answer = call(save, Trigger.Request(), 10.0)
        stopped = [s["message"] for s in said if s.get("mode") not in MOVING_MODES]
        print(json.dumps({
            "arrivals": times, "refused": list(robot.refused), "stopped": stopped[0] if stopped else "",
            "recording": answer.message if answer and answer.success else "",
        }), flush=True)
    robot.close()
    rclpy.shutdown()


def images(recording: str) -> tuple[float, np.ndarray]:
    """Images per second of each camera, and arrival less stamp of each in ms, as the node's recorder saw them."""
    from rosbags.highlevel import AnyReader

    arrived, ages = [], []
    with AnyReader([Path(recording)]) as reader:
        for connection, recorded, data in reader.messages():
            if connection.topic.endswith("image_raw/compressed") or connection.msgtype.endswith("/Image"):
                stamp = reader.deserialize(data, connection.msgtype).header.stamp
                arrived.append(recorded * 1e-9)
                ages.append((recorded - stamp.sec * 10**9 - stamp.nanosec) * 1e-6)
    return len(arrived) / 2 / max(max(arrived) - min(arrived), 1e-3), np.array(ages)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--control-node", default=ROOT / "target/ros/release/control_node", type=Path)
    options.add_argument("--checkpoint", type=Path, help="a tiny random policy without it")
    options.add_argument("--seconds", type=float, default=SECONDS, help="length of each row")
    options.add_argument("--robot-side", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.robot_side:
        return robot_side()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    environment = dict(os.environ, FASTDDS_BUILTIN_TRANSPORTS="UDPv4", ROS_DOMAIN_ID="42", ROS_AUTOMATIC_DISCOVERY_RANGE="SUBNET")
    for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        environment.pop(name, None)
    folder = Path(tempfile.mkdtemp(prefix="pi0_mps-two-hosts-"))
    checkpoint = given.checkpoint or folder / "tiny"
    if not given.checkpoint:
        subprocess.run([given.control_node.with_name("pi0"), "new-checkpoint", "--preset", "tiny", "--seed", "1", checkpoint], check=True)
    ends = [tap(side) for side in SIDES]
    settings = multiprocessing.Array("d", [0.0, 0.0, 0.0], lock=False)
    carrier = multiprocessing.Process(target=wire, args=(ends, settings), daemon=True)
    carrier.start()
    parameters = {
        "checkpoint": checkpoint, "max_joint_state_age_ms": 500.0, "recorder.folder": folder,
        "recorder.seconds": given.seconds, "recorder.image_width": 0, "recorder.image_rate_hz": 1000.0, "recorder.keep": 100,
        **{f"cameras.{c}.transport": "compressed" for c in ("base", "wrist")},
        **{f"cameras.{c}.topic": f"camera/{c}/image_raw/compressed" for c in ("base", "wrist")},
    }
    inside = lambda side, *command: ["ip", "netns", "exec", side, *map(str, command)]  # noqa: E731
    node = subprocess.Popen(
        inside("pi0-policy", given.control_node, "--ros-args", "--params-file", ROOT / "config/robots/sim_arm.yaml",
               *(word for name, value in parameters.items() for word in ("-p", f"{name}:={value}"))),
        env=environment, stdout=(folder / "node.log").open("w"), stderr=subprocess.STDOUT,
    )
    robot = subprocess.Popen(
        inside("pi0-robot", sys.executable, __file__, "--robot-side"), env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    try:
        print("| delay, loss | images/s of each camera | image age, median / p99 / max | trajectories/s | longest gap | what the node did |")
        print("| --- | --- | --- | --- | --- | --- |")
        for delay, loss in ROWS:
            settings[0], settings[1] = delay * 1e-3, loss * 1e-2
            time.sleep(1.0)
            carried = settings[2]
            robot.stdin.write(f"{given.seconds}\n")
            robot.stdin.flush()
            said = json.loads(robot.stdout.readline())
            if "refusal" in said:
                print(f"| {delay} ms, {loss} % | | | | | did not arm: {said['refusal']} |", flush=True)
                continue
            times = np.array(said["arrivals"])
            rate, ages = images(said["recording"]) if said["recording"] else (math.nan, np.array([math.nan]))
            gap = f"{1e3 * np.diff(times).max():.0f} ms" if len(times) > 1 else "–"
            refused = f"; {len(said['refused'])} trajectories refused: {said['refused'][0]}" if said["refused"] else ""
            did = f"stopped: {said['stopped']}" if said["stopped"] else "ran"
            print(
                f"| {delay} ms, {loss} % | {rate:.1f} | "
                f"{np.median(ages):.0f} / {np.percentile(ages, 99):.0f} / {ages.max():.0f} ms | {len(times) / given.seconds:.1f} | {gap} | {did}{refused} |",
                flush=True,
            )
            print(f"{delay} ms, {loss} %: {(settings[2] - carried) / given.seconds / 1e3:.0f} kB/s on the wire", file=sys.stderr)
    finally:
        robot.stdin.close()
        for process in (robot, node):
            process.terminate()
            process.wait(30)
        carrier.kill()
        for side in SIDES:
            subprocess.run(["ip", "netns", "del", side], check=False)
        print(f"log and recordings: {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
