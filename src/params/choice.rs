//! The choices a user has, each with the name it goes by in a params file.

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            /// The allowed names, in order.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name in a params file.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }

            /// The choice of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some($name::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

choice! {
    /// How the two stages share their time.
    PipelineMode {
        /// Encode, then decode, each with the whole device.
        Sequential = "sequential",
        /// Encode frame n+1 while decoding frame n.
        Pipelined = "pipelined",
        /// Decode again and again on the newest finished cache with the newest joint state.
        DualRate = "dual_rate",
    }
}
choice! {
    /// How the two stages share the multiprocessors.
    Partition {
        /// `mps` if the device says MPS is on, else `green`, else `shared`.
        Auto = "auto",
        /// Two driver contexts with an SM count each, under the MPS daemon.
        Mps = "mps",
        /// Two green contexts.
        Green = "green",
        /// Two streams, the decoder's with the higher priority.
        Shared = "shared",
    }
}
choice! {
    /// How a new chunk joins the one that is running.
    Seam {
        /// Guided real-time chunking.
        Rtc = "rtc",
        /// Cross-fade with continuous velocity.
        Crossfade = "crossfade",
        /// Switch at once.
        None = "none",
    }
}
choice! {
    /// How the weight of guidance falls from the committed steps to the free ones.
    RtcSchedule {
        /// Linearly.
        Linear = "linear",
        /// Exponentially.
        Exp = "exp",
        /// One up to the end of guidance.
        Ones = "ones",
        /// Zero after the committed steps.
        Zeros = "zeros",
    }
}
choice! {
    /// What happens when a chunk is later than its budget.
    MissPolicy {
        /// Play what is left of the plan, then decelerate.
        Coast = "coast",
        /// Decelerate at once.
        Stop = "stop",
    }
}
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
    /// What an action means.
    ActionMode {
        /// As the checkpoint's configuration says; absolute if it says nothing.
        Auto = "auto",
        /// A joint position.
        Absolute = "absolute",
        /// A difference to the joint state the chunk was decoded from.
        Delta = "delta",
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

/// Where the policy runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// The first GPU if this build and machine have one, else the CPU.
    Auto,
    /// The CPU engine.
    Cpu,
    /// The GPU of that index.
    Cuda(u32),
}

impl Device {
    /// The device of that name: `auto`, `cpu` or `cuda:N`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Device::Auto),
            "cpu" => Some(Device::Cpu),
            _ => name.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}
