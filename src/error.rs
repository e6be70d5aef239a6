//! Errors are typed per layer; what every layer can say is who has to act on one.

/// Who is at fault, which decides what the node does and the exit code of a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A file, parameter or command given by the user: fix it and try again.
    Input,
    /// The machine: no GPU, too little memory, a right that was not granted.
    Machine,
    /// Somebody on the other side of a topic: a camera, a controller, the robot.
    Peer,
    /// This program.
    Internal,
}

impl Fault {
    /// Process exit code of a tool that ends with this fault.
    pub fn exit_code(self) -> u8 {
        match self {
            Fault::Input => 2,
            Fault::Machine => 3,
            Fault::Peer => 4,
            Fault::Internal => 70,
        }
    }
}

/// An error that names who is at fault.
pub trait Blame: std::error::Error {
    /// Who has to act.
    fn fault(&self) -> Fault;
}
