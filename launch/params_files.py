"""What params files say to the node, and parameters that count more than they do. Needs nothing of ROS."""

from __future__ import annotations

import atexit
import json
import tempfile
from pathlib import Path

import yaml

PACKAGE = Path(__file__).resolve().parent.parent
NAME = "pi0_mps"


def chosen(robot: str, params_file: str) -> list[Path]:
    """The robot's file and the user's, as far as they are given."""
    files = []
    if robot:
        # A file without joints goes on top of a robot's: it is for params_file.
        known = {f.stem: f for f in sorted((PACKAGE / "config/robots").glob("*.yaml")) if "joint_names:" in f.read_text()}
        if robot not in known:
            raise RuntimeError(
                f"robot:={robot} is not in config/robots; known are {', '.join(known)}; or give params_file:=FILE"
            )
        files.append(known[robot])
    if params_file:
        files.append(Path(params_file).expanduser())
        if not files[-1].is_file():
            raise RuntimeError(f"params_file:={params_file} is not a file; give the YAML file of your robot")
    if not files:
        raise RuntimeError("give robot:=NAME, one of those in config/robots, or params_file:=FILE, or both")
    return files


def sections(file: Path) -> list[tuple[str, dict[str, object]]]:
    """Every section by its name, with its parameters by their full names: both may be nested maps."""
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as e:
        raise RuntimeError(f"{file} is not YAML: {e}") from e
    if not isinstance(tree, dict):
        raise RuntimeError(f"{file} holds no sections; a params file starts with '/**:' and 'ros__parameters:'")
    found: list[tuple[str, dict[str, object]]] = []

    def walk(above: str, tree: dict) -> None:
        for key, below in tree.items():
            if key == "ros__parameters":
                found.append((above, flat(below or {})))
            elif isinstance(below, dict):
                walk(f"{above}/{key}" if above else str(key), below)

    walk("", tree)
    return found


def flat(parameters: dict, above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in parameters.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def given_parameter(files: list[Path], name: str, default, namespace: str = ""):
    """A parameter of the node in that namespace, as the last section that has it says."""
    found = default
    for parameters in of_node(files, namespace):
        found = parameters.get(name, found)
    return found


def of_node(files: list[Path], namespace: str) -> list[dict[str, object]]:
    """The parameters of each section that is for the node in that namespace."""
    own = f"/{namespace.strip('/')}/{NAME}".replace("//", "/")
    return [found for file in files for name, found in sections(file) if name in ("/**", "**", NAME, own)]


def names_ending(files: list[Path], end: str, namespace: str = "") -> set[str]:
    """Names of the node's parameters that end like that."""
    return {name for parameters in of_node(files, namespace) for name in parameters if name.endswith(end)}


def output_groups(files: list[Path], namespace: str = "") -> list[str]:
    groups = given_parameter(files, "outputs.names", ["arm"], namespace)
    if not isinstance(groups, list) or not groups or not all(isinstance(group, str) and group for group in groups):
        raise RuntimeError(f"outputs.names is {groups!r}; give a list of names, such as [arm, gripper]")
    return groups


def commands_under(files: list[Path], under: str, namespace: str = "") -> dict[str, object]:
    """Parameters that send every command below `under`. With the topics goes the list of groups: a group that was not
    found here then does not exist for the node either, rather than publishing where the files say."""
    groups = output_groups(files, namespace)
    return {"outputs.names": groups, **{f"outputs.{group}.topic": f"{under}/{group}" for group in groups}}


def on_top(files: list[Path], parameters: dict[str, object]) -> Path:
    """A params file to be given after `files`, which counts more than they do. It has all their sections: ROS applies
    sections in the order in which it first hears of them, so that one section alone could come before one of theirs."""
    names = dict.fromkeys(["/**", *(name for file in files for name, _ in sections(file))])
    with tempfile.NamedTemporaryFile("w", prefix="pi0_mps-", suffix=".yaml", encoding="utf-8", delete=False) as file:
        # JSON is YAML too, and has no references, which ROS does not read.
        json.dump({name: {"ros__parameters": parameters} for name in names}, file, ensure_ascii=False)
    path = Path(file.name)
    atexit.register(path.unlink, missing_ok=True)
    return path
