"""The launch files against a stand-in for `launch`, which PyPI has none of, and what they give to the real node."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from robot import CAMERAS, JOINTS, PARAMETERS

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "launch"))

import params_files  # noqa: E402

ARM, GRIPPER = JOINTS[:-1], JOINTS[-1]
# Two controllers, as `ros2 param dump` writes them, and as the robots' files do.
NESTED = {
    "outputs": {
        "names": ["arm", "gripper"],
        "arm": {"joints": ARM, "topic": "/arm_controller/joint_trajectory"},
        "gripper": {"joints": [GRIPPER], "topic": "/gripper_controller/commands", "type": "command"},
    }
}
FLAT = params_files.flat(NESTED)
TOPICS = {"outputs.arm.topic": "replay/arm", "outputs.gripper.topic": "replay/gripper"}


class Entity:
    """Any action, substitution or condition of launch: what it was made of."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    @property
    def name(self) -> str:
        return self.args[0]

    def perform(self, given: dict[str, str]) -> str:
        return given[self.name]


class StandIn(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Entity,), {})


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    modules = ["actions", "event_handlers", "launch_description_sources", "logging", "substitutions"]
    for name in ["launch", *(f"launch.{m}" for m in modules), "launch_ros", "launch_ros.actions", "launch_ros.ros_adapters"]:
        monkeypatch.setitem(sys.modules, name, StandIn(name))


def launch(file: str, **given: str) -> dict[str, Entity]:
    """What a launch file starts, by kind."""
    spec = importlib.util.spec_from_file_location("launch_file", ROOT / "launch" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    defaults = {a.name: a.kwargs.get("default_value") for a in module.ARGUMENTS}
    assert given.keys() <= defaults.keys()
    return {type(entity).__name__: entity for entity in module.start(defaults | given)}


def node_of_replay(tmp_path: Path, file: Path) -> list[Path]:
    """The params files that replay.launch.py gives to the node."""
    included = launch("replay.launch.py", bag=str(tmp_path), record=str(tmp_path / "new"), params_file=str(file))
    arguments = dict(included["IncludeLaunchDescription"].kwargs["launch_arguments"])
    assert arguments["arm"] == "true"
    return [Path(p) for p in launch("control.launch.py", **arguments)["Node"].kwargs["parameters"]]


def write(file: Path, sections: dict) -> Path:
    tree = {name: {"ros__parameters": values} for name, values in sections.items()}
    # Through JSON, so that nothing is shared: ROS reads no references.
    file.write_text(yaml.dump(json.loads(json.dumps(tree)), sort_keys=False))
    return file


def as_ros_applies_them(files: list[Path]) -> dict[str, object]:
    """Section by section, in the order in which their names are first heard of."""
    merged: dict[str, dict[str, object]] = {}
    for file in files:
        for section, parameters in params_files.sections(file):
            merged.setdefault(section, {}).update(parameters)
    return {name: value for parameters in merged.values() for name, value in parameters.items()}


@pytest.mark.parametrize("outputs", [NESTED, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("sections", list(itertools.permutations(["/**", "pi0_mps", "/pi0_mps"], 2)), ids=" then ".join)
def test_replay_commands_nothing_but_topics_of_its_own(tmp_path, outputs, sections):
    first, last = sections
    own = {"limits.gripper.max_tracking_error": 0.01}
    file = write(tmp_path / "robot.yaml", {first: {**PARAMETERS, **own, **outputs}, last: outputs})
    applied = as_ros_applies_them(node_of_replay(tmp_path, file))
    assert {applied[name] for name in ("max_tracking_error", *own)} == {1e6}, "a recording does not follow the commands"
    assert applied["outputs.names"] == ["arm", "gripper"]
    assert {name: value for name, value in applied.items() if name.endswith("topic") and name.startswith("outputs")} == TOPICS


def test_the_node_in_a_replay_has_no_publisher_on_a_topic_of_the_robot(start_node, robot, tmp_path):
    file = write(tmp_path / "robot.yaml", {"/pi0_mps": {**PARAMETERS, **NESTED}, "pi0_mps": NESTED, "/**": NESTED})
    first, *more = node_of_replay(tmp_path, file)
    node = start_node(*(part for file in more for part in ("--params-file", str(file))), params_file=first)
    for name, topic in TOPICS.items():
        assert node.get_parameter(name).string_value == topic
    node.wait(lambda: robot.node.get_publishers_info_by_topic("/replay/gripper"), "publisher of the gripper")
    for topic in ("/arm_controller/joint_trajectory", "/gripper_controller/commands"):
        assert not robot.node.get_publishers_info_by_topic(topic)


def test_a_group_that_the_launch_file_does_not_find_does_not_exist_for_the_node(start_node, tmp_path):
    """Here it stands in a section that is for another name; the node takes it for a slip, whoever is right."""
    file = write(tmp_path / "robot.yaml", {"/**": {**PARAMETERS, "outputs.gripper.topic": "/gripper_controller/commands"}})
    first, *more = node_of_replay(tmp_path, file)
    node = start_node(*(part for file in more for part in ("--params-file", str(file))), params_file=first)
    node.expected_exit = 2
    assert node.process.wait(60.0) == 2, node.process.tail()
    assert "outputs.gripper.topic" in node.process.tail()


def test_replay_plays_the_topics_that_the_files_name(tmp_path):
    camera = {CAMERAS[0]: {"topic": "/cam0/image"}}
    file = write(tmp_path / "robot.yaml", {"/**": {**PARAMETERS, "cameras": camera}, "/other": {"camera_names": []}})
    given = {"bag": str(tmp_path), "record": str(tmp_path / "new"), "params_file": str(file)}
    player = launch("replay.launch.py", **given)["TimerAction"].kwargs["actions"][0].kwargs["cmd"]
    assert player[player.index("--topics") + 1 :] == ["/cam0/image", f"/camera/{CAMERAS[1]}/image_raw", "/joint_states"]
    write(file, {"/**": {**PARAMETERS, "outputs.names": "arm"}})
    with pytest.raises(RuntimeError, match="outputs.names is 'arm'; give a list of names"):
        launch("replay.launch.py", **given)


def test_arguments_count_more_than_the_files_only_where_they_are_given(tmp_path):
    file = write(tmp_path / "robot.yaml", {"/pi0_mps": {**PARAMETERS, "autostart": False, "use_sim_time": True}})
    robot = ROOT / "config/robots/so101.yaml"
    assert launch("control.launch.py", params_file=str(file))["Node"].kwargs["parameters"] == [str(file)]
    parameters = launch("control.launch.py", params_file=str(file), robot="so101", autostart="true", checkpoint="a: b")
    *files, top = parameters["Node"].kwargs["parameters"]
    assert files == [str(robot), str(file)]
    sections = json.loads(Path(top).read_text())
    assert sections.keys() == {"/**", "/pi0_mps"}
    assert all(s == {"ros__parameters": {"autostart": True, "checkpoint": "a: b"}} for s in sections.values())


def test_the_aggregator_has_a_place_for_every_part_of_the_node(start_node):
    node = start_node()
    node.wait_for_mode("active")
    tree = yaml.safe_load((ROOT / "config/diagnostic_aggregator.yaml").read_text())
    leaves = tree["analyzers"]["ros__parameters"]["pi0_mps"]["analyzers"].values()
    places = {name for leaf in leaves for name in leaf["contains"]}
    node.wait(lambda: places <= set(node.diagnostics), "every diagnostic that has a place")
    assert places == set(node.diagnostics)
