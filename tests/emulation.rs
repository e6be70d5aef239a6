//! The kernels of chips that are not Hopper, and those of Hopper that use nothing of its own, run on the CPU from their own source, lane by lane: `tests/emulator` stands
//! in for the GPU. Needs a C++ compiler and no GPU.

use std::path::Path;
use std::process::Command;

/// Results rounded to bf16, or of bf16 weights of the softmax.
const ROUNDED: f64 = 4e-3;
/// Sums in float32.
const EXACT: f64 = 1e-6;

/// What makes CUDA's keywords C++ where a macro cannot.
const HOST: [(&str, &str); 5] = [
    ("extern __shared__ __align__(128) uint8_t shared_memory[];", ""),
    ("extern __shared__ __align__(128) uint8_t shared[];", "uint8_t* shared = arena;"),
    ("extern __shared__ __align__(16) float sums[];", "float* sums = reinterpret_cast<float*>(arena);"),
    ("__shared__", "static"),
    ("extern \"C\"", ""),
];

/// Compiles the kernels with those changes and runs them: the distance of every case by name.
fn run(changes: &[(&str, &str)]) -> Vec<(String, f64)> {
    let (root, dir) = (Path::new(env!("CARGO_MANIFEST_DIR")), tempfile::tempdir().unwrap());
    let kernels = ["attention.cu", "portable.cu", "load.cu", "pointwise.cu", "tower.cu"];
    for name in ["attention.cuh", "operands.cuh", "persistent.cuh", "skinny.cuh", "wgmma.cuh"].iter().chain(&kernels) {
        let mut source = std::fs::read_to_string(root.join("kernels").join(name)).unwrap();
        for (from, to) in HOST.iter().chain(changes) {
            source = source.replace(from, to);
        }
        std::fs::write(dir.path().join(name), source).unwrap();
    }
    for name in ["common.cuh", "main.cpp"] {
        std::fs::copy(root.join("tests/emulator").join(name), dir.path().join(name)).unwrap();
    }
    let ask = |command: &mut Command| {
        let done = command.current_dir(dir.path()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    ask(Command::new("c++").args(["-std=c++17", "-O2", "-w", "-o", "kernels", "main.cpp"]));
    let line = |l: &str| l.rsplit_once(": ").map(|(name, d)| (name.to_owned(), d.parse().unwrap()));
    ask(&mut Command::new(dir.path().join("kernels"))).lines().filter_map(line).collect()
}

/// Whether a case is as near as rounding allows; NaN is not.
fn sound((name, distance): &(String, f64)) -> bool {
    *distance <= if name.starts_with("exact") { EXACT } else { ROUNDED }
}

#[test]
fn portable_kernels_compute_what_they_should() {
    let cases = run(&[]);
    let wrong: Vec<_> = cases.iter().filter(|c| !sound(c)).collect();
    assert!(cases.len() > 40 && wrong.is_empty(), "{} cases, wrong: {wrong:#?}", cases.len());
}

#[test]
fn a_fault_in_a_kernel_is_noticed() {
    let cases = run(&[
        // The state row does not see itself; the second halves of pairs come from the wrong rows; sums of squares are too
        // small.
        ("prefix + 1 - first", "prefix - first"),
        ("m * 1024 + lane * 8", "m * 512 + lane * 8"),
        ("a.squares_out[blockIdx.x * 64 + n] = sum", "a.squares_out[blockIdx.x * 64 + n] = 0.9f * sum"),
        // Sums do not become the residual; what warps' means are apart is forgotten.
        ("x[c] = v[i];", ""),
        ("of_warp[w].z * apart * apart", "0.0f"),
        // Two units of a tile change places; of the tower too, and in its folded norm; pieces of a row are not exchanged.
        ("in % 16 / 4 * 2 + in % 2", "in % 16 / 4 * 2 + 1 - in % 2"),
        ("r % 2 * 8 + r % 16 / 2", "r % 2 * 4 + r % 16 / 2"),
        ("in % 16 / 2 + in % 2 * 8", "in % 16 / 2 + in % 2 * 4"),
        ("(c % 16 / 2) ^ (token % 8)", "(c % 16 / 2)"),
        // Halves of a pair are not side by side; a row's octet is lost.
        ("d / pairs * 8 + pair % 8", "d / pairs * 4 + pair % 8"),
        ("a.octets + row / 8) * 8", "a.octets) * 8"),
        // Who has only the last of a part does not count.
        ("(s.last - 1) / each + 1", "s.last / each"),
    ]);
    for (name, faulty) in [
        ("state row's attention", true),
        ("decoder's attention", false),
        ("encoder's attention", false),
        ("packed gate and up", true),
        ("weights packed for the tower", true),
        ("rotated heads", true),
        ("packed rows", true),
        ("sums left", false),
        ("rounded, norm", false),
        ("tower's rows", true),
        ("tower's moments", false),
        ("folded norm", true),
        ("joined rows", true),
        ("untouched rows", false),
        ("layer norm", true),
        ("qkv", true),
        ("rounded, gate and up", true),
        ("squares of", true),
        ("exact, residual", false),
        ("counted", true),
    ] {
        let of: Vec<_> = cases.iter().filter(|(n, _)| n.contains(name)).collect();
        assert!(!of.is_empty() && of.iter().all(|c| sound(c) != faulty), "{name}: {of:?}");
    }
}
