//! The choices a user has that no layer below makes: each with the name it goes by in a params file.

use crate::choice::choice;

choice! {
    /// What happens when a camera goes silent.
    OnCameraLoss {
        /// Decelerating stop.
        Stop = "stop",
        /// Go on without that view, as the policy was trained to.
        DropView = "drop_view",
    }
}
choice! {
    /// Where the initial noise of the flow comes from.
    Noise {
        /// The same for every chunk: consecutive chunks agree more.
        Held = "held",
        /// New for every chunk.
        Fresh = "fresh",
    }
}
choice! {
    /// How camera images travel.
    Transport {
        /// `sensor_msgs/Image`.
        Raw = "raw",
        /// `sensor_msgs/CompressedImage`.
        Compressed = "compressed",
    }
}
choice! {
    /// What an output group publishes.
    OutputKind {
        /// `trajectory_msgs/JointTrajectory`: the next window of the plan and a braking tail.
        Trajectory = "trajectory",
        /// `std_msgs/Float64MultiArray`: the positions of this tick.
        Command = "command",
    }
}
choice! {
    /// Delivery a subscription asks for.
    Reliability {
        /// Lost messages stay lost: right for what the next message replaces.
        BestEffort = "best_effort",
        /// Lost messages are sent again; does not match best-effort publishers.
        Reliable = "reliable",
    }
}
