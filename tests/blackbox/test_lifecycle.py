"""The node as a managed node: what `ros2 lifecycle` and lifecycle managers do with it."""

from __future__ import annotations

import shutil
import signal

from lifecycle_msgs.srv import GetAvailableStates, GetAvailableTransitions

from harness import count


def asked(node, service: str) -> list[tuple[str, str, str]]:
    """Transitions that a service lists, as (start, label, goal)."""
    client = node.robot.node.create_client(GetAvailableTransitions, f"{node.name}/{service}")
    found = node.call(client, GetAvailableTransitions.Request()).available_transitions
    return [(t.start_state.label, t.transition.label, t.goal_state.label) for t in found]


def made(node, *labels: str) -> None:
    """Until `~/transition_event` has told these transitions, each with its outcome, since the last call."""
    node.wait(lambda: len(node.transitions) >= 2 * len(labels), f"transition events of {labels}")
    told = [label for _, label, _ in node.transitions]
    expected = [part for label in labels for part in (label, "transition_success")]
    assert told == expected, node.transitions
    node.transitions.clear()


def test_unconfigured_until_told_and_back(start_node, robot, checkpoint, tmp_path):
    """autostart false; a configure that fails and one that does not; activate, arm, deactivate while moving, clean up,
    the whole way again, shut down."""
    elsewhere = tmp_path / "policy"
    node = start_node("-p", f"checkpoint:={elsewhere}", autostart="false")
    node.wait_for_mode("unconfigured")
    assert node.lifecycle_state() == "unconfigured"
    assert "configure and activate" in node.enable().message
    assert asked(node, "get_available_transitions") == [
        ("unconfigured", "configure", "configuring"), ("unconfigured", "shutdown", "shuttingdown"),
    ]
    graph = asked(node, "get_transition_graph")
    assert ("configuring", "transition_failure", "unconfigured") in graph and len(graph) == 25
    states = node.call(
        robot.node.create_client(GetAvailableStates, "/pi0_mps/get_available_states"), GetAvailableStates.Request()
    ).available_states
    assert {(s.id, s.label) for s in states} >= {(1, "unconfigured"), (2, "inactive"), (3, "active"), (4, "finalized")}

    assert not node.change_state("configure"), "there is no checkpoint"
    assert node.lifecycle_state() == "unconfigured"
    node.wait_for_text("configure failed", str(elsewhere))
    assert b"\x02" in {s["level"] for s in node.statuses if "configure failed" in s["message"]}
    assert node.process.returncode is None
    node.wait(lambda: len(node.transitions) >= 2, "transition events of the failure")
    assert node.transitions[1] == ("configuring", "transition_failure", "unconfigured")
    node.transitions.clear()

    shutil.copytree(checkpoint, elsewhere)
    assert not node.change_state("activate"), "not configured"
    assert node.change_state("configure")
    assert node.lifecycle_state() == "inactive"
    node.wait_for_text("inactive", "activate")
    chunks = count(node.status, "chunks")
    assert not node.enable().success
    assert chunks == 0, "inference runs while inactive"

    assert node.change_state("activate")
    node.run_armed()
    assert node.change_state("deactivate")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    assert node.lifecycle_state() == "inactive"
    node.wait(lambda: node.status["lifecycle"] == "inactive", "status of the deactivated node")

    def wait_for_ticks(number: int) -> None:
        ticks = int(node.status["ticks"])
        node.wait(lambda: int(node.status["ticks"]) > ticks + number, f"{number} control ticks")

    wait_for_ticks(25)  # a chunk that was being made when inference stopped is still heard
    seen, before = int(node.status["chunks"]), robot.count()
    wait_for_ticks(50)
    assert int(node.status["chunks"]) == seen, "inference runs while inactive"

    assert node.change_state("activate")
    node.wait_for_mode("active")
    assert robot.count() == before, "activating armed the node"
    assert node.change_state("deactivate")
    assert node.change_state("cleanup")
    node.wait_for_mode("unconfigured")
    assert not node.change_state("cleanup")
    made(node, "configure", "activate", "deactivate", "activate", "deactivate", "cleanup")

    assert node.change_state("configure") and node.change_state("activate")
    node.run_armed()
    assert node.change_state("shutdown")
    robot.wait_for_silence()
    robot.check_last_is_a_stop()
    assert node.lifecycle_state() == "finalized"
    made(node, "configure", "activate", "shutdown")
    assert not node.change_state("configure"), "finalized is the end"
    node.process.interrupt(signal.SIGTERM)
    assert node.process.wait(30.0) == 0, node.process.tail()


def test_autostart_that_fails_ends_the_process(start_node, tmp_path):
    node = start_node("-p", f"checkpoint:={tmp_path / 'nothing'}")
    node.expected_exit = 2
    assert node.process.wait(60.0) == 2, node.process.tail()
    assert str(tmp_path / "nothing") in node.process.tail()
