//! `pi0`: the offline tools.

fn main() -> std::process::ExitCode {
    pi0_mps::engine::cuda::prepare_process();
    pi0_mps::cli::main()
}
