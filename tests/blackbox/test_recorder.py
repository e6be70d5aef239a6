"""The flight recorder as a user meets it, and what replaying gives: a recording after a fault and on request, read by
rosbags, replayed by `pi0 replay`; and a bag played over topics beside the same bag replayed without ROS."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from harness import ROOT
from robot import CAMERAS, JOINTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recordings"


@pytest.fixture
def replay(binaries: Path, checkpoint: Path):
    """Runs `pi0 replay`; what it says."""

    def run(bag: Path, *arguments: str) -> dict:
        command = [str(binaries / "pi0"), "replay", str(bag), "--json", "--checkpoint", str(checkpoint), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def read(path: Path) -> dict[str, list]:
    """Every message of a recording by topic, with the time at which it was recorded, by the definitions in the file."""
    messages: dict[str, list] = {}
    with AnyReader([path]) as reader:
        for connection, recorded, data in reader.messages():
            messages.setdefault(connection.topic, []).append((recorded * 1e-9, reader.deserialize(data, connection.msgtype)))
    return messages


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mcap")) if folder.exists() else []


def test_a_fault_is_recorded_and_can_be_replayed(start_node, robot, folder, replay):
    node = start_node(**{"recorder.folder": str(folder), "recorder.seconds": "6.0"})
    node.run_armed(100)
    assert not files(folder), "nothing has happened yet"
    robot.faults.silent_cameras = {CAMERAS[0]}
    node.wait(lambda: files(folder), "recording")
    node.wait_for_diagnostic("recorder", b"\x00", str(folder), "recordings_written 1")
    [path] = files(folder)
    assert "camera_base_is" in path.name, path.name

    found = read(path)
    assert {f"/camera/{c}/image_raw" for c in CAMERAS} <= found.keys()
    times = [t for topic in found.values() for t, _ in topic]
    assert 3.0 < max(times) - min(times) < 7.5
    image = found["/camera/wrist/image_raw"][0][1]
    assert (image.width, image.height, image.encoding, len(image.data)) == (160, 160, "rgb8", 160 * 160 * 3)
    _, states = zip(*found["/joint_states"])
    assert list(states[0].name) == JOINTS and np.isfinite([s.position for s in states]).all()
    assert found["/pi0_mps/prompt"][0][1].data == "put the red cube into the mug"
    assert "joint_names" in found["/pi0_mps/parameters"][0][1].data
    _, ticks = zip(*found["/pi0_mps/tick"])
    modes = [t.mode_name for t in ticks]
    # It may reach back to before the robot was armed; it ends at rest after the stop.
    assert modes.index("run") < modes.index("stopping") and modes[-1] == "active", list(dict.fromkeys(modes))
    published = [t for t in ticks if t.published]
    assert all(0.0 <= t.publish_ms and t.compute_ms >= 0.0 for t in published if t.publish_ms == t.publish_ms)
    assert sum(t.publish_ms == t.publish_ms for t in published) > 0.9 * len(published)
    # The commands are those that the robot got.
    _, commands = zip(*found["/pi0_mps/arm/joint_trajectory"])
    sent = {(m.header.stamp.sec, m.header.stamp.nanosec): m for m in robot.received}
    both = [(m, sent[key]) for m in commands if (key := (m.header.stamp.sec, m.header.stamp.nanosec)) in sent]
    assert len(both) > 100
    for ours, theirs in both:
        assert [list(p.positions) for p in ours.points] == [list(p.positions) for p in theirs.points]
    _, chunks = zip(*found["/pi0_mps/action_chunk"])
    _, chunk_times = zip(*found["/pi0_mps/chunk_times"])
    assert len(chunks) == len(chunk_times) > 10
    assert all(c.encode_ms > 0 and c.decode_ms > 0 and c.observation_to_chunk_ms > c.decode_ms for c in chunk_times)
    log = " ".join(m.msg for _, m in found["/rosout"])
    assert "mode: run → stopping" in log and "camera 'base' is" in log
    assert any(s.name == "pi0_mps: inputs" for _, d in found["/diagnostics"] for s in d.status)

    # By itself: the parameters are in it. The replay stops for the same reason.
    out = folder / "replayed.mcap"
    said = replay(path, "--out", str(out), "--compare", str(path))
    assert said["published"] > 50 and said["comparison"]["latency_ms"]["encode"]["count"] == len(chunk_times)
    assert any("camera 'base' is" in event["text"] for event in said["events"]), said["events"]
    assert "/pi0_mps/arm/joint_trajectory" in read(out)
    assert replay(path)["digest"] == said["digest"]


def test_a_recording_on_request_and_none_for_what_was_ordered(start_node, robot, folder):
    node = start_node(**{"recorder.folder": str(folder), "recorder.keep": "2", "recorder.image_width": "0"})
    node.run_armed()
    assert node.enable(False).success
    node.wait_for_mode("active")
    time.sleep(1.0)
    assert not files(folder), "disarming is no fault"
    paths = []
    for _ in range(3):
        answer = node.save_recording()
        assert answer.success, answer.message
        paths.append(Path(answer.message))
    assert files(folder) == sorted(paths[1:]), "two stay"
    assert read(paths[2])["/camera/base/image_raw"][0][1].width == 224
    assert node.close() == 0
    assert files(folder) == sorted(paths[1:]), "an ordinary end is no fault"


def test_a_folder_that_cannot_be_written_harms_nothing(start_node, robot, tmp_path):
    (tmp_path / "file").write_text("")
    node = start_node(**{"recorder.folder": str(tmp_path / "file" / "recordings")})
    node.run_armed()
    answer = node.save_recording()
    assert not answer.success
    assert "Not a directory" in answer.message and "recorder.folder" in answer.message
    node.wait_for_diagnostic("recorder", b"\x01", "Not a directory")
    before = robot.count()
    robot.wait_for(before + 50)
    assert node.stop().success
    node.wait_for_mode("stopped")


BAG = ROOT / "tests/fixtures/bags/sim_arm"


def chunks(found: dict[str, list]) -> dict[tuple, list[np.ndarray]]:
    """A recording's action chunks by what they were made from: the joint state's stamp and the oldest image's."""
    made: dict[tuple, list[np.ndarray]] = {}
    for (_, chunk), (_, times) in zip(found["/pi0_mps/action_chunk"], found["/pi0_mps/chunk_times"], strict=True):
        assert chunk.header.stamp == times.header.stamp
        key = tuple((stamp.sec, stamp.nanosec) for stamp in (chunk.header.stamp, times.oldest_image))
        made.setdefault(key, []).append(np.array([point.positions for point in chunk.points]))
    return made


def test_a_bag_played_live_gives_the_chunks_its_replay_gives(start_node, robot, folder, replay, play_bag, tmp_path):
    """From the same images and the same joint state the same chunk, bit for bit, on topics and without ROS. Which
    states meet which images hangs on how long an encode takes: it is replayed with several of the times it took live."""
    robot.faults.silent_cameras, robot.faults.silent_joints = set(CAMERAS), True
    parameters = {"use_sim_time": "true", "max_tracking_error": "1000000.0", "recorder.folder": str(folder)}
    node = start_node(**parameters, **{"recorder.image_width": "0", "recorder.image_rate_hz": "1000.0"})
    play_bag(BAG, node)
    answer = node.save_recording()
    assert answer.success, answer.message
    found = read(Path(answer.message))
    encode, decode = ([getattr(c, name) for _, c in found["/pi0_mps/chunk_times"]] for name in ("encode_ms", "decode_ms"))
    replayed: dict[tuple, list[np.ndarray]] = {}
    for encode_ms in np.percentile(encode, [5, 35, 65, 95]):
        out = tmp_path / "replayed.mcap"
        said = replay(
            BAG,
            *("--params-file", str(ROOT / "config/robots/sim_arm.yaml"), "--out", str(out)),
            *("--encode-ms", str(encode_ms), "--decode-ms", str(np.median(decode)), "--compare", answer.message),
        )
        assert said["comparison"]["joints"]["elbow"]["commands"] > 50, said["comparison"]
        for key, positions in chunks(read(out)).items():
            replayed.setdefault(key, []).extend(positions)
    live = chunks(found)
    common = live.keys() & replayed.keys()
    assert len(common) >= 10, f"{len(common)} of {len(live)} chunks were made from what a replay used, too"
    apart = [key for key in common if not any(np.array_equal(live[key][0], p) for p in replayed[key])]
    # A frame that the machine brings late meets the other camera's one earlier: the same oldest image, another newest.
    assert len(apart) <= len(common) // 5, f"{len(apart)} of {len(common)} chunks differ from those of the same inputs"
