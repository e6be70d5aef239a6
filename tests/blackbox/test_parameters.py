"""What `ros2 param` does: sets that must be refused, with the reason and the old value kept; descriptors, events, sets of
several at once, and a dump that starts the same node again."""

from __future__ import annotations

import itertools

import pytest
import yaml
from rcl_interfaces.msg import Parameter, ParameterEvent, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters, SetParametersAtomically
from rclpy.parameter import parameter_value_to_python

from robot import PARAMETERS


def integer(value: int) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)


def double(value: float) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)


def string(value: str) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)


@pytest.fixture
def node(start_node):
    node = start_node()
    node.wait_for_mode("active")
    return node


def expect_refused(node, name: str, value: ParameterValue, *parts: str) -> None:
    before = node.get_parameter(name)
    result = node.set_parameter(name, value)
    assert not result.successful
    assert all(part in result.reason for part in (name, *parts)), result.reason
    assert node.get_parameter(name) == before
    assert node.robot.count() == 0


def test_refusals(node):
    expect_refused(node, "mps_encoder_percentage", string("half"), 'expected int, got string "half"')
    expect_refused(node, "mps_encoder_percentage", integer(150), "150 is outside 1 to 100 %")
    expect_refused(node, "max_tracking_error", double(-1.0), "-1.0 is outside")
    expect_refused(node, "max_tracking_error", double(float("nan")), ".nan is outside")
    expect_refused(node, "pipeline_mode", string("pipeline"), '"pipeline" is not one of sequential, pipelined, dual_rate')
    expect_refused(node, "control_rate_hz", double(100.0), "read-only")
    expect_refused(node, "limits.elbow.min_position", double(9.0), "9.0 is not below limits.elbow.max_position")


def call(node, kind, service: str, **request):
    return node.call(node.robot.node.create_client(kind, f"{node.name}/{service}"), kind.Request(**request))


def all_values(node) -> dict[str, ParameterValue]:
    names = call(node, ListParameters, "list_parameters").result.names
    return dict(zip(names, call(node, GetParameters, "get_parameters", names=names).values, strict=True))


def test_names_types_and_descriptors(node):
    result = node.set_parameter("mps_encoder_percentag", integer(40))
    assert not result.successful
    assert "did you mean 'mps_encoder_percentage'?" in result.reason, result.reason

    result = node.set_parameter("max_tracking_error", integer(1))
    assert result.successful, result.reason
    assert node.get_parameter("max_tracking_error") == double(1.0), "a whole number for a double is promoted"

    names = ["control_rate_hz", "mps_encoder_percentage", "seam"]
    rate, share, seam = call(node, DescribeParameters, "describe_parameters", names=names).descriptors
    assert rate.read_only and rate.type == ParameterType.PARAMETER_DOUBLE and rate.description.endswith("[Hz]")
    assert (rate.floating_point_range[0].from_value, rate.floating_point_range[0].to_value) == (1.0, 1000.0)
    assert not share.read_only and (share.integer_range[0].from_value, share.integer_range[0].to_value) == (1, 100)
    assert "One of: rtc, crossfade, none." in seam.additional_constraints
    assert not call(node, DescribeParameters, "describe_parameters", names=["seams"]).descriptors


def test_events_and_several_at_once(node):
    events: list[ParameterEvent] = []
    node.robot.node.create_subscription(ParameterEvent, "/parameter_events", events.append, 100)

    def said(name: str) -> list[dict]:
        """Changes that an event says of this node, of those with `name`."""
        mine = [{p.name: p.value for p in e.changed_parameters} for e in events if e.node == node.name]
        return [changed for changed in mine if name in changed]

    # The topic keeps nothing for those who come late, and the node learns of them when it does.
    name, steps = "num_inference_steps", itertools.cycle((9, 10))
    node.wait(lambda: node.set_parameter(name, integer(next(steps))).successful and said(name), "an event")
    assert node.set_parameter("mps_encoder_percentage", integer(70)).successful
    node.wait(lambda: said("mps_encoder_percentage"), "the event of the set")
    changed = {name: value.integer_value for name, value in said("mps_encoder_percentage")[0].items()}
    assert changed == {"mps_encoder_percentage": 70, "mps_decoder_percentage": 30}, "the other share moves with it"

    def together(*changes: tuple[str, ParameterValue]):
        parameters = [Parameter(name=name, value=value) for name, value in changes]
        return call(node, SetParametersAtomically, "set_parameters_atomically", parameters=parameters).result

    before = str(all_values(node))  # what is not set is NaN, which equals nothing
    refused = together(("max_tracking_error", double(0.5)), ("seam", string("rct")))
    assert not refused.successful and "'seam'" in refused.reason
    assert str(all_values(node)) == before, "one of them was set"
    assert together(("max_tracking_error", double(0.5)), ("seam", string("none"))).successful
    node.wait(lambda: said("seam"), "the event of both")
    assert said("seam")[0].keys() == {"max_tracking_error", "seam"}
    # A rule over two parameters: neither alone, both together.
    low, high = (f"limits.elbow.{end}_position" for end in ("min", "max"))
    above = PARAMETERS[high] + 0.1
    assert not node.set_parameter(low, double(above)).successful
    assert together((low, double(above)), (high, double(above + 0.1))).successful


def test_many_limits_in_one_request(node):
    """As `ros2 param load` sends a file: each is a change of its own for the control loop, which takes some a period."""
    names = [name for name in PARAMETERS if name.startswith("limits.") and name.endswith(("_velocity", "_acceleration"))]
    parameters = [Parameter(name=name, value=double(PARAMETERS[name] * 0.1)) for name in names]
    results = call(node, SetParameters, "set_parameters", parameters=parameters).results
    refused = {name: r.reason for name, r in zip(names, results, strict=True) if not r.successful}
    assert len(names) >= 14 and not refused, refused
    after = all_values(node)
    assert all(after[p.name] == p.value for p in parameters)


def test_a_dump_starts_the_same_node_again_and_can_be_loaded(start_node, tmp_path):
    # One value that is not the default, and one that is not set.
    given = {name: value for name, value in PARAMETERS.items() if name != "limits.elbow.max_acceleration"}
    file = tmp_path / "robot.yaml"
    file.write_text(yaml.dump({"/**": {"ros__parameters": {**given, "seam": "none"}}}))
    node = start_node(params_file=file)
    node.wait_for_mode("active")
    before = all_values(node)
    # As `ros2 param dump` writes it, and as `ros2 param load` sends it: a list without items is one of bools.
    parameters: dict = {}
    for name, value in before.items():
        *groups, last = name.split(".")
        into = parameters
        for group in groups:
            into = into.setdefault(group, {})
        plain = parameter_value_to_python(value)
        into[last] = plain if isinstance(plain, (bool, int, float, str)) else list(plain)
        if into[last] == []:
            value = ParameterValue(type=ParameterType.PARAMETER_BOOL_ARRAY)
        loaded = node.set_parameter(name, value)
        assert loaded.successful, loaded.reason
    assert str(all_values(node)) == str(before)  # as text: what is not set is NaN
    assert node.close() == 0
    dump = tmp_path / "dump.yaml"
    dump.write_text(yaml.dump({node.name: {"ros__parameters": parameters}}, default_flow_style=False))
    again = start_node(params_file=dump)
    again.wait_for_mode("active")
    assert str(all_values(again)) == str(before)


def test_a_slip_in_a_params_file_is_refused_at_start(start_node, tmp_path):
    file = tmp_path / "robot.yaml"
    file.write_text(yaml.dump({"/**": {"ros__parameters": {**PARAMETERS, "mps_encoder_percentag": 40}}}))
    node = start_node(params_file=file)
    node.expected_exit = 2
    assert node.process.wait(60.0) == 2, node.process.tail()
    assert "did you mean 'mps_encoder_percentage'?" in node.process.tail()


def test_a_params_file_that_is_not_for_this_node_is_refused_at_start(start_node, tmp_path):
    """Also where another file is: limits that are left out in silence do not protect."""
    for section, says in [
        ("/right/pi0_mps", "no section for this node, only '/right/pi0_mps'; name one '/**' or '/left/pi0_mps'"),
        ("/**/pi0_mps", "section '/**/pi0_mps' would be this node's, but names of this form are not read"),
    ]:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.dump({section: {"ros__parameters": {"limits": {"elbow": {"max_velocity": 0.1}}}}}))
        node = start_node("-r", "__ns:=/left", "--params-file", str(file), name="/left/pi0_mps")
        node.expected_exit = 2
        assert node.process.wait(60.0) == 2, node.process.tail()
        assert f"params file '{file}': {says}" in node.process.tail()
