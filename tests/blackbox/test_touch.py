"""The task: scenes from seeds, the robot's reset service, and the film of a run."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rclpy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from film import HEIGHT, WIDTH, animation
from harness import ROOT, Process, wait_until
from sim_arm import Arm
from touch import APART, COLOURS, HALF_BLOCK, Touch

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def touch() -> Touch:
    return Touch(Arm())


def test_a_seed_gives_the_same_scene_and_another_one_another(touch: Touch):
    first, again, other = touch.reset(3), touch.reset(3), touch.reset(4)
    assert np.array_equal(first.blocks, again.blocks) and np.array_equal(first.start, again.start)
    assert not np.allclose(first.blocks, other.blocks) and not np.allclose(first.start, other.start)
    for i in range(3):
        assert np.hypot(*(other.blocks[i] - other.blocks[i - 1])) > APART


@pytest.mark.parametrize("index", range(len(COLOURS)))
def test_a_fingertip_on_a_block_counts_once(touch: Touch, index: int):
    scene = touch.reset(5)
    sys.path.insert(0, str(ROOT / "training"))
    import expert

    above = np.array([*scene.blocks[index], 2 * HALF_BLOCK + 0.03, expert.TILT, 0, 0, 0.004])
    touch.arm.place(expert.joints_of(above))
    touch.judge(0.0)
    assert touch.touches.order == []
    on = above.copy()
    on[2] = 2 * HALF_BLOCK - 0.003
    touch.arm.place(expert.joints_of(on))
    touch.judge(0.1)
    touch.judge(0.2)
    assert touch.touches.order == [(COLOURS[index], 0.1)]


@pytest.fixture
def robot(tmp_path: Path) -> Iterator[Process]:
    command = [sys.executable, str(ROOT / "scripts/sim_robot.py"), "--json", "--seed", "1"]
    process = Process("simulated robot", command, tmp_path / "robot.log")
    yield process
    assert process.end(30.0) == 0, process.tail()


def test_reset_puts_the_arm_where_the_seed_says(robot: Process, touch: Touch):
    node = rclpy.create_node("tester")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    seen: list[np.ndarray] = []
    node.create_subscription(JointState, "joint_states", lambda msg: seen.append(np.array(msg.position)), 10)
    parameters = node.create_client(SetParameters, "/sim_robot/set_parameters")
    reset = node.create_client(Trigger, "/sim_robot/reset")

    def wait(condition, what: str) -> None:
        assert wait_until(condition, PATIENCE_S, lambda: executor.spin_once(timeout_sec=0.1)), f"{what}\n{robot.tail()}"

    def stands_at(seed: int) -> bool:
        # Where it stands, it sags by what the position loop leaves.
        return bool(seen) and np.allclose(seen[-1], starts[seed], atol=0.01)

    starts = {seed: touch.reset(seed).start for seed in (1, 8)}
    wait(lambda: stands_at(1) and parameters.service_is_ready() and reset.service_is_ready(), "the robot did not come up")
    value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=8)
    answer = parameters.call_async(SetParameters.Request(parameters=[Parameter(name="seed", value=value)]))
    wait(answer.done, "no answer about the parameter")
    assert answer.result().results[0].successful
    assert stands_at(1)
    answer = reset.call_async(Trigger.Request())
    wait(answer.done, "no answer to the reset")
    assert answer.result().success and answer.result().message == "scene of seed 8"
    wait(lambda: stands_at(8), f"the arm is not at the start of seed 8: {seen[-1]}")
    executor.shutdown()
    node.destroy_node()


def test_a_film_shows_the_pictures():
    random = np.random.default_rng(0)
    images = np.full((3, HEIGHT, WIDTH, 3), 200, np.uint8)
    images[1, 40:80, 60:100] = random.choice(np.array([[250, 20, 20], [20, 20, 250]], np.uint8), (40, 40))
    images[2, 40:80, 60:100] = [20, 250, 20]
    shown = frames(animation(images, 10.0))
    assert len(shown) == 3
    for image, frame in zip(images, shown):
        # As exact as the palette, which is coarse by two bits.
        assert np.max(np.abs(image.astype(int) - frame)) <= 4


def frames(file: bytes) -> list[np.ndarray]:
    """An animated PNG with a palette, drawn as the specification says."""
    at, palette, drawn, box, canvas = 8, None, [], None, np.zeros((HEIGHT, WIDTH, 3), int)
    while at < len(file):
        length, kind = struct.unpack(">I4s", file[at : at + 8])
        body, at = file[at + 8 : at + 8 + length], at + 12 + length
        assert struct.unpack(">I", file[at - 4 : at])[0] == zlib.crc32(kind + body)
        if kind == b"PLTE":
            palette = np.frombuffer(body, np.uint8).reshape(-1, 3).astype(int)
        elif kind == b"fcTL":
            box = struct.unpack(">IIII", body[4:20])
        elif kind in (b"IDAT", b"fdAT"):
            width, height, left, top = box
            rows = np.frombuffer(zlib.decompress(body[4:] if kind == b"fdAT" else body), np.uint8).reshape(height, width + 1)
            assert not rows[:, 0].any()
            part, index = canvas[top : top + height, left : left + width], rows[:, 1:]
            part[index > 0] = palette[index[index > 0]]
            drawn.append(canvas.copy())
    return drawn
