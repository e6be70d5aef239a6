"""`ros2 param set` with what must be refused: the reason says what to do, the old value stays."""

from __future__ import annotations

import pytest
from rcl_interfaces.msg import ParameterType, ParameterValue


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


def test_unknown_name_gets_the_nearest(node):
    result = node.set_parameter("mps_encoder_percentag", integer(40))
    assert not result.successful
    assert "did you mean 'mps_encoder_percentage'?" in result.reason, result.reason


def test_integer_for_a_double_is_promoted(node):
    result = node.set_parameter("max_tracking_error", integer(1))
    assert result.successful, result.reason
    assert node.get_parameter("max_tracking_error") == double(1.0)
