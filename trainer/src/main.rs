//! The `trainer` binary: everything is in [`trainer::cli`].
fn main() -> std::process::ExitCode {
    trainer::cli::main()
}
