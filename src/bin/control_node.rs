//! `control_node`: the ROS 2 node.
fn main() {}
