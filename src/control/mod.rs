//! Between a finished chunk and the robot: no device, no ROS, no wall clock.

pub mod chunk;
