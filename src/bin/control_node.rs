//! `control_node`: the ROS 2 node.

use std::process::ExitCode;

fn main() -> ExitCode {
    pi0_mps::engine::cuda::prepare_process();
    pi0_mps::ros::run()
}
