//! `BITLINEAR_KERNEL` is read once a process, so each name gets a process of its own: this test program again.
//!
//! Where the program runs in an emulator, `BITLINEAR_TEST_RUNNER` holds the command that starts it.

use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;

use bitlinear::kernels::{KERNEL_VARIABLE, Kernel, QuantizedRows, matmul};
use bitlinear::packed::TernaryWeight;

/// What the other process runs: prints the kernel in use and a hash of all bits of some products, or the error.
#[test]
#[ignore = "run by the other test of this file in a process of its own"]
fn child() {
    let (outs, columns) = (150, 333);
    let codes: Vec<i8> = (0..outs * columns).map(|at| (at * at / 7 % 3) as i8 - 1).collect();
    let weight = TernaryWeight::pack(&codes, outs, columns, 0.25).unwrap();
    let mut hash = DefaultHasher::new();
    for rows in [1, 21] {
        let activations: Vec<f32> = (0..rows * columns).map(|at| (at * 31 % 997) as f32 - 400.0).collect();
        let mut output = vec![f32::NAN; rows * outs];
        if let Err(error) = matmul(&QuantizedRows::quantize(&activations, columns), &weight, &mut output) {
            println!("error: {error}");
            return;
        }
        assert!(output.iter().any(|y| *y != 0.0));
        output.iter().for_each(|y| y.to_bits().hash(&mut hash));
    }
    println!("hash: {:016x}", hash.finish());
    println!("kernel: {}", Kernel::active().unwrap().name());
}

/// The lines that `child` prints with this value of the variable.
fn run(name: Option<&OsStr>) -> String {
    let program = std::env::current_exe().unwrap().into_os_string();
    let runner = std::env::var("BITLINEAR_TEST_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace().map(OsString::from).chain([program]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--exact", "child", "--ignored", "--nocapture"]).env_remove(KERNEL_VARIABLE);
    if let Some(name) = name {
        command.env(KERNEL_VARIABLE, name);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The rest of the line that starts with `key`; the test harness may have put something before it.
fn line<'a>(printed: &'a str, key: &str) -> &'a str {
    let (_, rest) = printed.split_once(key).unwrap_or_else(|| panic!("no '{key}' in:\n{printed}"));
    rest.lines().next().unwrap()
}

#[test]
fn a_process_computes_with_the_kernel_that_is_named() {
    let kernels = Kernel::available();
    let fastest = run(None);
    assert_eq!(line(&fastest, "kernel: "), kernels[kernels.len() - 1].name());
    for kernel in &kernels {
        let printed = run(Some(OsStr::new(kernel.name())));
        assert_eq!(line(&printed, "kernel: "), kernel.name());
        assert_eq!(line(&printed, "hash: "), line(&fastest, "hash: "), "{}", kernel.name());
        println!("kernel run in a process of its own: {}", kernel.name());
    }
}

#[test]
fn a_name_that_cannot_run_is_an_error() {
    assert!(
        line(&run(Some(OsStr::new("abacus"))), "error: ").starts_with("kernel 'abacus' in BITLINEAR_KERNEL")
    );
    assert!(line(&run(Some(OsStr::new(""))), "error: ").contains("available: scalar"));
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = OsStr::from_bytes(b"scalar\xff");
        assert!(line(&run(Some(name)), "error: ").starts_with("kernel 'scalar\u{fffd}'"));
    }
}
